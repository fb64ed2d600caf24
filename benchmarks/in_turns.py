"""Speed of several configurations, alone or beside PyTorch or another checkout: compiled, then measured in turns.

    python -m benchmarks.in_turns --run=pong_rnn --run="mountain_hike_dvrl model.num_particles=30" --compare=torch

    python -m benchmarks.in_turns --run=pong_rnn --beside=../another_checkout --repeats=7

For machines that are at hand for minutes, such as a lent GPU: every configuration (and its PyTorch peer) gets a process
that compiles once, while others do, and then waits. They are measured one at a time, each once per round, and what is
known so far is written to `--out` (JSON) after each, so that nothing is lost if time runs out. Prints a table in
Markdown. `benchmarks.throughput` measures one configuration more carefully, in a fresh process each time.
"""

import ast
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent import futures
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks.throughput import JOB, check_peer, machine, ready, with_job
from dvrl_jax import api
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, markdown, process
from dvrl_jax.runs import config as config_lib

FLAGS = flags.FLAGS

# By heading: the name of a result of ours, and its format.
COLUMNS = {
    "steps/s": ("steps_per_second", ",.0f"),
    "memory (MB)": ("memory_mb", ",.0f"),
    "compile (s)": ("compile", ".1f"),
}


def parse(run: str):
    """The configuration that a `--run` asks for: a name in `configs/`, perhaps an argument, and fields.

    "atari_rnn:Asteroids num_envs=128" is `configs/atari_rnn.py:Asteroids` with another number of environments.

    Raises:
        ConfigError: there is no such configuration or field, or a value is impossible.
    """
    file, *changes = shlex.split(run) or [""]
    name, *argument = file.split(":", 1)
    fields = {}
    for change in changes:
        field, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--run: {change}: must be field=value, such as num_envs=128")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value
    config = api.make_config(name, *argument)
    return config_lib.from_fields(config_lib.flatten(config) | fields)


class Worker:
    """A process that compiles, says so, and then measures whenever it is asked to; its messages go to `log`."""

    def __init__(self, kind: str, config, log: Path, checkout: Path | None = None, **made: Any):
        with log.open("w") as messages:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.in_turns"],
                env=with_job(config, "ours" if kind == "beside" else kind, made)
                | ({"PYTHONPATH": str(checkout.resolve())} if checkout else {}),
                cwd=checkout,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )
        self.failed, self.ready = False, False

    def wait(self) -> None:
        """Until it is ready, or has failed."""
        self.ready = self.hear() is not None

    def ask(self, **timed: Any) -> dict[str, Any] | None:
        """What it measures, with settings for `measure`; None if it has failed, now or before."""
        with contextlib.suppress(OSError):  # Of one that has failed, which then says nothing either.
            self.process.stdin.write(json.dumps(timed) + "\n")
            self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any] | None:
        """The next thing that it says; None if it has failed, now or before."""
        line = self.process.stdout.readline()
        self.failed = not line
        return json.loads(line) if line else None


def work(job: dict[str, Any], questions: Iterable[str] = sys.stdin) -> None:
    """The other side: gets ready, says so, and answers each question with what it measures then."""
    process.share_gpu()  # With the other workers.
    # Libraries that print do so among the messages: only answers go where they are read.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    measured = ready(job)
    print(json.dumps({"ready": True}), file=answers)
    for question in questions:
        print(json.dumps(measured.measure(**json.loads(question))), file=answers)


