"""A run's directory: its number, its lock, `config.json` and `metrics.jsonl`.

    saved_runs/7/config.json      the configuration, field by field
    saved_runs/7/metrics.jsonl    one JSON object per log line; of runs put away also metrics.jsonl.gz
    saved_runs/7/checkpoints/     see `dvrl_jax.runs.checkpoints`

Everything read back is JSON or arrays; nothing in a run directory is ever executed or unpickled.
"""

import contextlib
import fcntl
import gzip
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvrl_jax.errors import RunError

SAVED_RUNS = Path("saved_runs")

PROBE = "probe"  # Directory below a run's checkpoints in which saving is tried.
DISCARD_TRIES = 10  # Twentieths of a second.

# What is measured of a run, besides metrics.jsonl, by training and by the programs that read it.
MEASURED = ("reconstructions", "tensorboard", "wandb", "wandb_id", "evaluation-*.json", "probe-*.json", "causes-*.json")


def next_directory(root: Path = SAVED_RUNS) -> Path:
    """Creates and returns `root/<next number>`; safe against other processes doing the same.

    Raises:
        RunError: it cannot be created.
    """
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in root.iterdir() if path.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (root / str(number)).mkdir()
                return root / str(number)
            except FileExistsError:
                continue


class RunDirectory:
    """One run's files. Holds an exclusive lock on the directory until closed or until the process ends."""

    def __init__(self, path: Path, is_new: bool = False):
        """Opens or creates the directory; `is_new` says that this process has just created it.

        Raises:
            RunError: it cannot be written, is in use by another process, or holds something else.
        """
        self.path = Path(path)
        self._made = [self.path] if is_new else []  # Directories, the innermost first.
        try:
            self._made += [place for place in (self.path, *self.path.parents) if not place.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 (held until closed)
        except OSError as error:
            raise RunError(f"{self.path}: cannot write there ({_reason(error)})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RunError(f"{self.path}: another process is training in this directory") from None
        except OSError as error:
            self._lock.close()
            message = f"{self.path}: cannot be locked ({error.strerror}), which keeps two runs from writing there"
            raise RunError(message) from None
        self._ends_early = False  # The last line of metrics is to go when the next one comes.
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        try:
            self._check_content()
        except BaseException:
            self.close()
            raise

    def _check_content(self) -> None:
        with reading(self.path):
            if not self.config_path.exists():
                found = [path for path in (self.metrics_path, self.path / "checkpoints") if _has_content(path)]
                if found:
                    raise RunError(
                        f"{self.path}: has {found[0].name} but no config.json, so it is not a run to continue"
                    )
            if not self.metrics_path.exists() and has_metrics(self.path):
                raise RunError(
                    f"{self.path}: has metrics.jsonl.gz, a run put away; unpack that (gunzip) to go on with it"
                )

    def close(self) -> None:
        self._lock.close()

    def discard(self) -> str:
        """Removes what this process has made here if nothing was saved yet. Returns what to tell the user about it."""
        if has_config(self.path):
            return f"before the first update: the run in {self.path} is as it was"
        for _ in range(DISCARD_TRIES):  # Another thread may still be writing the probe.
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink(missing_ok=True)
                for probe in (self.path / "checkpoints").glob(f"{PROBE}*"):  # With those that are not complete.
                    shutil.rmtree(probe, ignore_errors=True)
                for place in (self.path / "checkpoints", *self._made):
                    if place.exists():
                        place.rmdir()  # Not if somebody has put something there.
                break
            time.sleep(0.05)
        removed = "" if self.path.exists() else f", and {self.path} was removed"
        return f"before the first update: nothing was saved{removed}"

    def write_config(self, text: str) -> None:
        """Writes config.json in one step.

        Raises:
            RunError: it cannot be written; the old one stays.
        """
        replace(self.config_path, text)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl and waits until it is on disk. NaN and inf become null.

        Raises:
            RunError: it cannot be written.
        """
        if self._ends_early:
            self._rewrite([*read_metrics(self.path)[:-1], line])
            self._ends_early = False
            return
        with writing(self.metrics_path), open(self.metrics_path, "a") as file:
            file.write(_as_text(line))
            file.flush()
            os.fsync(file.fileno())

    def rewind_metrics(self, update: int) -> None:
        """Drops what will be written again when training resumes from `update`.

        That is: lines of later updates and an incomplete last line. The line that an earlier end wrote between two
        regular ones goes when the next line is there: until then it is the run's result.
        """
        if not self.metrics_path.exists():
            return
        kept = [x for x in read_metrics(self.path) if x["update"] <= update]
        kept = [x for x in kept if x is kept[-1] or not x.get("final", False)]
        self._ends_early = bool(kept) and kept[-1].get("final", False)
        self._rewrite(kept)

    def _rewrite(self, lines: Iterable[Mapping[str, Any]]) -> None:
        replace(self.metrics_path, "".join(map(_as_text, lines)))

    def set_aside(self) -> Path | None:
        """Moves all that was measured so far to `before.1`, or `before.2`, ..., if a line of metrics has been written.

        That is metrics.jsonl and what MEASURED names; whatever else is in the directory stays. Returns where it is now.

        Raises:
            RunError: it cannot be moved.
        """
        if not _has_content(self.metrics_path):
            return None
        number = 1
        while (aside := self.path / f"before.{number}").exists():
            number += 1
        with writing(aside):
            aside.mkdir()
            # The metrics last: while they are there, this is done again.
            for pattern in (*MEASURED, self.metrics_path.name):
                for entry in sorted(self.path.glob(pattern)):
                    entry.rename(aside / entry.name)
        return aside


class OfAnother(RunDirectory):
    """A run's directory that another process writes and has locked: this one only knows where it is."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def close(self) -> None:
        pass

    def discard(self) -> str:
        return "before the first update"


def has_config(path: Path) -> bool:
    """Whether a directory holds a run's configuration, so that training can resume there without another.

    Raises:
        RunError: it cannot be told.
    """
    with reading(path):
        return (Path(path) / "config.json").exists()


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration stored in a run directory, by dotted names; None if there is none.

    Raises:
        RunError: config.json is not readable as one.
    """
    path = Path(path) / "config.json"
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(fields, dict):
        raise RunError(f"{path}: not a readable configuration (expected a JSON object)")
    return fields


def has_metrics(path: Path) -> bool:
    """Whether `read_metrics` finds a file there."""
    return any((Path(path) / name).exists() for name in ("metrics.jsonl", "metrics.jsonl.gz"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a run directory's metrics.jsonl, or else .jsonl.gz; a last line cut short is left out.

    Raises:
        RunError: the file cannot be read, or a line before the last is damaged.
    """
    path = Path(path) / "metrics.jsonl"
    compressed = path.with_name("metrics.jsonl.gz")
    try:
        if compressed.exists() and not path.exists():
            path = compressed
            lines = gzip.decompress(path.read_bytes()).split(b"\n")
        else:
            lines = path.read_bytes().split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    result = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            fields = json.loads(line)
            if not (isinstance(fields, dict) and isinstance(fields.get("update"), int)):
                raise ValueError("not a line of metrics")
            if not all(value is None or isinstance(value, int | float) for value in fields.values()):
                raise ValueError("metrics are numbers")
            result.append(fields)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise RunError(f"{path}: line {number} is damaged; mend or remove it to go on") from None
    return result


def column(lines: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """One metric over all lines, NaN where it is null or absent."""
    return [math.nan if line.get(name) is None else line[name] for line in lines]


def read_curve(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Environment steps and the values there of one metric of a run. Raises RunError as `read_metrics`."""
    lines = read_metrics(path)
    return column(lines, "env_steps"), column(lines, name)


def _as_text(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl; NaN and inf become null."""
    finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps({name: finite(value) for name, value in line.items()}, allow_nan=False) + "\n"


def reading(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns what goes wrong with reading a file or directory into a RunError that names it."""
    return _named(path, "read")


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns what goes wrong with writing a file or directory into a RunError that names it."""
    return _named(path, "written")


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be {what} ({_reason(error)})") from None


def _reason(error: OSError) -> str:
    """What a system's error says, for messages."""
    is_taken = isinstance(error, FileExistsError)  # By something that is no directory.
    return "it is a file, or a link that leads nowhere" if is_taken else error.strerror


def _has_content(path: Path) -> bool:
    """Whether there is a file that is not empty, or a directory with something numbered in it."""
    if path.is_dir():
        return any(entry.name.isdecimal() for entry in path.iterdir())
    return path.exists() and path.stat().st_size > 0


def replace(path: Path, text: str) -> None:
    """Writes a file in one step: whoever reads it sees the old or the new content, whole.

    Raises:
        RunError: it cannot be written; the old content stays.
    """
    temporary = path.with_name(path.name + ".new")
    with writing(path):
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
