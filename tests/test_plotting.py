"""Runs are grouped by what differs between them, and curves average over seeds."""

import json

import numpy as np
import pytest

from dvrl_jax import plotting, runs


def write_run(path, steps, values, **fields):
    path.mkdir(parents=True)
    fields = {"algorithm": "rnn", "env.name": "MountainHike", "seed": 0, "total_env_steps": 9} | fields
    (path / "config.json").write_text(json.dumps(fields))
    lines = [
        {"update": i, "env_steps": s, "result.true": v} for i, (s, v) in enumerate(zip(steps, values, strict=True))
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plotting.load_run(path)


def test_runs_that_differ_only_in_their_seed_become_one_curve(tmp_path):
    a = write_run(tmp_path / "1", [10, 20, 30], [None, 2.0, 4.0], seed=0, total_env_steps=5)
    b = write_run(tmp_path / "2", [10, 20, 40], [0.0, 4.0, 8.0], seed=1)
    c = write_run(tmp_path / "3", [10, 20], [1.0, 1.0], algorithm="dvrl")
    groups = plotting.group_runs([a, b, c])
    assert {label: len(group) for label, group in groups.items()} == {"rnn": 2, "dvrl": 1}
    curve = plotting.curve("rnn", groups["rnn"], "result.true")
    np.testing.assert_array_equal(curve.steps, [20, 30])
    np.testing.assert_allclose(curve.mean, [3.0, 5.0])
    np.testing.assert_allclose(curve.spread, [np.sqrt(2.0), np.sqrt(2.0)])


def test_the_legend_names_the_fields_that_differ(tmp_path):
    a = write_run(tmp_path / "1", [1], [1.0], **{"model.num_particles": 10})
    b = write_run(tmp_path / "2", [1], [1.0], **{"model.num_particles": 30})
    assert set(plotting.group_runs([a, b])) == {"model.num_particles=10", "model.num_particles=30"}


def test_the_legend_names_the_agent_and_what_varies_within_one(tmp_path):
    a = write_run(tmp_path / "1", [1], [1.0], **{"loss.encoding_coef": 0.0})
    b = write_run(tmp_path / "2", [1], [1.0], **{"loss.encoding_coef": 0.0, "loss.reward_scale": 0.1})
    c = write_run(tmp_path / "3", [1], [1.0], algorithm="dvrl", **{"loss.encoding_coef": 0.1})
    a, c = (plotting.load_run(run.path, {"loss.reward_scale": 1.0, "seed": 7}) for run in (a, c))  # Older runs.
    assert a.fields["loss.reward_scale"] == 1.0 and a.fields["seed"] == 0
    names = {"rnn, loss.reward_scale=1.0", "rnn, loss.reward_scale=0.1", "dvrl, loss.reward_scale=1.0"}
    assert set(plotting.group_runs([a, b, c])) == names


def test_what_does_not_exist_is_answered_with_what_does(tmp_path):
    run = write_run(tmp_path / "1", [1], [1.0])
    with pytest.raises(runs.RunError, match="holds 1"):
        plotting.load_run(tmp_path / "2")
    with pytest.raises(runs.RunError, match=r"there are env_steps, result\.true"):
        plotting.check_metric([run], "result.tru")


def test_seeds_without_a_value_yet_are_drawn_as_nothing(tmp_path):
    both = [write_run(tmp_path / str(seed), [10, 20], [None, None], seed=seed) for seed in (0, 1)]
    curve = plotting.curve("rnn", both, "result.true")
    assert curve.steps.size == 0 and curve.spread is None
    plotting.plot(both, ["result.true"])
