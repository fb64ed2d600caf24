"""The benchmarks measure what they are asked for, and lose nothing of it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import in_turns, throughput
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import config as config_lib
from tests.tiny import HIKE, tiny_hike

ROOT = Path(__file__).parents[1]
SMALL = "mountain_hike_rnn num_envs=3 num_steps=2 bptt_segments=2 model.h_dim=8 model.channels=(8,8)"


def bench(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_a_run_is_a_configuration_with_fields():
    config = in_turns.parse("atari_dvrl:Asteroids num_envs=8 optimizer.learning_rate=1e-3 model.channels=(8,8,8)")
    assert (config.env.name, config.algorithm, config.num_envs) == ("Asteroids", "dvrl", 8)
    assert config.optimizer.learning_rate == 1e-3 and config.model.channels == (8, 8, 8)
    assert in_turns.parse("pong_dvrl env.name=Asteroids").env.name == "Asteroids"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("", "is not the name of a configuration"),
        ("pond_rnn", "there is no configs/pond_rnn.py"),
        ("pong_rnn num_envs", "num_envs: must be field=value"),
        ("pong_rnn num_env=1", "did you mean num_envs"),
        ("pong_rnn num_envs=-1", "num_envs = -1: must be"),
    ],
)
def test_a_run_with_a_mistake_is_refused(run, message):
    with pytest.raises(ConfigError, match=message):
        in_turns.parse(run)


def test_results_are_not_overwritten(tmp_path):
    (tmp_path / "kept.json").write_text("{}")
    for place, message in (("kept.json", "is there already"), ("kept.json/x.json", "cannot be written")):
        with pytest.raises(ConfigError, match=message):
            in_turns.make_places(tmp_path / place)
    assert (tmp_path / "kept.json").read_text() == "{}"


def test_the_table_has_medians_and_every_turn():
    ours = [{"ms": ms, "steps_per_second": 80e3 / ms, "memory_mb": 1234.5, "compile": 10.06} for ms in (10, 40, 20)]
    found = {"pong_rnn": {"ours": ours, "torch": [{"ms": 30}, {"ms": 50}]}, "other": {"torch": [{"ms": 7}]}}
    head, _, *rows = in_turns.as_table(found).splitlines()
    assert head.startswith("| run | ours, ms per update | PyTorch, ms per update | ratio | steps/s |")
    turns = "20.00 (10.00, 40.00, 20.00) | 40.00 (30.00, 50.00)"
    assert rows[0] == f"| pong_rnn | {turns} | 2.00 | 4,000 | 1,234 | 10.1 |"
    assert rows[1] == "| other | - | 7.00 (7.00) | - | - | - | - |"


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    config = config_lib.finalise(tiny_hike("rnn"))
    workers = {
        ("broken", "ours"): in_turns.Worker("ours", config, tmp_path / "broken.txt", train_last=1),
        ("good", "ours"): in_turns.Worker("ours", config, tmp_path / "good.txt", train_first=5),
    }
    out, later = tmp_path / "out.json", time.monotonic() + 600
    assert [worker.hear() for worker in workers.values()] == [None, {"ready": True}]
    found = in_turns.take_turns(workers, 2, 0.0, out, later)
    assert list(found) == ["good"] and len(found["good"]["ours"]) == 2
    assert json.loads(out.read_text()) == found
    assert in_turns.take_turns(workers, 2, 0.0, out, time.monotonic()) == {}  # The time is over.
    workers["good", "ours"].process.kill()
    workers["good", "ours"].process.wait()
    assert in_turns.take_turns(workers, 1, 0.0, out, later) == {}
    assert all(worker.failed for worker in workers.values())
    assert "train_last" in (tmp_path / "broken.txt").read_text()


def test_turns_from_the_command_line(tmp_path):
    out = tmp_path / "turns.json"
    other = SMALL + " num_steps=3"
    done = bench("in_turns", f"--run={SMALL}", f"--run={other}", "--repeats=2", "--seconds=0", f"--out={out}")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {run: {kind: len(turns) for kind, turns in kinds.items()} for run, kinds in found.items()} == {
        SMALL: {"ours": 2},
        other: {"ours": 2},
    }
    for run, steps in ((SMALL, 6), (other, 9)):
        for turn in found[run]["ours"]:
            assert turn["steps_per_second"] == pytest.approx(1e3 * steps / turn["ms"])
    assert done.stdout.splitlines()[-1].startswith(f"| {other} | ")


def test_what_is_not_measured_is_said(tmp_path):
    """No time at all: nothing can be compiled."""
    out = tmp_path / "turns.json"
    done = bench("in_turns", f"--run={SMALL}", "--minutes=0", f"--out={out}")
    assert done.returncode == 1 and "0 of 1 processes ready" in done.stdout
    assert done.stderr == f"error: {SMALL}: ours was not measured; messages are in {tmp_path / 'turns.logs'}\n"


def test_throughput_measures_the_parts_too():
    fields = [f"--config.{name}={value}" for name, value in (HIKE | {"bptt_segments": 2}).items()]
    done = bench("throughput", "--config=configs/mountain_hike_rnn.py", *fields, "--repeats=1", "--seconds=0")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) == {"ours"}
    for part in ("environment", "acting", "learning, newest segment", "optimiser", "learning, earlier segments"):
        assert part in done.stdout


def test_the_peer_is_compared_only_with_what_it_computes():
    throughput.check_peer(config_lib.finalise(tiny_hike("dvrl")))
    config = config_lib.finalise(tiny_hike("dvrl", model__resample=False))
    with pytest.raises(ConfigError, match="resample = False: the PyTorch peer has True only"):
        throughput.check_peer(config)
    with pytest.raises(ConfigError, match="summary = 'mgf': the PyTorch peer has 'gru' only"):
        throughput.check_peer(config_lib.finalise(tiny_hike("dvrl", model__summary="mgf")))
    lru = tiny_hike("rnn")
    lru.algorithm = "lru"
    with pytest.raises(ConfigError, match="algorithm = 'lru': the PyTorch peer has 'dvrl' and 'rnn' only"):
        throughput.check_peer(config_lib.finalise(lru))
