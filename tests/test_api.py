"""The Python API: what is offered exists, works in a program, and the notebook runs from top to bottom."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dvrl_jax
from dvrl_jax.agents import Timestep
from dvrl_jax.errors import ConfigError, RunError
from tests.tiny import tiny_hike, train

ROOT = Path(__file__).parent.parent
SMALL = {"num_envs": 2, "model__channels": (8, 8), "model__h_dim": 8, "model__z_dim": 4, "log__interval": 2}


def test_everything_that_is_offered_exists():
    for name in dvrl_jax.__all__:
        assert getattr(dvrl_jax, name).__doc__, name
        kinds = ("ActionSpec", "Agent", "Batched", "BatchedEnvironment", "Environment", "Games", "ObservationSpec")
        kinds += ("Gymnax",)
        kinds += ("Recording", "Run", "Step", "Turn", "Watched")
        assert name in dvrl_jax.__doc__ or name in (*kinds, "make_agent", "play_games")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dvrl_jax.nonsense  # noqa: B018


def test_wrong_names_are_answered_in_one_sentence():
    with pytest.raises(ConfigError, match=r"no configs/nothing\.py"):
        dvrl_jax.make_config("nothing")
    with pytest.raises(ConfigError, match="pong_dvrl: Asteroids: too many positional arguments"):
        dvrl_jax.make_config("pong_dvrl", "Asteroids")
    for name in ("configs/mountain_hike_rnn", "mountain_hike_rnn.py", "../x", "__init__"):
        with pytest.raises(ConfigError, match=rf"^{name}: is not the name of a configuration"):
            dvrl_jax.make_config(name)
    with pytest.raises(ConfigError, match=r"^atari_dvrl: 3: arguments of a configuration are texts"):
        dvrl_jax.make_config("atari_dvrl", 3)
    with pytest.raises(ConfigError, match=r"model\.h_dm: there is no such field; did you mean model\.h_dim"):
        dvrl_jax.make_config("mountain_hike_rnn", model__h_dm=3)


def test_a_configuration_is_shipped_or_in_a_folder_configs_on_the_path(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "configs").is_dir()])
    assert dvrl_jax.make_config("mountain_hike_rnn").env.name == "MountainHike"
    with pytest.raises(
        ConfigError, match=r"there is no configs/pong_rn\.py in dvrl_jax or on sys\.path; did you mean po"
    ):
        dvrl_jax.make_config("pong_rn")
    (tmp_path / "configs").mkdir()
    text = "from dvrl_jax.configs import default\n\n\ndef get_config():\n    return default.get_config()\n"
    (tmp_path / "configs" / "pong_rn.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert dvrl_jax.make_config("pong_rn", seed=3).seed == 3
    for module in ("configs", "configs.pong_rn"):
        monkeypatch.delitem(sys.modules, module)


def test_training_goes_on_from_a_state_as_if_it_had_not_stopped():
    config = dvrl_jax.make_config("mountain_hike_rnn", **SMALL)
    env = dvrl_jax.make_env(config)
    train = dvrl_jax.make_train(config, env)
    whole, history = train(seed=3, num_updates=5)
    half, first = train(seed=3, num_updates=3)
    both, second = train(num_updates=2, state=half)
    assert [line["update"] for line in history] == [2, 4]
    assert [line["loss.total"] for line in first + second] == [line["loss.total"] for line in history]
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(both.params), strict=True):
        np.testing.assert_array_equal(a, b)
    agent = dvrl_jax.trained_agent(config, env, both)
    assert agent.use_running_average
    with pytest.raises(ValueError, match="state: has been continued from before"):
        train(num_updates=2, state=half)
    with pytest.raises(ValueError, match="max_steps = 0: must be at least 1"):
        dvrl_jax.record(agent, env, jax.random.key(0), max_steps=0)
    with pytest.raises(RunError, match="num_envs = 0: must be at least 1"):
        dvrl_jax.make_env(config, num_envs=0)


def test_what_was_watched_fits_together(tmp_path):
    """The next belief follows from this one, the action and the next observation; it starts anew with episodes."""
    train(tmp_path / "run", tiny_hike("rnn", env__p_blank=0.5), total_env_steps=40)
    run = dvrl_jax.load_run(tmp_path / "run", checkpoint="latest")
    env = dvrl_jax.make_env(run.config, num_envs=4, seed=1, keep_view=True)
    seen = dvrl_jax.watch(run.agent, env, jax.random.PRNGKey(1), steps=160)
    assert seen.valid.all() and 0.4 < seen.observed.mean() < 0.6
    np.testing.assert_array_equal(seen.obs[~seen.observed], 0.0)
    assert np.abs(seen.obs - 10 * seen.view)[seen.observed].mean() < 5
    np.testing.assert_array_equal(np.flatnonzero(seen.is_first.all(axis=1)), [0, 75, 150])
    np.testing.assert_array_equal(seen.is_first[1:], seen.game_over[:-1])
    agent = run.agent
    for t in (0, 74, 100):
        belief = agent.restart(jax.tree.map(lambda x, t=t: x[t], seen.belief), seen.is_first[t + 1])
        action = np.where(seen.is_first[t + 1][:, None], 0.0, seen.action[t])
        reward = np.where(seen.is_first[t + 1], 0.0, seen.reward[t])
        timestep = Timestep(seen.obs[t + 1], action, reward, seen.is_first[t + 1])
        belief, _ = agent.update(belief, timestep, ())
        policy, value = agent.heads(belief)
        for computed, kept in ((belief.h, seen.belief.h), (value, seen.value), (policy.loc, seen.policy)):
            np.testing.assert_allclose(computed, kept[t + 1], rtol=1e-4, atol=1e-6)


def test_a_run_is_read_with_its_particles(tmp_path):
    train(tmp_path / "run", tiny_hike("dvrl", model__batch_norm=True), total_env_steps=40)
    run = dvrl_jax.load_run(tmp_path / "run", checkpoint=2)
    assert run.update == 2 and run.config.model.num_particles == 3 and run.agent.use_running_average
    program = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(), re.M | re.S)[-1]
    names = {"dvrl_jax": dvrl_jax}
    exec(program.replace("saved_runs/3", str(tmp_path / "run")), names)
    belief = names["seen"].belief
    assert belief.h.shape == (75, 100, 3, 8) and belief.log_weight.shape == (75, 100, 3)
    env = dvrl_jax.make_env(run.config, num_envs=4)
    ancestors = dvrl_jax.watch(
        run.agent, env, jax.random.PRNGKey(1), 3, lambda agent, turn, key: turn.start.trace.ancestors
    )
    assert ancestors.shape == (3, 4, 3) and ancestors.max() <= 2
    with pytest.raises(ValueError, match="steps = 0: must be at least 1"):
        dvrl_jax.watch(run.agent, env, jax.random.PRNGKey(1), steps=0)
    with pytest.raises(RunError, match="holds no run"):
        dvrl_jax.load_run(tmp_path)
    with pytest.raises(RunError, match=r"no checkpoint '7'; there are: 2"):
        dvrl_jax.load_run(tmp_path / "run", checkpoint=7)


def test_a_line_of_history_is_the_mean_of_its_updates_alone():
    config = dvrl_jax.make_config("mountain_hike_rnn", **SMALL)
    every = dvrl_jax.make_config("mountain_hike_rnn", **SMALL | {"log__interval": 1})
    (_, lines), (_, each) = (
        dvrl_jax.make_train(c, dvrl_jax.make_env(c))(seed=3, num_updates=4) for c in (config, every)
    )
    for place, line in enumerate(lines):
        two = each[2 * place : 2 * place + 2]
        assert line["loss.total"] == pytest.approx(np.mean([one["loss.total"] for one in two]), rel=1e-5)
    assert len(lines) == 2


def test_training_that_diverges_stops_and_says_why():
    broken = {"optimizer__learning_rate": 1e38, "max_skipped_updates": 5}
    config = dvrl_jax.make_config("mountain_hike_rnn", **SMALL, **broken)
    train = dvrl_jax.make_train(config, dvrl_jax.make_env(config))
    with pytest.raises(RunError, match=r"^stopped at update 5 .* in 5 updates in a row .* were NaN or inf$") as stopped:
        train(num_updates=50)
    assert int(stopped.value.state.update) == 5 and len(stopped.value.history) == 2


def test_training_that_is_interrupted_can_go_on(monkeypatch):
    config = dvrl_jax.make_config("mountain_hike_rnn", **SMALL)
    train = dvrl_jax.make_train(config, dvrl_jax.make_env(config))
    start, _ = train(num_updates=2)

    def interrupt(state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopped:
        patch.setattr("dvrl_jax.statistics.EpisodeStatistics.summary", interrupt)
        train(num_updates=10, state=start)
    assert int(stopped.value.state.update) == 3  # The first call is of one update.
    state, history = train(num_updates=2, state=stopped.value.state)
    assert int(state.update) == 5 and [line["update"] for line in history] == [4]


def test_a_number_of_updates_is_whole():
    config = dvrl_jax.make_config("mountain_hike_rnn", **SMALL)
    with pytest.raises(TypeError, match="float"):
        dvrl_jax.make_train(config, dvrl_jax.make_env(config))(num_updates=2.5)


def test_the_notebook_runs(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("DVRL_JAX_TINY", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(ROOT / "examples" / "mountain_hike.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("mean distance to the true position" in output.get("text", "") for output in outputs)


def test_the_stored_notebook_shows_its_figures_and_nothing_of_where_it_ran():
    path = ROOT / "examples" / "mountain_hike.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert path.stat().st_size < 400_000
    for output in outputs:
        text = json.dumps({"text": output.get("text"), "plain": output.get("data", {}).get("text/plain")})
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        assert not re.search(r"/\w+/|\b0x[0-9a-f]+", text), text  # Paths and addresses.
