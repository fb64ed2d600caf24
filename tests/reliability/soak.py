"""Trains for hours and watches what should stay constant: python -m tests.reliability.soak --workdir=DIR --minutes=180

Starts a real `train.py` of flickering Pong with reconstructions and checkpoints, or resumes the one in DIR, runs
`evaluate.py` on it from time to time, and notes every ten seconds, in DIR.soak.jsonl, how much memory is resident, how
many files are open, how many processor seconds were used, how large the checkpoints and the rest of the directory are,
and how far training is. After the time is over it sends SIGTERM and prints the report. Several pieces add up;
`--report` prints the report of what is there and starts nothing.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dvrl_jax.runs.markdown import table

ROOT = Path(__file__).parent.parent.parent
INTERVAL = 10.0  # Seconds between samples.
WARM_UP = 10 * 60.0  # Seconds after the first progress of each piece that the report leaves out: the first checkpoint.
SETTINGS = (
    "--config=configs/pong_dvrl.py",
    "--config.log.interval=50",
    "--config.log.save_reconstruction_interval=500",
    "--config.checkpoint.interval=250",
)


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory, as far as they are there while it is read."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # A checkpoint was renamed or deleted meanwhile.
            total += path.lstat().st_size
    return total


def last_line(workdir: Path) -> dict:
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    return json.loads(lines[-1]) if lines else {}


def sample(process: subprocess.Popen, workdir: Path, piece: int, started: float, evaluating: bool) -> dict:
    """What is noted at one moment; memory in bytes, processor time in seconds."""
    proc = Path(f"/proc/{process.pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    times = (proc / "stat").read_text().rsplit(")", 1)[1].split()
    checkpoints = size_of(workdir / "checkpoints")
    line = last_line(workdir)
    return {
        "piece": piece,
        "seconds": time.monotonic() - started,
        "resident": int(status["VmRSS"].split()[0]) * 1024,
        "handles": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "processor_seconds": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        "checkpoints": len([path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]),
        "checkpoint_bytes": checkpoints,
        "other_bytes": size_of(workdir) - checkpoints,
        "env_steps": line.get("env_steps", 0),
        "evaluating": evaluating,
    }


def watch(workdir: Path, notes: Path, minutes: float, evaluate_every: float) -> None:
    """Trains for some minutes and appends a sample to `notes` every ten seconds."""
    piece = 1 + max((x["piece"] for x in read(notes)), default=0)
    settings = [f"--workdir={workdir}"] + ([] if (workdir / "config.json").exists() else list(SETTINGS))
    with open(f"{workdir}.log", "a") as log:
        train = subprocess.Popen([sys.executable, "train.py", *settings], cwd=ROOT, stdout=log, stderr=log)
        started, evaluation, evaluated = time.monotonic(), None, time.monotonic()
        try:
            while time.monotonic() < started + 60 * minutes and train.poll() is None:
                time.sleep(INTERVAL)
                if evaluation is not None and evaluation.poll() is not None:
                    evaluation, evaluated = None, time.monotonic()
                if evaluation is None and time.monotonic() > evaluated + 60 * evaluate_every:
                    command = [sys.executable, "evaluate.py", f"--workdir={workdir}", "--episodes=16"]
                    evaluation = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
                try:
                    line = sample(train, workdir, piece, started, evaluation is not None)
                except (FileNotFoundError, KeyError):  # It has ended: said below.
                    break
                with open(notes, "a") as file:
                    file.write(json.dumps(line) + "\n")
        finally:
            if evaluation is not None:
                evaluation.kill()
            train.send_signal(signal.SIGTERM)
            code = train.wait()
    if code != 128 + signal.SIGTERM:
        raise SystemExit(f"training ended with exit code {code}; see {workdir}.log")


def read(notes: Path) -> list[dict]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def slope(hours: np.ndarray, values: np.ndarray, blocks: int = 12) -> tuple[float, float]:
    """Slope of values per hour through the means of equal blocks of time, with its standard error."""
    x, y = (np.array([part.mean() for part in np.array_split(a, blocks)]) for a in (hours, values))
    x, y = x - x.mean(), y - y.mean()
    b = x @ y / (x @ x)
    return b, np.sqrt(np.sum((y - b * x) ** 2) / (blocks - 2) / (x @ x))


def warmed_up(samples: list[dict]) -> list[dict]:
    """The samples of a piece after compiling and warming up."""
    progress = [x["seconds"] for x in samples if x["env_steps"] > samples[0]["env_steps"]]
    return [x for x in samples if progress and x["seconds"] > progress[0] + WARM_UP]


def report(samples: list[dict]) -> str:
    """The report as a Markdown table: a row for each quarter of the time after each piece's warm-up."""
    header = ["piece", "hours", "steps", "resident MB: mean", "least", "most", "handles", "threads"]
    header += ["steps per processor second", "checkpoints", "their MB", "other MB"]
    rows, text = [], []
    for piece in sorted({x["piece"] for x in samples}):
        warm = warmed_up([x for x in samples if x["piece"] == piece])
        if len(warm) < 48:
            continue
        for quarter in np.array_split(np.arange(len(warm)), 4):
            part = [warm[i] for i in quarter]
            column = {name: np.array([x[name] for x in part], float) for name in part[0]}
            resident = column["resident"] / 1e6
            ends = part[0], part[-1]
            steps, cpu = (ends[1][name] - ends[0][name] for name in ("env_steps", "processor_seconds"))
            span = lambda name, scale=1.0, column=column: _span(column[name] / scale)
            rows.append(
                [
                    str(piece),
                    f"{ends[0]['seconds'] / 3600:.2f}-{ends[1]['seconds'] / 3600:.2f}",
                    f"{ends[1]['env_steps']:,}",
                    *(f"{value:.0f}" for value in (resident.mean(), resident.min(), resident.max())),
                    span("handles"),
                    span("threads"),
                    f"{steps / cpu:.1f}",
                    span("checkpoints"),
                    span("checkpoint_bytes", 1e6),
                    span("other_bytes", 1e6),
                ]
            )
        hours = np.array([x["seconds"] for x in warm]) / 3600
        b, error = slope(hours, np.array([x["resident"] for x in warm]) / 1e6)
        text.append(f"Piece {piece}: resident memory changes by {b:.1f} +- {error:.1f} MB an hour.")
    return "\n".join([table(header, rows), "", *text])


def _span(values: np.ndarray) -> str:
    low, high = f"{values.min():.0f}", f"{values.max():.0f}"
    return low if low == high else f"{low}-{high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="the run's directory")
    parser.add_argument("--minutes", type=float, default=180.0, help="how long to train")
    parser.add_argument("--evaluate_every", type=float, default=30.0, help="minutes between evaluations")
    parser.add_argument("--report", action="store_true", help="only report what was noted")
    arguments = parser.parse_args()
    workdir = arguments.workdir.absolute()
    notes = Path(f"{workdir}.soak.jsonl")
    if not arguments.report:
        watch(workdir, notes, arguments.minutes, arguments.evaluate_every)
    print(report(read(notes)))


if __name__ == "__main__":
    main()
