"""What many seeds are summed up by, against numbers worked out here."""

import itertools

import numpy as np
import pytest

from evidence import aggregates


def test_the_interquartile_mean_is_that_of_the_middle_half():
    assert aggregates.interquartile_mean([[9.0, 1.0, 5.0, 2.0, 100.0]]) == pytest.approx((2 + 5 + 9) / 3)
    two_tasks = [[0.0, 1.0, 2.0, 3.0], [-50.0, 10.0, 20.0, 70.0]]
    assert aggregates.interquartile_mean(two_tasks) == pytest.approx((1 + 2 + 3 + 10) / 4)


def test_the_probability_of_improvement_counts_pairs_of_runs():
    assert aggregates.probability_of_improvement([[3.0, 1.0]], [[2.0, 1.0]]) == (1 + 1 + 0 + 0.5) / 4
    assert aggregates.probability_of_improvement([[3.0], [0.0]], [[2.0], [1.0]]) == 0.5


def test_the_interval_is_that_of_seeds_drawn_anew_in_each_task():
    """Against all ways to draw three seeds of each of two tasks."""
    scores = [[0.0, 1.0, 5.0], [10.0, 12.0, 30.0]]
    drawn = [list(itertools.product(task, repeat=3)) for task in scores]
    every = [aggregates.interquartile_mean(both) for both in itertools.product(*drawn)]
    found = aggregates.interval(aggregates.interquartile_mean, scores)
    assert found.value == aggregates.interquartile_mean(scores)
    low, high = np.quantile(every, (0.025, 0.975))
    assert found.low == pytest.approx(low, abs=0.4) and found.high == pytest.approx(high, abs=1.5)
    assert found == aggregates.interval(aggregates.interquartile_mean, scores)


def test_the_end_the_area_and_the_collapses_of_a_run():
    returns = [None, -100.0] + [-50.0] * 5 + [-64.0, -66.0, -200.0, -50.0, -50.0]
    lines = [{"env_steps": 100 * (i + 1), "result.true": value} for i, value in enumerate(returns)]
    assert aggregates.final(lines) == -50.0
    assert aggregates.over_all(lines) == pytest.approx(-780 / 11)
    assert aggregates.collapses(lines) == 2  # -66 and -200; -64 is within 15 of -50.
