"""Damaged, missing, unwritable files: a clear error or the checkpoint before, said aloud, and nothing destroyed.

Tests may run as root, whom permission bits do not bind: unreadable is a directory in place of the file.
"""

import ast
import contextlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dvrl_jax import envs
from dvrl_jax.errors import RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import checkpoints, run_directory, training
from dvrl_jax.viewing import evaluation
from tests import tiny

PACKAGE = Path(checkpoints.__file__).parent
UPDATES, STEPS_PER_UPDATE = (20, 40, 60), tiny.HIKE_STEPS_PER_UPDATE


def train(workdir, **overrides):
    return tiny.train(workdir, tiny.tiny_hike("rnn", checkpoint__interval=20), **overrides)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with checkpoints of updates 20, 40 and 60."""
    path = tmp_path_factory.mktemp("original")
    train(path, total_env_steps=UPDATES[-1] * STEPS_PER_UPDATE)
    return path


@pytest.fixture(scope="module")
def template():
    config = tiny.tiny_hike("rnn")
    return make_learner(config, envs.make_env(config.env, config.num_envs, 0)).init(jax.random.PRNGKey(0))


@pytest.fixture
def run(original, tmp_path):
    """A copy of the run, to be damaged."""
    return shutil.copytree(original, tmp_path / "run")


def restore(run, template):
    with contextlib.closing(checkpoints.Checkpoints(run / "checkpoints", keep=3)) as saver:
        return saver.restore(template)


def equal(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


@pytest.fixture(scope="module")
def states(original, template, tmp_path_factory):
    """The states saved at updates 40 and 60."""
    path = shutil.copytree(original, tmp_path_factory.mktemp("states") / "run")
    newest = restore(path, template).state
    shutil.rmtree(path / "checkpoints" / "60")
    states = {40: restore(path, template).state, 60: newest}
    assert {int(state.update) for state in states.values()} == states.keys() and not equal(states[40], states[60])
    return states


def content(path):
    """Every file under a directory with its bytes; None for directories."""
    return {p.relative_to(path): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def spoil(path, kind):
    data = path.read_bytes()
    path.unlink()
    if kind == "noise":
        path.write_bytes(random.Random(0).randbytes(len(data) or 8))
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "unreadable":
        path.mkdir()


# --- Damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deleted", "noise", "truncated", "unreadable"])
def test_every_file_of_a_checkpoint_spoilt(original, template, states, kind, tmp_path, capsys):
    """Spoiling any file either does not matter, or the previous checkpoint is used and the damaged one kept."""
    files = [path.relative_to(original) for path in sorted((original / "checkpoints" / "60").rglob("*"))]
    files = [path for path in files if (original / path).is_file()]
    fell_back = set()
    for number, file in enumerate(files):
        run = shutil.copytree(original, tmp_path / str(number))
        spoil(run / file, kind)
        before = content(run / "checkpoints" / "60")
        state, output = restore(run, template).state, capsys.readouterr().out
        update = int(state.update)
        assert equal(state, states[update]), file
        names = {path.name for path in (run / "checkpoints").iterdir()}
        if update == 60:
            assert output == "" and names == {"20", "40", "60"}
            continue
        fell_back.add(file.parts[2])
        assert "checkpoint 60 is damaged" in output and output.count("\n") == 1
        assert names == {"20", "40", "60.damaged"} and content(run / "checkpoints" / "60.damaged") == before
    assert {"state", "extra"} <= fell_back and len(files) > 10  # How many arrays share a file varies.
    assert kind == "deleted" or "metrics" in fell_back


def test_no_single_wrong_bit_goes_unnoticed(original, template, states, tmp_path):
    """Wherever a bit is flipped, what is restored is exactly what was saved, at that update or the one before."""
    rng = random.Random(1)
    files = [path for path in sorted((original / "checkpoints" / "60").rglob("*")) if path.is_file()]
    files = [path.relative_to(original) for path in files if path.stat().st_size]
    updates = []
    for number in range(60):
        run = shutil.copytree(original, tmp_path / str(number))
        path = run / rng.choice(files)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        restored = restore(run, template)
        updates.append(int(restored.state.update))
        assert equal(restored.state, states[updates[-1]]), path
    assert set(updates) == {40, 60}


def test_arrays_that_are_readable_but_not_what_was_saved(run, template, states, capsys):
    """The arrays of another checkpoint in place of this one's: only the checksums tell."""
    shutil.rmtree(run / "checkpoints" / "60" / "state")
    shutil.copytree(run / "checkpoints" / "20" / "state", run / "checkpoints" / "60" / "state")
    assert equal(restore(run, template).state, states[40])
    assert "is not what was written" in capsys.readouterr().out


