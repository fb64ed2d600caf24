"""Runs that stop and go on: bit for bit on Mountain Hike, with new episodes on Atari."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dvrl_jax import envs
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import loop, run_directory, training
from dvrl_jax.viewing import evaluation
from tests.tiny import HIKE_STEPS_PER_UPDATE as STEPS_PER_UPDATE
from tests.tiny import checkpoint_arrays, tiny_hike, train, untimed

ROOT = Path(__file__).parent.parent


WRAPPED = {"env__p_blank": 0.5, "env__p_repeat": 0.3, "env__obs_delay": 2, "env__noise_components": 1}
WRAPPED |= {"model__reward_input": True}


@pytest.mark.parametrize(("algorithm", "fields"), [("rnn", WRAPPED), ("dvrl", {})])
def test_stopping_and_resuming_changes_nothing(tmp_path, algorithm, fields):
    """N + N steps equal 2N: weights, optimiser, belief, window, counters and metrics; N falls between log lines."""
    config, half = tiny_hike(algorithm, **fields), 33 * STEPS_PER_UPDATE
    train(tmp_path / "straight", config, total_env_steps=2 * half)
    train(tmp_path / "parts", config, total_env_steps=half)
    assert run_directory.read_metrics(tmp_path / "parts")[-1]["update"] == 33
    train(tmp_path / "parts", config, total_env_steps=2 * half)
    straight, parts = checkpoint_arrays(tmp_path / "straight"), checkpoint_arrays(tmp_path / "parts")
    assert straight.keys() == parts.keys()
    assert any(name.startswith("actor.belief.h") for name in parts)
    assert any(name.startswith("window.segments") for name in parts)
    for name, array in straight.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    lines = untimed(run_directory.read_metrics(tmp_path / "parts"))
    assert lines == untimed(run_directory.read_metrics(tmp_path / "straight"))
    assert [line["update"] for line in lines] == [10, 20, 30, 40, 50, 60, 66]


@pytest.mark.parametrize(("minutes", "saved"), [(1e-9, ["1", "3", "7", "10", "20"]), (0.0, ["20"]), (30.0, ["20"])])
def test_time_alone_makes_checkpoints_too(tmp_path, minutes, saved, monkeypatch):
    """After every call of the program that ends later than so many minutes after the last checkpoint."""
    monkeypatch.setattr(loop, "MAX_CALL_SECONDS", 1e9)  # Calls double in length up to the next log line.
    config = tiny_hike("rnn", checkpoint__minutes=minutes, checkpoint__keep=100)
    train(tmp_path, config, total_env_steps=20 * STEPS_PER_UPDATE)
    assert sorted((path.name for path in (tmp_path / "checkpoints").iterdir()), key=int) == saved


def test_lines_after_the_checkpoint_are_written_once(tmp_path):
    """What was logged after the last checkpoint of a killed run is not logged twice, and a torn line is dropped."""
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=20 * STEPS_PER_UPDATE)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"update": 30, "env_steps": 600}) + "\n" + '{"update": 40, "env_st')
    train(tmp_path, config, total_env_steps=40 * STEPS_PER_UPDATE)
    lines = run_directory.read_metrics(tmp_path)
    assert [line["update"] for line in lines] == [10, 20, 30, 40]
    assert all("loss.total" in line for line in lines)


def test_own_config_is_kept_and_contradictions_are_refused(tmp_path):
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=200, seed=5)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"seed = 6: contradicts .*started with 5"):
        train(tmp_path, config, total_env_steps=400, seed=6)
    with pytest.raises(ConfigError, match="algorithm"):
        train(tmp_path, tiny_hike("dvrl"), total_env_steps=400)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    train(tmp_path, config, total_env_steps=400, log__interval=5, env__first_core=0)
    stored = run_directory.read_config(tmp_path)
    assert (stored["seed"], stored["total_env_steps"], stored["log.interval"]) == (5, 400, 5)
    assert stored["env.first_core"] == 0
    assert [line["update"] for line in run_directory.read_metrics(tmp_path)] == [10, 15, 20]


def test_episodes_after_a_resume_are_others_than_at_the_start():
    seeds = [training._seed_of_episodes(seed, update) for seed in (0, 1) for update in (0, 100, 200)]
    assert seeds[0] == 0 and seeds[3] == 1  # A run's own seed is what a new run begins with.
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_resumed_run_asks_for_other_episodes(tmp_path, monkeypatch):
    """Where the environment cannot be restored, as on Atari, and so everywhere; those under way are not counted on."""
    seeds, make_env = [], envs.make_env
    monkeypatch.setattr(envs, "make_env", lambda *given, **more: seeds.extend(given[2]) or make_env(*given, **more))
    for updates in (10, 20):
        train(tmp_path, tiny_hike("rnn", seed=3), total_env_steps=updates * STEPS_PER_UPDATE)
    assert seeds[0] == 3 and len(set(seeds)) == 2
    walls = [line["wall_time"] for line in run_directory.read_metrics(tmp_path)]
    assert walls == sorted(set(walls)) and len(walls) == 2

    learner = make_learner(tiny_hike("rnn"), make_env(tiny_hike("rnn").env, 10, 0))
    state = learner.init(jax.random.PRNGKey(0))
    under_way = state._replace(episodes=jax.tree.map(lambda x: x + 1, state.episodes))
    begun = learner.restart(under_way, under_way.actor.env).episodes
    forgotten = {"clipped", "length", "true"}
    for name, before in under_way.episodes._asdict().items():
        np.testing.assert_array_equal(getattr(begun, name), 0 * before if name in forgotten else before)


def test_the_same_command_goes_on_though_a_field_follows_from_another(tmp_path):
    config = tiny_hike("dvrl", loss__encoding_coef=0.0)
    for steps in (200, 400):
        state = train(tmp_path, config, total_env_steps=steps, model__resample=True)
    assert int(state.update) == 20 and run_directory.read_config(tmp_path)["model.resample"] is False


def test_a_finished_run_stays_as_it_is(tmp_path, capsys):
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=200)
    before = {path: path.read_bytes() for path in (tmp_path / "metrics.jsonl", tmp_path / "config.json")}
    train(tmp_path, config)
    assert "already finished: 200 steps done, 200 wanted" in capsys.readouterr().out
    train(tmp_path, config, total_env_steps=100)
    assert "already finished: 200 steps done, 100 wanted" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_longer_run_keeps_its_result_until_there_is_a_newer_one(tmp_path, monkeypatch):
    """Stopped while compiling or before its next line, it is still the finished run that it was."""
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=15 * STEPS_PER_UPDATE)
    finished = run_directory.read_metrics(tmp_path)
    assert [(line["update"], line.get("final", False)) for line in finished] == [(10, False), (15, True)]

    def stop(*arguments):
        raise KeyboardInterrupt

    for function in ("_compile", "_Writer._follow"):
        before = (tmp_path / "config.json").read_text()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"dvrl_jax.runs.training.{function}", stop)
            train(tmp_path, config, total_env_steps=35 * STEPS_PER_UPDATE)
        assert run_directory.read_metrics(tmp_path) == finished
        assert ((tmp_path / "config.json").read_text() == before) == (function == "_compile")
    train(tmp_path, config, total_env_steps=15 * STEPS_PER_UPDATE)
    assert run_directory.read_metrics(tmp_path) == finished
    train(tmp_path, config, total_env_steps=35 * STEPS_PER_UPDATE)
    train(tmp_path / "whole", config, total_env_steps=35 * STEPS_PER_UPDATE)
    assert untimed(run_directory.read_metrics(tmp_path)) == untimed(run_directory.read_metrics(tmp_path / "whole"))


def test_a_run_without_its_checkpoints_starts_anew_and_keeps_its_metrics(tmp_path, capsys):
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=200)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "evaluation-10-5games-seed0.json").write_text("{}")
    (tmp_path / "thesis").mkdir()  # Not a run's.
    for number in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints")
        train(tmp_path, config, total_env_steps=200)
        aside = tmp_path / f"before.{number}"
        assert f"training starts anew; what was measured so far is in {aside}\n" in capsys.readouterr().out
        assert [line["update"] for line in run_directory.read_metrics(aside)] == [10]
    before_1 = {path.name for path in (tmp_path / "before.1").iterdir()}
    assert before_1 == {"metrics.jsonl", "tensorboard", "evaluation-10-5games-seed0.json"}
    assert (tmp_path / "before.1" / "metrics.jsonl").read_bytes() == before
    assert [line["update"] for line in run_directory.read_metrics(tmp_path)] == [10]
    names = {".lock", "config.json", "checkpoints", "metrics.jsonl", "tensorboard", "before.1", "before.2", "thesis"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_that_lacks_something_is_refused(tmp_path):
    train(tmp_path, tiny_hike("rnn"), total_env_steps=200)
    metrics, config = tmp_path / "metrics.jsonl", tmp_path / "config.json"
    config.rename(tmp_path / "away.json")
    with pytest.raises(RunError, match=r"has metrics\.jsonl but no config\.json"):
        run_directory.RunDirectory(tmp_path)
    text = metrics.read_bytes()
    metrics.unlink()
    with pytest.raises(RunError, match=r"has checkpoints but no config\.json"):
        run_directory.RunDirectory(tmp_path)
    (tmp_path / "away.json").rename(config)
    (tmp_path / "metrics.jsonl.gz").write_bytes(gzip.compress(text))
    with pytest.raises(RunError, match=r"has metrics\.jsonl\.gz, a run put away"):
        run_directory.RunDirectory(tmp_path)


def test_what_the_configuration_file_has_otherwise_is_said(tmp_path, capsys):
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=200)
    assert "resumes as it began" not in capsys.readouterr().out
    config.loss.gamma = 0.5
    config.log.interval = 20  # This may change, but is not asked for.
    state = train(tmp_path, config, total_env_steps=400)
    output = capsys.readouterr().out
    assert f"{tmp_path} resumes as it began, not as the configuration file says: " in output
    assert "loss.gamma = 0.99 (in the file 0.5)" in output and "log.interval = 10 (in the file 20)" in output
    assert output.count("in the file") == 2
    assert int(state.update) == 20 and run_directory.read_config(tmp_path)["loss.gamma"] == 0.99


def test_a_directory_in_use_is_refused(tmp_path):
    first = run_directory.RunDirectory(tmp_path)
    with pytest.raises(RunError, match="another process"):
        run_directory.RunDirectory(tmp_path)
    first.close()
    run_directory.RunDirectory(tmp_path).close()


def test_a_file_system_without_locks_is_named_as_such(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_directory.fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"cannot be locked \(No locks available\)"):
        run_directory.RunDirectory(tmp_path)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    train(tmp_path, tiny_hike("rnn"), total_env_steps=200)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model.h_dim": 9}))
    with pytest.raises(RunError, match="shape"):
        train(tmp_path, tiny_hike("rnn"), total_env_steps=400)


def pong_command(workdir, *fields):
    small = ["model.channels=(4,4,4)", "model.h_dim=8", "model.action_encoding=4"]
    small += ["num_envs=4", "log.interval=5", *fields]
    command = [sys.executable, "train.py", "--config=configs/pong_rnn.py", f"--workdir={workdir}"]
    return command + [f"--config.{field}" for field in small]


def test_pong_resumes_with_new_episodes_after_sigterm(tmp_path):
    """SIGTERM saves and leaves with 143; counters, optimiser and normalisation continue, beliefs start afresh."""
    process = subprocess.Popen(pong_command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "metrics.jsonl").exists() or len(run_directory.read_metrics(tmp_path)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; checkpoint at update" in output
    saved = checkpoint_arrays(tmp_path)
    assert not any(name.startswith(("actor", "window")) for name in saved)
    assert any(name.startswith("batch_stats") for name in saved)
    update = int(saved["update"])
    before = run_directory.read_metrics(tmp_path)
    command = pong_command(tmp_path, f"total_env_steps={(update + 15) * 20}")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True, timeout=300)
    assert f"resuming from update {update:,}" in result.stdout
    lines = run_directory.read_metrics(tmp_path)
    assert lines[: len(before)] == before
    updates = [line["update"] for line in lines]
    assert updates == sorted(set(updates)) and updates[-1] == update + 15
    assert [u for u in updates if u % 5 == 0] == list(range(5, update + 16, 5))
    final = checkpoint_arrays(tmp_path)
    assert int(final["update"]) == update + 15
    assert int(final["env_steps"]) == int(saved["env_steps"]) + 15 * 20


def test_the_best_checkpoint_is_kept_and_can_be_evaluated(tmp_path):
    """Of many checkpoints, the last ones and the one with the highest result.true stay; evaluation finds it."""
    config = tiny_hike("rnn")
    train(tmp_path, config, total_env_steps=200 * STEPS_PER_UPDATE, checkpoint__interval=20, checkpoint__keep=1)
    results = {line["update"]: line["result.true"] for line in run_directory.read_metrics(tmp_path)}
    saved = {update: result for update, result in results.items() if update % 20 == 0 and result is not None}
    best = max(saved, key=lambda update: (saved[update], update))  # Where no game ended in between, the newest.
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {200, best} and evaluation.newest_checkpoint(tmp_path) == 200
    summary = evaluation.evaluate(tmp_path, 7, greedy=False, checkpoint="best", seed=3)
    assert summary["update"] == best and summary["episodes"] == 7
    assert summary["lengths"] == [75] * 7
    evaluation.store(tmp_path, summary)
    assert json.loads((tmp_path / f"evaluation-{best}-7games-seed3.json").read_text()) == summary
    again = evaluation.evaluate(tmp_path, 7, greedy=False, checkpoint="best", seed=3)
    assert again == summary
    with pytest.raises(RunError, match="there are"):
        evaluation.evaluate(tmp_path, 1, greedy=True, checkpoint="77", seed=0)
