"""What a GPU does while it trains: how busy it is, and the kernels that take most of its time.

    python -m benchmarks.kernels --config=configs/pong_dvrl.py [--updates=20] [--top=10]

Times the compiled call that `train.py` makes, after a warm-up, and traces it once more with JAX's profiler. Kernels
take about as long then, but an update takes much longer.
"""

import collections
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from absl import flags

from benchmarks.throughput import make_program
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, process
from dvrl_jax.runs import config as config_lib

FLAGS = flags.FLAGS


class Span(NamedTuple):
    """One thing that the device did, in nanoseconds."""

    name: str
    start: float
    duration: float


def busy(spans: Iterable[Span]) -> float:
    """Nanoseconds in which at least one of the spans was under way."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.start + span.duration - max(end, span.start))
        end = max(end, span.start + span.duration)
    return total


def kind(name: str) -> str:
    """A kernel's name without the number that tells it from the others of its kind."""
    return re.sub(r"[._]\d+$", "", name)


def read_spans(directory: Path) -> list[Span]:
    """All that a trace in `directory` says of the streams of GPUs.

    Raises:
        RuntimeError: there was no GPU.
    """
    import jax

    (path,) = directory.glob("**/*.xplane.pb")
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes if "/device:GPU" in plane.name]
    if not planes:
        raise RuntimeError("the trace has no GPU in it")
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    return [Span(event.name, event.start_ns, event.duration_ns) for line in lines for event in line.events]


def print_table(spans: list[Span], seconds: float, updates: int, top: int) -> None:
    """Prints how busy the device is, and the `top` kinds of kernels by time.

    `seconds` is what the updates take when they are not traced, `spans` what was traced.
    """
    per_update = 1e-6 / updates
    times, counts = collections.Counter(), collections.Counter()
    for span in spans:
        times[kind(span.name)] += span.duration
        counts[kind(span.name)] += 1
    print(f"{1e3 * seconds / updates:.2f} ms per update; {len(spans) / updates:.0f} kernels and copies in it")
    print(f"the GPU is busy for {busy(spans) * per_update:.2f} ms of them ({1e-7 * busy(spans) / seconds:.0f}%)")
    for name, time_ns in times.most_common(top):
        print(f"{time_ns * per_update:8.3f} ms {counts[name] / updates:7.1f} times  {name[:80]}")


def main() -> int:
    config = command_line.required_config()
    process.prepare(config_lib.flatten(config))

    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu":
        raise ConfigError(f"this needs a GPU; JAX runs on the {jax.default_backend()}")
    program = make_program(config)
    run = lambda state: jax.block_until_ready(program.run(state, jnp.int32(FLAGS.updates)))
    state = run(program.state)
    began = time.perf_counter()
    state = run(state)
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run(state)
        spans = read_spans(Path(directory))
    print(f"{config.algorithm} on {config.env.name}, {jax.devices()[0].device_kind}")
    print_table(spans, seconds, FLAGS.updates, FLAGS.top)
    return 0


if __name__ == "__main__":
    command_line.define_config()
    flags.DEFINE_integer("updates", 20, "Updates that are timed and traced, after as many to warm up.", lower_bound=1)
    flags.DEFINE_integer("top", 10, "How many kinds of kernels are listed.", lower_bound=1)
    command_line.run(main)
