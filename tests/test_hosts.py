"""Several processes that train one run: as one does, stopped in order, and ended when one of them is killed."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from dvrl_jax import devices
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import hosts, run_directory, training
from tests.tiny import tiny_hike, train

FIELDS = {"num_envs": 2, "bptt_segments": 2, "model__channels": (4, 4), "model__h_dim": 4}
FIELDS |= {"log__interval": 1, "checkpoint__interval": 3, "log__tensorboard": False, "total_env_steps": 1_000_000}
STEPS_PER_UPDATE = 4
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def train_twice(workdir):
    """Of one process: trains until a signal has stopped it, and then once more."""
    with hosts.joined(distributed=False):
        with contextlib.suppress(training.Interrupted):
            train(workdir, tiny_hike("rnn", **FIELDS))
        print("once more", flush=True)
        train(workdir, None)


def lines(workdir):
    return run_directory.read_metrics(workdir) if run_directory.has_metrics(workdir) else []


def wait_for_update(workdir, update, process):
    deadline = time.monotonic() + 300
    while not lines(workdir) or lines(workdir)[-1]["update"] < update:
        assert process.poll() is None and time.monotonic() < deadline, "\n".join(process.communicate())
        time.sleep(0.05)


def test_two_processes_train_as_one_and_end_together(start, tmp_path):
    """A signal to one of them stops both; they resume; one is killed, the other leaves; one resumes."""
    run = tmp_path / "run"
    both = start([sys.executable, "-m", "tests.test_hosts", str(run)], **PIPES)
    wait_for_update(run, 4, both)
    second = int(Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()[1])
    os.kill(second, signal.SIGTERM)
    said = list(itertools.takewhile(lambda line: line != "once more\n", both.stdout))
    stopped_at = int(re.fullmatch(r"stopped by SIGTERM; checkpoint at update (\d+)\n", said[-1])[1])
    assert "2 processes with 1 device(s) each\n" in said and sum("parameters" in line for line in said) == 1
    assert lines(run)[-1]["update"] == stopped_at

    wait_for_update(run, stopped_at + 4, both)
    os.kill(second, signal.SIGKILL)
    _, errors = both.communicate(timeout=60)
    assert both.returncode == hosts.LOST
    name = f"process 1 of 2, on {socket.gethostname()},"
    assert f"error: {name} has ended, and with it the run; the same command, on as many processes" in errors

    updates = lines(run)[-1]["update"] + 2
    for workdir in (run, tmp_path / "alone"):
        train(workdir, tiny_hike("rnn", **FIELDS), total_env_steps=updates * STEPS_PER_UPDATE)
    found, expected = lines(run), lines(tmp_path / "alone")
    assert [line["update"] for line in found] == list(range(1, updates + 1))
    for line, alone in zip(found, expected, strict=True):
        for metric in alone.keys() - {"wall_time", "obs.fps"}:
            close = alone[metric] and pytest.approx(alone[metric], rel=1e-3, abs=1e-3)
            assert line[metric] == close, metric


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_envs": 3}, "num_envs = 3: must be a multiple of 2, the devices of all processes"),
        ({"num_seeds": 2}, "num_seeds = 2: must be 1 with several processes"),
    ],
)
def test_what_cannot_be_divided_is_refused(fields, message, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        devices.check(tiny_hike("rnn", **fields))


if __name__ == "__main__":
    if hosts.is_one_of_several(distributed=False):
        train_twice(Path(sys.argv[1]))
    else:
        sys.exit(hosts.launch(2))
