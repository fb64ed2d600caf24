"""SIGINT, SIGTERM and SIGHUP: a checkpoint, the documented exit code, and soon."""

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dvrl_jax.runs import loop, process, reporting, run_directory, training
from tests.tiny import tiny_hike, train

ROOT = Path(__file__).parent.parent.parent
SMALL = ["num_envs=4", "model.channels=(8,8)", "model.h_dim=8", "model.action_encoding=4", "log.interval=10"]
BEYOND_THE_RUNNING_CHUNK = 10  # Seconds in which a checkpoint must be written and the process gone.


@pytest.fixture
def training_in(start):
    """Starts to train in a directory."""

    def training_in(workdir, *fields):
        return start(command(workdir, *fields), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return training_in


def command(workdir, *fields):
    settings = [f"--config.{field}" for field in (*SMALL, *fields)]
    return [sys.executable, "train.py", "--config=configs/mountain_hike_rnn.py", f"--workdir={workdir}", *settings]


def wait_for(process, happened):
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_leaves_soon(training_in, tmp_path, number, code):
    process = training_in(tmp_path)
    wait_for(process, lambda: (tmp_path / "metrics.jsonl").exists() and len(run_directory.read_metrics(tmp_path)) >= 3)
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=600)
    elapsed = time.monotonic() - began
    assert process.returncode == code
    assert "Traceback" not in errors and f"stopped by {number.name}; checkpoint at update" in output
    update = int(output.rsplit("update ", 1)[1].split()[0].replace(",", ""))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(update)]
    assert update >= run_directory.read_metrics(tmp_path)[-1]["update"]
    assert elapsed < loop.MAX_CALL_SECONDS + BEYOND_THE_RUNNING_CHUNK


@pytest.mark.parametrize("sign", [".lock", "checkpoints"])  # Before anything is made; before weights and loop are.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_starting_leaves_nothing(training_in, tmp_path, sign, number):
    """Also while XLA compiles, when the main thread answers no signal."""
    run = tmp_path / "new" / "run"
    process = training_in(run)
    wait_for(process, lambda: (run / sign).exists())
    time.sleep(0.3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    assert process.returncode == 128 + number and "checkpoint at update" not in output
    said = f"stopped by {number.name} before the first update: nothing was saved, and {run} was removed\n"
    assert errors == said and not (tmp_path / "new").exists()


def test_a_probe_that_is_still_being_written_goes_too(tmp_path, monkeypatch):
    run = run_directory.RunDirectory(tmp_path / "run")
    probe = tmp_path / "run" / "checkpoints" / f"{run_directory.PROBE}.orbax-checkpoint-tmp"
    probe.mkdir(parents=True)
    remove = shutil.rmtree

    def remove_late(path, ignore_errors):
        monkeypatch.setattr(shutil, "rmtree", remove)  # The first time another thread has put something back.

    monkeypatch.setattr(shutil, "rmtree", remove_late)
    assert run.discard().endswith("run was removed") and not (tmp_path / "run").exists()
    run.close()


def test_what_others_have_put_into_a_new_run_stays(tmp_path):
    run = run_directory.RunDirectory(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").touch()
    assert run.discard() == "before the first update: nothing was saved"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    run.write_config("{}")
    assert run.discard() == f"before the first update: the run in {tmp_path / 'run'} is as it was"
    assert (tmp_path / "run" / "config.json").exists()
    run.close()


def test_a_signal_before_the_first_update_changes_nothing(tmp_path, monkeypatch):
    """The signal comes when a resumed run has compiled: its checkpoint is there already and stays as it is."""
    config = tiny_hike("rnn")

    train(tmp_path, config, total_env_steps=200)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    say = reporting.Progress.say

    def interrupt(self, text):
        say(self, text)
        if "compiled in" in text:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reporting.Progress, "say", interrupt)
    with pytest.raises(training.Interrupted) as stop:
        train(tmp_path, config, total_env_steps=400)
    assert stop.value.signum == signal.SIGTERM
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    assert int(train(tmp_path, config, total_env_steps=400).update) == 20


@pytest.mark.parametrize("stdout", ["| true", ">&-"])
def test_training_needs_no_reader_at_all(stdout, tmp_path):
    training = shlex.join(command(tmp_path / "run", "total_env_steps=2000"))
    shell = ["bash", "-c", f"set -o pipefail; {training} {stdout}"]
    result = subprocess.run(shell, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=600)
    assert result.returncode == 0 and result.stderr == ""
    assert run_directory.read_metrics(tmp_path / "run")[-1]["env_steps"] == 2000


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid to give a process a terminal of its own")
def test_a_closed_terminal_saves_a_checkpoint(start, tmp_path):
    """A real one: the kernel sends SIGHUP, and what is written to the terminal fails from then on."""
    master, terminal = os.openpty()
    process = start(["setsid", "--ctty", *command(tmp_path)], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    deadline = time.monotonic() + 300
    while not ((tmp_path / "metrics.jsonl").exists() and len(run_directory.read_metrics(tmp_path)) >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        if select.select([master], [], [], 0.05)[0]:
            os.read(master, 1024)  # Else it would fill.
    os.close(master)
    assert process.wait(timeout=60) == 129
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert int(checkpoint.name) >= run_directory.read_metrics(tmp_path)[-1]["update"]


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process.answering(lambda *_: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