def take_turns(workers: dict[tuple[str, str], Worker], rounds: int, seconds: float, out: Path, until: float) -> dict:
    """Asks one worker after the other, `rounds` times or `until` that time; the results by run and kind, as written."""
    found: dict[str, dict[str, list]] = {}
    for _ in range(rounds):
        for (run, kind), worker in workers.items():
            if time.monotonic() > until:
                return found
            if (result := worker.ask(seconds=seconds)) is not None:
                found.setdefault(run, {}).setdefault(kind, []).append(result)
                out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def as_table(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """A row per configuration, in Markdown: medians of the turns, each turn in brackets."""

    def milliseconds(results):
        each = ", ".join(f"{result['ms']:.2f}" for result in results)
        return f"{statistics.median(result['ms'] for result in results):.2f} ({each})" if results else "-"

    rows = []
    for run, kinds in found.items():
        ours, other = kinds.get("ours", []), kinds.get("torch", []) or kinds.get("beside", [])
        median = lambda results, name: statistics.median(result[name] for result in results)
        ratio = f"{median(other, 'ms') / median(ours, 'ms'):.2f}" if ours and other else "-"
        numbers = [f"{median(ours, name):{form}}" if ours else "-" for name, form in COLUMNS.values()]
        rows.append([run, milliseconds(ours), milliseconds(other), ratio, *numbers])
    peer = "other checkout" if any("beside" in kinds for kinds in found.values()) else "PyTorch"
    return markdown.table(["run", "ours, ms per update", f"{peer}, ms per update", "ratio", *COLUMNS], rows)


def make_places(out: Path) -> tuple[Path, Path]:
    """The file for results, empty as yet, and a directory for messages beside it.

    Raises:
        ConfigError: there is such a file, or none can be made.
    """
    logs = out.with_suffix(".logs")
    try:
        logs.mkdir(parents=True, exist_ok=True)
        out.touch(exist_ok=False)
    except FileExistsError:
        raise ConfigError(f"--out: {out} is there already; name another file") from None
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None
    return out, logs


def main() -> int:
    if not FLAGS.run:
        raise ConfigError("--run: must name a configuration, such as pong_dvrl; it may be given repeatedly")
    began = time.monotonic()
    configs = {run: parse(run) for run in FLAGS.run}
    if FLAGS.compare:
        for config in configs.values():
            check_peer(config)
    out, logs = make_places(Path(FLAGS.out))
    peers = {FLAGS.compare: {"on_gpu": process.may_use_gpu()}} if FLAGS.compare else {}
    workers: dict[tuple[str, str], Worker] = {}
    first = {"train_first": FLAGS.train_first}
    if FLAGS.beside:
        peers = {"beside": {**first, "checkout": Path(FLAGS.beside)}}
    kinds = {"ours": first} | peers
    wanted = [(run, kind) for run in configs for kind in kinds]
    pool = futures.ThreadPoolExecutor(FLAGS.side_by_side or max(1, len(os.sched_getaffinity(0)) // 2))

    def start(run: str, kind: str) -> None:
        log = logs / f"{wanted.index((run, kind))}_{kind}.txt"
        workers[run, kind] = worker = Worker(kind, configs[run], log, **kinds[kind])
        worker.wait()

    try:
        starting = [pool.submit(start, *each) for each in wanted]
        # What takes longer than half of the time to compile must not keep the others from being measured.
        futures.wait(starting, timeout=60 * FLAGS.minutes / 2)
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in list(workers.values()):
            if not worker.ready:
                worker.process.kill()
        compiled = {each: workers[each] for each in wanted if each in workers and workers[each].ready}
        print(f"{len(compiled)} of {len(wanted)} processes ready after {time.monotonic() - began:.0f} s", flush=True)
        found = take_turns(compiled, FLAGS.repeats, FLAGS.seconds, out, began + 60 * FLAGS.minutes)
    finally:
        for worker in list(workers.values()):
            worker.process.kill()
    print(machine())
    for device in {turns[0]["device"]: None for kinds in found.values() for turns in kinds.values()}:
        print(f"on {device}")
    print(as_table(found), end="")
    missing = [(run, kind) for run, kind in wanted if not found.get(run, {}).get(kind)]
    for run, kind in missing:
        print(f"error: {run}: {kind} was not measured; messages are in {logs}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    if JOB in os.environ:
        work(json.loads(os.environ[JOB]))
    else:
        flags.DEFINE_multi_string("run", [], "A configuration and fields, such as 'pong_dvrl num_envs=128'.")
        flags.DEFINE_enum("compare", None, ["torch"], "Measure the PyTorch peer besides.")
        flags.DEFINE_string("beside", None, "Measure another checkout of this repository besides.")
        flags.DEFINE_integer("repeats", 3, "How many rounds there are.", lower_bound=1)
        flags.DEFINE_float("seconds", 3.0, "Each measurement takes at least this long.", lower_bound=0.0)
        flags.DEFINE_float(
            "minutes", 60.0, "No measurement begins later than this; half of it is for compiling.", lower_bound=0.0
        )
        flags.DEFINE_integer(
            "side_by_side", 0, "How many compile at a time; 0: one for every two cores.", lower_bound=0
        )
        flags.DEFINE_integer("train_first", 0, "Updates of ours before timing.", lower_bound=0)
        flags.DEFINE_string("out", "in_turns.json", "Where the results go; messages go into a directory beside it.")
        command_line.run(main)