def test_training_goes_on_from_the_previous_checkpoint_to_the_same_end(run, original, capsys):
    spoil(run / "checkpoints" / "60" / "state" / "manifest.ocdbt", "noise")
    before = content(run / "checkpoints" / "60")
    end = 70 * STEPS_PER_UPDATE
    state = train(run, total_env_steps=end)
    output = capsys.readouterr().out
    assert "checkpoint 60 is damaged" in output and "resuming from update 40" in output
    intact = shutil.copytree(original, run.parent / "intact")
    assert equal(state, train(intact, total_env_steps=end))
    assert content(run / "checkpoints" / "60.damaged") == before
    assert {"50", "60", "70"} & {path.name for path in (run / "checkpoints").iterdir()} == {"60", "70"}
    assert [line["update"] for line in run_directory.read_metrics(run)] == list(range(10, 71, 10))


def test_without_any_intact_checkpoint_nothing_is_touched(run, template):
    for update in UPDATES:
        spoil(run / "checkpoints" / str(update) / "state" / "_METADATA", "truncated")
    before = content(run)
    for _ in range(2):
        with pytest.raises(RunError, match=r"no intact checkpoint .*60: .*40: .*20: .*another directory"):
            train(run, total_env_steps=2000)
    assert content(run) == before
    # Nor is training begun anew where all that is left was set aside.
    for update in UPDATES:
        (run / "checkpoints" / str(update)).rename(run / "checkpoints" / f"{update}.damaged")
    with pytest.raises(RunError, match=r"no intact checkpoint .*20\.damaged; 40\.damaged"):
        restore(run, template)


def test_evaluation_names_a_damaged_checkpoint_and_leaves_it(run):
    spoil(run / "checkpoints" / "60" / "state" / "_METADATA", "noise")
    before = content(run)
    with pytest.raises(RunError, match=r"checkpoints/60: is damaged \(.*other checkpoints: 20, 40"):
        evaluation.evaluate(run, 1, greedy=True, checkpoint="latest", seed=0)
    spoil(run / "checkpoints" / "40" / "metrics" / "metrics", "noise")
    with pytest.raises(RunError, match=r"40/metrics/metrics: is damaged"):
        evaluation.evaluate(run, 1, greedy=True, checkpoint="20", seed=0)
    assert content(run).keys() == before.keys()


def test_a_checkpoint_with_a_damaged_result_is_set_aside_once(run, template, capsys):
    spoil(run / "checkpoints" / "60" / "metrics" / "metrics", "noise")
    for _ in range(3):
        assert int(restore(run, template).state.update) == 40
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"20", "40", "60.damaged"}
    assert capsys.readouterr().out.count("is damaged") == 1
    found = evaluation.evaluate(run, 1, greedy=True, checkpoint="latest", seed=0)
    assert found["update"] == 40


def test_evaluation_takes_the_checkpoint_that_replaced_the_one_it_was_about_to_read(run, monkeypatch):
    """Training, which keeps one checkpoint, may remove it between the look for it and the reading."""
    restore_weights, asked = checkpoints.Checkpoints.restore_weights, []

    def after_training_moved_on(self, step, *args):
        asked.append(step)
        if step == 40:
            (run / "checkpoints" / "60.away").rename(run / "checkpoints" / "60")
            shutil.rmtree(run / "checkpoints" / "40")
        return restore_weights(self, step, *args)

    (run / "checkpoints" / "60").rename(run / "checkpoints" / "60.away")
    monkeypatch.setattr(checkpoints.Checkpoints, "restore_weights", after_training_moved_on)
    found = evaluation.evaluate(run, 1, greedy=True, checkpoint="latest", seed=0)
    assert asked == [40, 60] and found["update"] == 60


@pytest.mark.parametrize("version", [1, checkpoints.FORMAT + 1, "two"])
def test_another_format_is_refused(run, template, version):
    path = run / "checkpoints" / "60" / "extra" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": version}))
    before = content(run)
    expected = f"checkpoints/60: unknown checkpoint format {version!r}; .* reads 2 to {checkpoints.FORMAT}"
    with pytest.raises(RunError, match=expected):
        restore(run, template)
    assert content(run) == before


@pytest.mark.parametrize("version", range(2, checkpoints.FORMAT))
def test_of_older_formats_all_but_the_episodes_is_read(run, template, states, version):
    path = run / "checkpoints" / "60" / "extra" / "metadata"
    extra = json.loads(path.read_text()) | {"format": version}
    del extra["checksum"]
    path.write_text(json.dumps(extra | {"checksum": checkpoints._checksum(extra)}))
    restored = restore(run, template)
    assert not restored.has_episodes
    assert equal(restored.state.params, states[60].params) and equal(restored.state.opt_state, states[60].opt_state)
    assert equal(restored.state.window, template.window) and equal(restored.state.actor, template.actor)
    assert not equal(states[60].window, template.window)


