"""Several seeds in one program: each one's run is the run that it has alone."""

import shutil

import jax
import numpy as np
import pytest

import dvrl_jax
from dvrl_jax import seeds
from dvrl_jax.choices import Choices
from dvrl_jax.envs import make_env
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import checkpoints, run_directory, training
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import evaluation
from tests import tiny
from tests.tiny import tiny_hike, tiny_pong

UPDATES = 6
PER_UPDATE = tiny.HIKE_STEPS_PER_UPDATE


def checked(config, **fields):
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return config_lib.from_fields(config_lib.flatten(config) | fields)


def hike(**fields):
    config = tiny_hike("rnn", log__interval=2, checkpoint__interval=2)
    return checked(config, **{"total_env_steps": UPDATES * PER_UPDATE} | fields)


def train(path, config):
    run = run_directory.RunDirectory(path)
    try:
        return training.train(run, config, use_cache=False)
    finally:
        run.close()


def metrics(path):
    """The log lines, without what depends on the clock."""
    clock = ("wall_time", "obs.fps")
    return [{k: v for k, v in line.items() if k not in clock} for line in run_directory.read_metrics(path)]


def assert_alike(lines, expected):
    assert [sorted(line) for line in lines] == [sorted(line) for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in line:
            np.testing.assert_allclose(
                *(np.float64(np.nan if x[name] is None else x[name]) for x in (line, other)), rtol=1e-5, err_msg=name
            )


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run of the seeds 4, 5 and 6."""
    path = tmp_path_factory.mktemp("runs") / "three"
    train(path, hike(seed=4, num_seeds=3))
    return path


def test_each_seed_is_the_run_that_it_is_alone(three, tmp_path):
    train(tmp_path, hike(seed=5))
    assert_alike(metrics(three / "seed5"), metrics(tmp_path))
    ours, alone = (dvrl_jax.load_run(path, "latest") for path in (three / "seed5", tmp_path))
    assert config_lib.flatten(ours.config) == config_lib.flatten(alone.config)
    for a, b in zip(*(jax.tree.leaves(jax.tree.map(np.asarray, run.agent)) for run in (ours, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_its_lines_are_means_and_standard_errors_of_the_seeds(three):
    of_seeds = [metrics(path) for path in config_lib.seed_directories(three)]
    assert len(of_seeds) == 3
    for line, *each in zip(metrics(three), *of_seeds, strict=True):
        values = [x["loss.total"] for x in each]
        assert line["update"] == each[0]["update"] and line["num_seeds"] == 3
        assert line["loss.total"] == pytest.approx(np.mean(values))
        assert line["loss.total.standard_error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    with pytest.raises(RunError, match=r"holds several seeds; name one of them, such as .*seed4"):
        evaluation.read_run_config(three)


def test_it_resumes_from_the_newest_update_that_all_seeds_have(three, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(three, path)
    before = {seed: metrics(path / f"seed{seed}") for seed in (4, 5, 6)}
    shutil.rmtree(path / "seed6" / "checkpoints" / str(UPDATES))
    train(path, hike(seed=4, num_seeds=3))
    assert f"resuming from update {UPDATES - 2}" in capsys.readouterr().out
    assert {seed: metrics(path / f"seed{seed}") for seed in (4, 5, 6)} == before
    for name in ("config.json", "metrics.jsonl"):
        (path / name).unlink()
    with pytest.raises(RunError, match=r"seed4: holds a run of its own"):
        train(path, hike(seed=4, num_seeds=3))
    assert {seed: metrics(path / f"seed{seed}") for seed in (4, 5, 6)} == before
    shutil.copy(three / "config.json", path)
    with pytest.raises(ConfigError, match="num_seeds = 2: contradicts the run"):
        training.prepare(path, hike(seed=4, num_seeds=2), {"num_seeds": 2})


def test_a_seed_that_diverges_stops_alone(three, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(three, path)
    # Weights of one seed that are NaN: every update from here on is skipped.
    config = hike(seed=4, num_seeds=3, total_env_steps=2 * UPDATES * PER_UPDATE, max_skipped_updates=2)
    learner = make_learner(config, make_env(config.env, config.num_envs, 0))
    template = learner.init(jax.random.PRNGKey(0))
    saver = checkpoints.Checkpoints(path / "seed5" / "checkpoints", keep=3)
    state = saver.restore(template).state
    shutil.rmtree(path / "seed5" / "checkpoints" / str(UPDATES))
    saver._manager.reload()
    saver.save(state._replace(params=jax.tree.map(lambda x: x * np.nan, state.params)), True, None, {"wall_time": 0.0})
    saver.close()
    train(path, config)
    said = f"stopped at update {UPDATES + 2}"
    assert f"seed 5: {said}" in capsys.readouterr().out
    assert said in (path / "seed5" / "stopped.txt").read_text()
    assert metrics(path / "seed5")[-1]["update"] == UPDATES + 2
    assert metrics(path / "seed6")[-1]["update"] == 2 * UPDATES
    last = metrics(path)[-1]
    assert last["update"] == 2 * UPDATES and last["num_seeds"] == 2
    # It stays stopped.
    train(path, checked(config, total_env_steps=3 * UPDATES * PER_UPDATE))
    assert metrics(path / "seed6")[-1]["update"] == 3 * UPDATES
    assert metrics(path / "seed5")[-1]["update"] == UPDATES + 2


def test_the_games_of_a_seed_are_those_that_it_has_alone():
    config = tiny_pong("rnn")
    alone = []
    for seed in (3, 8):
        learner = make_learner(config, make_env(config.env, config.num_envs, seed))
        alone.append(jax.jit(learner.run)(learner.init(jax.random.PRNGKey(0)), 3))
    for use in (Choices(), Choices().for_seeds()):  # One after the other, and side by side.
        envs = make_env(config.env, config.num_envs, [3, 8])
        learner = make_learner(config, envs, use)
        with use.in_use():
            states = seeds.stack([learner.init(jax.random.PRNGKey(0), envs.of_seed(place)) for place in range(2)])
            states = jax.jit(seeds.run(learner, 2))(states, states.update + 3)
        for place, expected in enumerate(alone):
            state = seeds.member(states, place)
            np.testing.assert_array_equal(state.actor.env.obs, expected.actor.env.obs)
            for a, b in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
