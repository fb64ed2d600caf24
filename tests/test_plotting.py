"""Runs are grouped by what differs between them, and curves average over seeds."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dvrl_jax.errors import RunError
from dvrl_jax.viewing import plotting

ROOT = Path(__file__).parent.parent


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
    with pytest.raises(RunError, match="holds 1"):
        plotting.load_run(tmp_path / "2")
    with pytest.raises(RunError, match=r"there are env_steps, result\.true"):
        plotting.check_metric([run], "result.tru")


def test_seeds_without_a_value_yet_are_drawn_as_nothing(tmp_path):
    both = [write_run(tmp_path / str(seed), [10, 20], [None, None], seed=seed) for seed in (0, 1)]
    curve = plotting.curve("rnn", both, "result.true")
    assert curve.steps.size == 0 and curve.spread is None
    plotting.plot(both, ["result.true"])


def test_a_belief_without_an_elbo_is_not_drawn_as_one_of_zero(tmp_path):
    for name, losses in (("rnn", [0.0, 0.0]), ("dvrl", [6.0, 5.0])):
        run = write_run(tmp_path / name, [10, 20], [1.0, 2.0], algorithm=name)
        lines = [line | {"loss.encoding": loss} for line, loss in zip(run.lines, losses, strict=True)]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = [plotting.load_run(tmp_path / name) for name in ("rnn", "dvrl")]
    returns, losses = plotting.plot(both, ["result.true", "loss.encoding"]).axes
    assert [line.get_ydata().tolist() for line in returns.lines] == [[1.0, 2.0]] * 2
    assert [line.get_ydata().tolist() for line in losses.lines] == [[], [6.0, 5.0]]


def test_a_seed_without_values_is_not_counted(tmp_path):
    both = [
        write_run(tmp_path / str(seed), [10, 20], values, seed=seed) for seed, values in enumerate(([1, 2], [None] * 2))
    ]
    curve = plotting.curve("rnn", both, "result.true")
    assert curve.label == "rnn" and curve.spread is None
    np.testing.assert_array_equal(curve.mean, [1.0, 2.0])


def test_seeds_without_steps_in_common_are_named_as_such(tmp_path):
    both = [
        write_run(tmp_path / str(seed), steps, [1.0, 2.0], seed=seed) for seed, steps in enumerate(([1, 2], [3, 4]))
    ]
    curve = plotting.curve("rnn", both, "result.true")
    assert curve.label == "rnn (2 seeds), no steps in common" and curve.steps.size == 0
    plotting.plot(both, ["result.true"])


def test_what_are_no_seeds_are_called_runs(tmp_path):
    both = [write_run(tmp_path / name, [10, 20], [1.0, 2.0], seed=3) for name in "ab"]
    assert plotting.curve("rnn", both, "result.true").label == "rnn (2 runs)"


def test_curves_can_be_told_apart_without_colour_and_a_long_legend_stays_within_the_figure(tmp_path):
    fields = {f"loss.{name}_coef": 0.0 for name in ("value", "action", "entropy", "encoding")}
    many = [write_run(tmp_path / str(i), [10, 20], [1.0, 2.0], **dict.fromkeys(fields, i * 0.12345)) for i in range(12)]
    figure = plotting.plot(many, ["result.true"])
    lines = figure.axes[0].lines
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 12
    assert all(line.get_markevery()[0] < 2 for line in lines)  # A marker, even on two points.
    (png, _), legend = plotting.save(figure, tmp_path / "x"), figure.legends[0]
    figure.draw_without_rendering()
    extent, labels = legend.get_window_extent(), [text.get_text() for text in legend.get_texts()]
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width and extent.y0 >= 0
    assert extent.y1 < figure.axes[0].get_tightbbox().y0  # Below the panel, on nothing.
    assert figure.axes[0].bbox.height > 200  # Which keeps its height.
    assert [" ".join(label.split()) for label in labels] == list(plotting.group_runs(many))
    pixels = matplotlib.image.imread(png)
    assert pixels.shape[1] == 150 * plotting.WIDTH and np.all(pixels[..., 3] == 1.0)  # Opaque, for dark pages.


def test_the_legend_says_what_the_band_is(tmp_path):
    runs = [write_run(tmp_path / str(seed), [10, 20], [1.0, 2.0 + seed], seed=seed) for seed in range(3)]
    said = lambda loaded: plotting.plot(loaded, ["result.true"]).legends[0].get_title().get_text()
    assert said(runs) == "line: mean, band: ± one standard deviation of 3 seeds"
    runs += [write_run(tmp_path / name, [10, 20], [1.0, 2.0], algorithm="dvrl", seed=3) for name in "ab"]
    assert said(runs) == "line: mean, band: ± one standard deviation of 2 runs or 3 seeds"
    assert said(runs[:1]) == ""


def plot(tmp_path, *arguments):
    command = [sys.executable, ROOT / "plot.py", f"--root={tmp_path}", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_a_run_that_is_named_twice_is_drawn_once(tmp_path):
    write_run(tmp_path / "1", [10, 20], [1.0, 2.0])
    result = plot(tmp_path, "--id=1,1", f"--workdir={tmp_path}/1", "--out=x.png")
    assert result.returncode == 0 and result.stdout == "x.png\nx.svg\n", result.stderr
    assert "seeds" not in (tmp_path / "x.svg").read_text()


def test_a_curve_can_be_seen_without_leaving_the_terminal(tmp_path):
    write_run(tmp_path / "1", [10, 20], [1.0, 2.0])
    write_run(tmp_path / "2", [10, 20], [3.0, 4.0], seed=1)
    result = plot(tmp_path, "--id=1,2", "--text")
    assert result.returncode == 0 and result.stdout.startswith("result.true, rnn (2 seeds)\n3 |"), result.stderr
    assert result.stdout.endswith("20 steps\n") and not list(tmp_path.glob("plots/*"))


def test_plots_of_many_runs_have_a_name_that_files_can_have(tmp_path):
    assert plotting.name_of([tmp_path / "1", tmp_path / "2"], ["a.b", "c"]) == "1_2-a.b_c"
    assert plotting.name_of([tmp_path / str(i) for i in range(1000, 1090)], ["a"]) == "1000_to_1089-a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id=1", "--metric="], "--metric: name at least one metric"),
        (["--id=,"], "--id: name at least one run"),
        (["--id=1", "--out=.png"], "--out: '.png' is no name of a file"),
        (["--id=1", "--out=/proc/nothing/x"], "/proc/nothing/x.png: cannot be written"),
    ],
)
def test_a_plot_that_cannot_be_made_is_refused(arguments, message, tmp_path):
    write_run(tmp_path / "1", [10, 20], [1.0, 2.0])
    result = plot(tmp_path, *arguments)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1
