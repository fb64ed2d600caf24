"""The training loop between calls of the compiled program, for `train.py` and for `make_train` alike."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dvrl_jax import devices, seeds
from dvrl_jax.errors import RunError
from dvrl_jax.train_state import TrainState

# A call of the compiled program is at most about this long, so that progress is seen and signals are answered.
MAX_CALL_SECONDS = 10.0


class Stopped(RunError):
    """Training cannot go on; the message says where and why."""


class Call(NamedTuple):
    """What one call of the compiled program brought.

    Attributes:
        state: after it; averaged metrics begin anew after a log line.
        lines: by place (0 for a single seed), what metrics.jsonl says of the updates since the last log line, without
            what depends on the clock.
        steps_per_second: since then, of all seeds.
        is_line: whether these are log lines: one interval is over, or training. is_end: training is over.
        failures: by place, why training of a seed stops here: too many updates in a row were skipped.
    """

    state: TrainState
    lines: dict[int, dict[str, Any]]
    steps_per_second: float
    is_line: bool
    is_end: bool
    failures: dict[int, str]


def train(
    program: Callable[[TrainState, jax.Array], TrainState],
    state: TrainState,
    config: ConfigDict,
    remaining: Callable[[TrainState], int],
    intervals: Iterable[int] = (),
    running: Iterable[int] = (0,),
) -> Iterator[Call]:
    """Calls the program until training is over.

    Args:
        program: does some updates: [] of a single seed's state, or [places] of that of several (`seeds.run`).
        remaining: how many are left at a seed's state (its `seeds.counters`).
        intervals: besides at the end of each log interval, a call ends at multiples of these; 0 counts for none.
        running: the places to train.
    Yields:
        a `Call` for each.
    Raises:
        Stopped: after `config.max_skipped_updates` updates in a row that were skipped by the last seed that was left;
        the last call was yielded.
    """
    intervals = [every for every in (config.log.interval, *intervals) if every > 0]
    running, now = sorted(running), seeds.counters(state)
    limit = 1  # Updates per call; grows to what MAX_CALL_SECONDS allow.
    steps_of = lambda: sum(int(now[place].env_steps) for place in running)
    line_steps, line_seconds = steps_of(), 0.0
    while (left := max(remaining(now[place]) for place in running)) > 0:
        update = int(now[running[0]].update)
        count = min(left, limit, *(every - update % every for every in intervals))
        if skipped := max(int(now[place].skipped_in_row) for place in running):
            count = min(count, config.max_skipped_updates - skipped)
        began = time.monotonic()
        state = jax.block_until_ready(program(state, counts(state, count, running)))
        elapsed = time.monotonic() - began
        limit = max(1, min(2 * limit, int(MAX_CALL_SECONDS * count / max(elapsed, 1e-9))))
        limit = int(devices.from_first(limit))  # Processes that train together do as many.
        line_seconds += elapsed
        now = seeds.counters(state)
        failed = [x for x in running if int(now[x].skipped_in_row) >= config.max_skipped_updates]
        failures = {place: why_stopped(now[place]) for place in failed}
        is_end = max(remaining(now[place]) for place in running) <= 0
        on_interval = (update + count) % config.log.interval == 0
        lines = {place: _line(now[place], is_final=not on_interval) for place in running}
        speed = (steps_of() - line_steps) / max(line_seconds, 1e-9)
        running = [place for place in running if place not in failed]
        if on_interval:
            state = state._replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics))
            line_seconds = 0.0
        if on_interval or failed:
            line_steps = steps_of()
        yield Call(state, lines, speed, on_interval or is_end or bool(failed), is_end, failures)
        if not running:
            raise Stopped("; ".join(failures.values()))


def counts(state: TrainState, count: int, running: Iterable[int]) -> jax.Array:
    """The number of updates as the program takes it: of places that do not train, none."""
    if state.update.ndim == 0:
        return jnp.int32(count)
    each = np.zeros(state.update.shape, np.int32)
    each[list(running)] = count
    return jax.device_put(each, state.update.sharding)


def _line(state: TrainState, is_final: bool) -> dict[str, Any]:
    line = {"update": int(state.update), "env_steps": int(state.env_steps)}
    line |= state.episodes.summary() | state.metrics.means()
    line["updates.skipped"] = int(state.skipped)
    return line | ({"final": True} if is_final else {})


def why_stopped(state: TrainState) -> str:
    """Why training stopped at a state that has too many skipped updates in a row."""
    names = ", ".join(state.metrics.culprits()) or "the new weights"
    return (
        f"stopped at update {int(state.update):,} ({int(state.env_steps):,} steps), because in "
        f"{int(state.skipped_in_row):,} updates in a row (max_skipped_updates) {names} were NaN or inf"
    )
