"""Running statistics kept on the device as part of the training state: finished episodes and averaged metrics."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax.envs.batched import EnvState

Array = jax.Array

RESULT_WINDOW = 100  # How many of the last finished episodes `result.*` summarises.


class EpisodeStatistics(NamedTuple):
    """Returns of the episodes under way and of the last `RESULT_WINDOW` finished ones.

    Attributes:
        clipped, length: [B] reward (as learned from, but for `loss.reward_scale`) and number of steps of the
            episode under way.
        true: [B] unclipped return of the game under way (several episodes, where a life is an episode).
        finished: [RESULT_WINDOW] clipped returns of finished episodes, a ring. lengths: [RESULT_WINDOW] their lengths.
        num_finished: how many episodes finished since the start of training.
        finished_true: [RESULT_WINDOW] true returns of finished games, a ring. num_finished_true: how many.
    """

    clipped: Array
    length: Array
    true: Array
    finished: Array
    lengths: Array
    num_finished: Array
    finished_true: Array
    num_finished_true: Array

    @classmethod
    def empty(cls, num_envs: int) -> "EpisodeStatistics":
        """Of no episode yet, for `num_envs` environments."""
        zeros, ring, none = jnp.zeros(num_envs), jnp.zeros(RESULT_WINDOW), jnp.zeros((), jnp.int32)
        return cls(zeros, zeros, zeros, ring, ring, none, ring, none)

    def restart(self) -> "EpisodeStatistics":
        """Forgets the episodes under way, as when the environments start anew; finished ones stay."""
        zeros = jnp.zeros_like(self.clipped)
        return self._replace(clipped=zeros, length=zeros, true=zeros)

    def add(self, env: EnvState) -> "EpisodeStatistics":
        """Takes in a segment: `env` holds arrays [T, B]. Calls that are not `valid` change nothing."""

        def step(running, x):
            clipped, length, true = running
            clipped = clipped + jnp.where(x.valid, x.reward, 0.0)
            true = true + jnp.where(x.valid, x.true_reward, 0.0)
            length = length + x.valid
            outputs = (clipped, length, true)
            clipped, length = (jnp.where(x.done, 0.0, y) for y in (clipped, length))
            return (clipped, length, jnp.where(x.game_over, 0.0, true)), outputs

        running, (clipped, length, true) = jax.lax.scan(step, (self.clipped, self.length, self.true), env)
        places, num_finished = _ring_places(self.num_finished, env.done)
        places_true, num_finished_true = _ring_places(self.num_finished_true, env.game_over)
        return EpisodeStatistics(
            *running,
            finished=self.finished.at[places].set(clipped.ravel(), mode="drop"),
            lengths=self.lengths.at[places].set(length.ravel(), mode="drop"),
            num_finished=num_finished,
            finished_true=self.finished_true.at[places_true].set(true.ravel(), mode="drop"),
            num_finished_true=num_finished_true,
        )

    def results(self) -> dict[str, Array]:
        """The `result.*` and `episodes.*` metrics as scalars on the device; NaN before any episode has finished."""
        places = jnp.arange(RESULT_WINDOW)
        of = lambda ring, count: jnp.where((places < count) & jnp.isfinite(ring), ring, jnp.nan)
        clipped = of(self.finished, self.num_finished)
        reduce = {"mean": jnp.nanmean, "median": jnp.nanmedian, "min": jnp.nanmin, "max": jnp.nanmax}
        return {
            "result.true": jnp.nanmean(of(self.finished_true, self.num_finished_true)),
            **{f"result.{name}": function(clipped) for name, function in reduce.items()},
            "episodes.num_ended": self.num_finished,
            "episodes.length": jnp.nanmean(of(self.lengths, self.num_finished)),
        }

    def summary(self) -> dict[str, float | int | None]:
        """The `result.*` and `episodes.*` metrics as plain numbers; None before any episode has finished.

        Returns that are NaN or inf (of an episode in which an update was skipped) are left out.
        """
        clipped = _finite(np.asarray(self.finished)[: int(self.num_finished)])
        true = _finite(np.asarray(self.finished_true)[: int(self.num_finished_true)])
        lengths = np.asarray(self.lengths)[: int(self.num_finished)]
        reduce = {"mean": np.mean, "median": np.median, "min": np.min, "max": np.max}
        result = {"result.true": float(np.mean(true, dtype=np.float64)) if true.size else None}
        for name, function in reduce.items():
            result[f"result.{name}"] = float(function(clipped)) if clipped.size else None
        result["episodes.num_ended"] = int(self.num_finished)
        result["episodes.length"] = float(np.mean(lengths)) if lengths.size else None
        return result


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _ring_places(count: Array, finished: Array) -> tuple[Array, Array]:
    """Places [T*B] in a ring that holds `count` so far for the `finished` [T, B]; out of range where not finished."""
    finished = finished.ravel()
    order = count + jnp.cumsum(finished, dtype=jnp.int32) - 1
    # Of more than a ring's worth at once, only the last may write: scatters in unspecified order must not collide.
    total = count + jnp.sum(finished, dtype=jnp.int32)
    kept = finished & (order >= total - RESULT_WINDOW)
    return jnp.where(kept, order % RESULT_WINDOW, RESULT_WINDOW), total


class Metrics(NamedTuple):
    """Sums of scalar metrics over `count` updates since the last log line, skipped ones left out.

    `not_finite` counts, for each metric, the updates since then in which it was infinite or no number.
    """

    sums: dict[str, Array]
    count: Array
    not_finite: dict[str, Array]

    @classmethod
    def empty(cls, names: Iterable[str]) -> "Metrics":
        """Of no update yet; `names` are those of the values that `add` takes."""
        none = jnp.zeros((), jnp.int32)
        return cls({name: jnp.zeros(()) for name in names}, none, dict.fromkeys(names, none))

    def add(self, values: dict[str, Array], good: Array) -> "Metrics":
        """Takes in an update; one that is not `good` (scalar bool) is not averaged."""
        sums = {name: total + jnp.where(good, values[name], 0.0) for name, total in self.sums.items()}
        not_finite = {name: count + ~jnp.isfinite(values[name]) for name, count in self.not_finite.items()}
        return Metrics(sums, self.count + good, not_finite)

    def averages(self) -> dict[str, Array]:
        """Averages as scalars on the device; NaN if every update was skipped."""
        return {name: total / self.count for name, total in sorted(self.sums.items())}

    def means(self) -> dict[str, float]:
        """Averages as plain numbers; NaN if every update was skipped."""
        count = int(self.count) or math.nan
        return {name: float(total) / count for name, total in sorted(self.sums.items())}

    def culprits(self) -> list[str]:
        """Names of the metrics that were NaN or inf in some update since the last log line."""
        return sorted(name for name, count in self.not_finite.items() if int(count))


def over_seeds(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The log line of several seeds, from one of each: means, and standard errors as `<name>.standard_error`.

    Of a single one, the line itself. Means are over the seeds that have a number; `num_seeds` is how many lines there
    were. `update` is the seeds' common one, `env_steps` the least.
    """
    if len(lines) == 1 and "num_seeds" not in lines[0]:
        return dict(lines[0])
    result: dict[str, Any] = {"update": lines[0]["update"], "env_steps": min(line["env_steps"] for line in lines)}
    result["num_seeds"] = len(lines)
    for name in lines[0]:
        if name in ("update", "env_steps", "final"):
            continue
        values = [line[name] for line in lines if line.get(name) is not None and math.isfinite(line[name])]
        result[name] = sum(values) / len(values) if values else None
        if len(values) > 1 and name not in ("wall_time", "obs.fps"):
            result[f"{name}.standard_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return result | ({"final": True} if lines[0].get("final") else {})
