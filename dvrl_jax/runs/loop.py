"""The training loop between calls of the compiled program, for `train.py` and for `make_train` alike."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

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
        line: what metrics.jsonl says of the updates since the last log line, without what depends on the clock.
        steps_per_second: since then.
        is_line: whether it is a log line: one interval is over, or training. is_end: training is over.
        is_failure: too many updates in a row were skipped.
    """

    state: TrainState
    line: dict[str, Any]
    steps_per_second: float
    is_line: bool
    is_end: bool
    is_failure: bool


def train(
    program: Callable[[TrainState, jax.Array], TrainState],
    state: TrainState,
    config: ConfigDict,
    remaining: Callable[[TrainState], int],
    intervals: Iterable[int] = (),
) -> Iterator[Call]:
    """Calls the program until training is over.

    Args:
        program: does some updates. remaining: how many are left at a state.
        intervals: besides at the end of each log interval, a call ends at multiples of these; 0 counts for none.
    Yields:
        a `Call` for each.
    Raises:
        Stopped: after `config.max_skipped_updates` updates in a row that were skipped; the last call was yielded.
    """
    intervals = [every for every in (config.log.interval, *intervals) if every > 0]
    limit = 1  # Updates per call; grows to what MAX_CALL_SECONDS allow.
    line_steps, line_seconds = int(state.env_steps), 0.0
    while (left := remaining(state)) > 0:
        update = int(state.update)
        count = min(left, limit, *(every - update % every for every in intervals))
        if skipped := int(state.skipped_in_row):
            count = min(count, config.max_skipped_updates - skipped)
        began = time.monotonic()
        state = jax.block_until_ready(program(state, jnp.int32(count)))
        elapsed = time.monotonic() - began
        limit = max(1, min(2 * limit, int(MAX_CALL_SECONDS * count / max(elapsed, 1e-9))))
        line_seconds += elapsed
        update, steps = int(state.update), int(state.env_steps)
        failed = int(state.skipped_in_row) >= config.max_skipped_updates
        is_end = remaining(state) <= 0
        on_interval = update % config.log.interval == 0
        line = {"update": update, "env_steps": steps} | state.episodes.summary() | state.metrics.means()
        line["updates.skipped"] = int(state.skipped)
        speed = (steps - line_steps) / max(line_seconds, 1e-9)
        if not on_interval:
            line["final"] = True
        why = why_stopped(state) if failed else ""
        if on_interval:
            state = state._replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics))
            line_steps, line_seconds = steps, 0.0
        yield Call(state, line, speed, on_interval or is_end or failed, is_end, failed)
        if failed:
            raise Stopped(why)


def why_stopped(state: TrainState) -> str:
    """Why training stopped at a state that has too many skipped updates in a row."""
    names = ", ".join(state.metrics.culprits()) or "the new weights"
    return (
        f"stopped at update {int(state.update):,} ({int(state.env_steps):,} steps), because in "
        f"{int(state.skipped_in_row):,} updates in a row (max_skipped_updates) {names} were NaN or inf"
    )
