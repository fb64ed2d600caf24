"""Runs of several seeds as a few numbers, as docs/results/protocol.md says.

Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, NeurIPS 2021: interquartile means,
stratified bootstrap intervals, probability of improvement.
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import trim_mean

from dvrl_jax.runs import run_directory

FINAL = 1 / 6  # The share of the steps, at the end, whose mean return is a run's result.
SETTLED = 0.4  # Collapses are counted after this share of the steps.
FALL = 15.0  # By how much a return must fall to be one.
OF_LINES = 5  # What it has fallen from is the best median of so many successive log lines.
RESAMPLES = 2000

Scores = Sequence[Sequence[float]]  # A run's result, by task (stratum) and seed.


class Interval(NamedTuple):
    """An estimate, and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: Scores) -> float:
    """The mean of the middle half of all runs' results; of five the middle three."""
    return float(trim_mean(np.concatenate([np.asarray(task, float) for task in scores]), 0.25))


def probability_of_improvement(scores: Scores, others: Scores) -> float:
    """That a run is better than a run of the others on the same task, averaged over tasks; a tie counts half."""
    one_task = lambda x, y: np.mean((np.sign(np.subtract.outer(x, y)) + 1) / 2)
    return float(np.mean([one_task(*pair) for pair in zip(scores, others, strict=True)]))


def interval(statistic: Callable[..., float], *groups: Scores, seed: int = 0) -> Interval:
    """A statistic of groups of runs with its percentile bootstrap interval: of each task, seeds are drawn anew."""
    rng = np.random.default_rng(seed)
    again = lambda group: [rng.choice(np.asarray(task, float), len(task)) for task in group]
    drawn = [statistic(*map(again, groups)) for _ in range(RESAMPLES)]
    return Interval(statistic(*groups), *np.quantile(drawn, (0.025, 0.975)).tolist())


def returns(lines: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Environment steps and mean training return (`result.true`) of the log lines that have one."""
    values = run_directory.column(lines, "result.true")
    return [(line["env_steps"], value) for line, value in zip(lines, values, strict=True) if not np.isnan(value)]


def final(lines: Sequence[dict[str, Any]]) -> float:
    """A run's mean return over the last `FINAL` of its steps."""
    curve = returns(lines)
    return statistics.fmean(value for steps, value in curve if steps > (1 - FINAL) * curve[-1][0])


def over_all(lines: Sequence[dict[str, Any]]) -> float:
    """A run's mean return over all its steps: the area under its learning curve, divided by its length."""
    return statistics.fmean(value for _, value in returns(lines))


def collapses(lines: Sequence[dict[str, Any]]) -> int:
    """Log lines after `SETTLED` of the steps whose return is `FALL` below the best that `OF_LINES` had before them."""
    curve = returns(lines)
    values = [value for _, value in curve]
    medians = [statistics.median(values[i : i + OF_LINES]) for i in range(len(values) - OF_LINES)]
    best = itertools.accumulate(medians, max)  # Before line `OF_LINES`, and so on.
    later = curve[OF_LINES:]
    return sum(
        steps > SETTLED * curve[-1][0] and value <= top - FALL for (steps, value), top in zip(later, best, strict=True)
    )
