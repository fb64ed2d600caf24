"""Kills training again and again and checks that nothing is lost: python -m tests.reliability.kill --kills=50

Starts real `train.py` processes on a small Mountain Hike, kills each with SIGKILL, and resumes, in turn

- at a random moment of the start (imports, restoring, rewriting metrics.jsonl),
- at a random moment of training,
- while a checkpoint is being written: as soon as Orbax's temporary directory is seen, plus some milliseconds,
- while a line of metrics is being written: as soon as the file is seen to grow. One line is one system call, which
  SIGKILL does not split, so the script then cuts the line short itself, as a crash of the whole machine can.

A last process finishes the run. Then `metrics.jsonl` must have every line exactly once and in order, and all metrics
and the final checkpoint must equal those of a run that was never stopped, bit for bit. Each start must have used the
newest complete checkpoint.
"""

import argparse
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dvrl_jax.runs import run_directory
from tests.tiny import HIKE, checkpoint_arrays, untimed
from tests.tiny import HIKE_STEPS_PER_UPDATE as STEPS_PER_UPDATE

ROOT = Path(__file__).parent.parent.parent
LOG_INTERVAL, CHECKPOINT_INTERVAL = 10, 40
ENDLESS = 2**31
TIMEOUT = 900  # Seconds that a process may take to reach the moment it is to be killed at; generous for slow machines.


class Process:
    """One `train.py` in `workdir`, its output in a file."""

    def __init__(self, workdir: Path, updates: int, cache: Path):
        fields = HIKE | {"log.interval": LOG_INTERVAL, "checkpoint.interval": CHECKPOINT_INTERVAL}
        fields |= {"total_env_steps": updates * STEPS_PER_UPDATE}
        command = [sys.executable, "train.py", "--config=configs/mountain_hike_dvrl.py", f"--workdir={workdir}"]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.workdir = workdir
        self.output_path = workdir.with_suffix(".out")
        with open(self.output_path, "w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"training ended by itself or stands still:\n{self.output}")
            time.sleep(0.001)

    def wait_for_training(self) -> None:
        self.wait_for(lambda: "compiled in" in self.output)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def complete_checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def unfinished_checkpoints(workdir: Path) -> list[Path]:
    return list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_at_start(process: Process, rng: random.Random) -> str:
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 6))
    else:
        process.wait_for(lambda: "parameters, on" in process.output)
        time.sleep(rng.uniform(0, 0.5))
    process.kill()
    return "at the start"


def kill_in_training(process: Process, rng: random.Random) -> str:
    process.wait_for_training()
    process.wait_for(lambda: bool(complete_checkpoints(process.workdir)))  # On a slow machine, the first takes a while.
    time.sleep(rng.uniform(0, 3))
    process.kill()
    return "in training"


def kill_in_checkpoint(process: Process, rng: random.Random) -> str:
    process.wait_for_training()
    several = max(complete_checkpoints(process.workdir), default=0) + rng.randrange(3) * CHECKPOINT_INTERVAL
    process.wait_for(lambda: max(complete_checkpoints(process.workdir), default=0) >= several)
    process.wait_for(lambda: bool(unfinished_checkpoints(process.workdir)))
    time.sleep(rng.uniform(0, 0.02))
    process.kill()
    return "in a checkpoint" if unfinished_checkpoints(process.workdir) else "just after a checkpoint"


def kill_in_line(process: Process, rng: random.Random) -> str:
    process.wait_for_training()
    metrics = process.workdir / "metrics.jsonl"
    for _ in range(rng.randint(1, 10)):
        before = size(metrics)
        process.wait_for(lambda before=before: size(metrics) > before)
    process.kill()
    content = metrics.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    last = run_directory.read_metrics(process.workdir)[-1]["update"]
    # Lines are on disk before the checkpoint of the same update is begun, so a line that has one cannot be torn.
    if last <= max(complete_checkpoints(process.workdir), default=0):
        return "just after a line"
    os.truncate(metrics, rng.randrange(start + 1, len(content)))
    return "in a line"


MOMENTS = [kill_in_training, kill_in_checkpoint, kill_in_line, kill_at_start]


def check_start(workdir: Path, output: str, newest: int | None) -> bool:
    """Whether the process came as far as to say where it starts from, which must be `newest`."""
    match = re.search(r"resuming from update ([\d,]+)", output)
    if match:
        assert int(match[1].replace(",", "")) == newest, f"resumed from {match[1]} instead of {newest}"
    elif "compiled in" in output:
        assert newest is None, f"started anew in spite of the checkpoint of update {newest}"
    assert "damaged" not in output and "Traceback" not in output, output
    return match is not None


def check_lines(workdir: Path, complete: bool = False) -> list[dict]:
    """The lines of metrics, which must be every one, once, in order."""
    lines = run_directory.read_metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
    updates = [line["update"] for line in lines]
    regular = updates[:-1] if complete else updates
    assert regular == [LOG_INTERVAL * (i + 1) for i in range(len(regular))], updates
    return untimed(lines)


def torture(root: Path, kills: int, seed: int = 0, say: Callable[[str], None] = lambda text: None) -> Counter:
    """Kills training `kills` times in `root` and checks everything; returns how often what happened.

    Raises:
        AssertionError: something was lost, or written twice, or came out differently.
    """
    return kill_repeatedly(root, kills, seed, say) + finish_and_compare(root)


def kill_repeatedly(root: Path, kills: int, seed: int, say: Callable[[str], None]) -> Counter:
    """The kills, with the checks that can be made before the run has ended."""
    rng, counts = random.Random(seed), Counter()
    workdir, cache = root / "killed", root / "cache"
    workdir.mkdir()
    for number, moment in zip(range(kills), itertools.cycle(MOMENTS), strict=False):
        newest = max(complete_checkpoints(workdir), default=None)
        process = Process(workdir, ENDLESS // STEPS_PER_UPDATE, cache)
        what = moment(process, rng)
        counts[what] += 1
        counts["resumed from the newest checkpoint"] += check_start(workdir, process.output, newest)
        lines = check_lines(workdir)
        say(f"kill {number + 1}: {what}; {len(lines)} lines, checkpoints {complete_checkpoints(workdir)}")
    return counts


def finish_and_compare(root: Path) -> Counter:
    """Lets the killed run come to its end and compares it with one that was never stopped."""
    workdir, cache = root / "killed", root / "cache"
    newest = max(complete_checkpoints(workdir), default=None)
    total = (newest or 0) + 3 * LOG_INTERVAL + 7
    for directory in (workdir, root / "straight"):
        process = Process(directory, total, cache)
        assert process.process.wait(TIMEOUT) == 0, process.output
        check_start(directory, process.output, newest if directory == workdir else None)
    killed, straight = (check_lines(directory, complete=True) for directory in (workdir, root / "straight"))
    assert killed == straight, "metrics differ from those of a run that was never killed"
    assert killed[-1]["update"] == total
    assert not unfinished_checkpoints(workdir), "an unfinished checkpoint was left behind"
    killed, straight = checkpoint_arrays(workdir), checkpoint_arrays(root / "straight")
    assert killed.keys() == straight.keys()
    for name, array in straight.items():
        assert array.tobytes() == killed[name].tobytes(), f"{name} differs from a run that was never killed"
    return Counter({"arrays equal bit for bit": len(straight), "updates": total})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dvrl_jax_kill_") as root:
        counts = torture(Path(root), arguments.kills, arguments.seed, lambda text: print(text, flush=True))
    print(f"\n{arguments.kills} kills survived")
    for what, count in counts.items():
        print(f"{count:6,} {what}")


if __name__ == "__main__":
    main()