def test_a_checkpoint_of_another_network_is_refused(run, template):
    config = tiny.tiny_hike("rnn", model__h_dim=9)
    other = make_learner(config, envs.make_env(config.env, config.num_envs, 0)).init(jax.random.PRNGKey(0))
    before = content(run)
    with pytest.raises(RunError, match=r"checkpoints/60: \S+ has shape \(.*\), this configuration needs \("):
        restore(run, other)
    assert content(run) == before


# --- Disks that are full or read-only --------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own; its second value remounts it with other options."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)
    subprocess.run(["umount", "-l", path], check=True)


def fill(path):
    """Writes until nothing more fits."""
    with pytest.raises(OSError, match="No space"), open(path, "wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        file.write(b"x")


def test_a_full_disk_keeps_the_last_checkpoint(original, template, states, disk):
    run = shutil.copytree(original, disk[0] / "run")
    with contextlib.closing(checkpoints.Checkpoints(run / "checkpoints", keep=1)) as saver:
        fill(disk[0] / "filler")
        state = states[60]._replace(update=states[60].update + 20)
        with pytest.raises(RunError) as error:
            saver.save(state, True, 0.0, {})
            saver.wait()
        assert "could not be written" in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith(f"the last good checkpoint is {run / 'checkpoints' / '60'}")
    directory = run_directory.RunDirectory(run)
    for write in (
        lambda: directory.append_metrics({"update": 70, "text": "x" * 10_000}),
        lambda: directory.rewind_metrics(60),
        lambda: directory.write_config("x" * 10_000),
    ):
        with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"):
            write()
    directory.close()
    (disk[0] / "filler").unlink()
    assert equal(restore(run, template).state, states[60])
    assert [line["update"] for line in run_directory.read_metrics(run)] == [10, 20, 30, 40, 50, 60]
    assert run_directory.read_config(run) == run_directory.read_config(original)


FILE_SIZE_LIMIT = """
import contextlib, resource, sys
from typing import Any, NamedTuple
import numpy as np
from dvrl_jax.errors import RunError
from dvrl_jax.runs import checkpoints

class State(NamedTuple):
    update: Any
    params: Any

with contextlib.closing(checkpoints.Checkpoints(sys.argv[1], keep=1)) as saver:
    state = State(np.int32(1), np.random.default_rng(0).normal(size=100_000))
    saver.save(state, True, 0.0, {})
    saver.wait()
    saver.try_out()
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
    try:
        saver.try_out()
    except RunError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        saver.save(state._replace(update=np.int32(2)), True, 0.0, {})
        saver.wait()
    except RunError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with contextlib.closing(checkpoints.Checkpoints(sys.argv[1], keep=1)) as saver:
    print(saver.restore(state).state.params.shape, saver.latest)
"""


def test_a_checkpoint_larger_than_allowed_keeps_the_last_one(tmp_path):
    """The same where no file system can be mounted: the kernel refuses to write beyond a limit."""
    command = [sys.executable, "-c", FILE_SIZE_LIMIT, tmp_path / "checkpoints"]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    before_training, error, restored = result.stdout.strip().splitlines()
    assert "could not be written" in before_training and not (tmp_path / "checkpoints" / "probe").exists()
    assert "could not be written" in error and error.endswith(f"{tmp_path}/checkpoints/1")
    assert restored == "(100000,) 1"


def test_what_is_no_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    reason = "it is a file, or a link that leads nowhere"
    for name in ("file", "link"):
        with pytest.raises(RunError, match=rf"{name}: cannot write there \({reason}\)"):
            run_directory.RunDirectory(tmp_path / name)
        with pytest.raises(RunError, match=rf"{name}: cannot be written \({reason}\)"):
            run_directory.next_directory(tmp_path / name)


def test_what_would_fail_when_saving_fails_before_training(tmp_path, states, monkeypatch):
    with pytest.raises(RunError, match=r"cannot be written in this locale's encoding: set LC_ALL=C.UTF-8"):
        checkpoints.Checkpoints(tmp_path / "l\udcc3\udca4uft", keep=1)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=1)) as saver:
        saver.check_space(states[60], with_episodes=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9000, 8999, 1000))
        with pytest.raises(RunError, match=r"a checkpoint takes up to [\d.]+ MB, and the disk has 0.0 MB left"):
            saver.check_space(states[60], with_episodes=True)
        other = np.ones(3, np.float32)
        monkeypatch.setattr(saver.__class__, "_read", lambda self, step, **item: {"probe": other})
        monkeypatch.setattr(saver.__class__, "_read_extra", lambda self, step: {"arrays": {"probe": WRITTEN}})
        with pytest.raises(RunError, match=r"cannot be read back \(probe: is not what was written\)"):
            saver.try_out()
    assert list(tmp_path.iterdir()) == []


WRITTEN = {"dtype": "float32", "shape": [3], "crc32": 0}


def test_a_read_only_directory(original, disk):
    run, remount = shutil.copytree(original, disk[0] / "run"), disk[1]
    before = content(run)
    remount("ro")
    with pytest.raises(RunError, match=r"run: cannot write there \(Read-only file system\)"):
        train(run, total_env_steps=2000)
    with pytest.raises(RunError, match=r"new: cannot write there \(Read-only file system\)"):
        train(disk[0] / "new", total_env_steps=2000)
    with pytest.raises(RunError, match=r"saved_runs: cannot be written \(Read-only file system\)"):
        run_directory.next_directory(disk[0] / "saved_runs")
    found = evaluation.evaluate(run, 1, greedy=True, checkpoint="latest", seed=0)
    with pytest.raises(RunError, match=r"evaluation-60-greedy-1games-seed0\.json: cannot be written \(Read-only file"):
        evaluation.store(run, found)
    remount("rw")
    assert content(run) == before


def test_metrics_on_a_full_device(tmp_path):
    run = run_directory.RunDirectory(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        run.append_metrics({"update": 1})
    run.close()


def test_something_else_in_place_of_the_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("not a directory")
    with pytest.raises(RunError, match="checkpoints: cannot be used as the directory of checkpoints"):
        train(run, total_env_steps=2000)
    assert (run / "checkpoints").read_text() == "not a directory"


# --- Damaged text files ----------------------------------------------------------------------------------------------

NOT_A_CONFIGURATION = {
    "noise": random.Random(0).randbytes(500),
    "truncated": b'{"algorithm": "rnn", "se',
    "empty": b"",
    "no object": b"[1, 2]",
    "nested without end": b"[" * 100_000,
    "a number without end": b'{"seed": ' + b"9" * 10_000 + b"}",
    "a number too large": b'{"num_envs": 1' + b"0" * 400 + b"}",
    "another type": b'{"seed": {"a": 1}}',
    "an unknown field": b'{"sede": 1}',
    "an impossible value": b'{"num_envs": 0}',
}


@pytest.mark.parametrize("name", NOT_A_CONFIGURATION)
def test_a_damaged_configuration_is_named_and_kept(run, name):
    (run / "config.json").write_bytes(NOT_A_CONFIGURATION[name])
    before = content(run)
    with pytest.raises((RunError, training.ConfigError)) as error:
        train(run, total_env_steps=2000)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises((RunError, training.ConfigError)) as error:
        evaluation.read_run_config(run)
    assert "config.json" in str(error.value)
    assert content(run) == before


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"{}", b"7", b'{"update": "x"}', b"[" * 100_000])
def test_a_damaged_line_of_metrics_is_named_and_kept(run, damage):
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    lines[2] = damage
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    before = content(run)
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 3 is damaged"):
        train(run, total_env_steps=2000)
    assert content(run).keys() >= before.keys() and (run / "metrics.jsonl").read_bytes().splitlines() == lines


# --- Nothing in a run directory is code ------------------------------------------------------------------------------


def test_nothing_that_is_read_can_execute():
    """No module of the package names a way to turn data into code, except PyTorch's loader of nothing but weights."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "eval", "exec", "runpy"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = {alias.name.split(".")[0] for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
            names |= {getattr(node, "module", None), getattr(node, "id", None)}
            assert not names & forbidden, f"{path}:{node.lineno}"
            is_load = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load"
            own = is_load and ast.unparse(node.func) == "reconstructions.load"  # Itself searched here.
            safe = ("weights_only=True", "allow_pickle=False")
            assert not is_load or own or any(x in ast.unparse(node) for x in safe), f"{path}:{node.lineno}"


def test_reading_a_run_unpickles_nothing(run, template):
    """Python reports whatever an unpickler looks up (PEP 578): nothing is, while a run is read from end to end."""
    script = """
import sys
events = []
sys.addaudithook(lambda event, args: events.append(args) if event == "pickle.find_class" else None)
import contextlib
from pathlib import Path
import pickle
from dvrl_jax.runs import checkpoints, run_directory
path = Path(sys.argv[1])
pickle.loads(pickle.dumps(Path))
assert len(events) == 1, "the hook does not work"
with contextlib.closing(checkpoints.Checkpoints(path / "checkpoints", keep=3)) as saver:
    arrays = saver.restore({}).extra["arrays"]
print(len(arrays), len(run_directory.read_metrics(path)), len(run_directory.read_config(path)), len(events))
"""
    command = [sys.executable, "-c", script, run]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    arrays, lines, fields, events = map(int, result.stdout.split())
    assert arrays > 20 and lines == 6 and fields > 30 and events == 1
