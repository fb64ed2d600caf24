"""Learning curves from run directories: runs that differ only in their seed become one line with a band."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dvrl_jax.errors import RunError
from dvrl_jax.runs import config, run_directory

UNITS = {
    "result": "return per episode",
    "loss": "loss",
    "loss.encoding": "-ELBO (nats per step), or observation loss",
    "loss.entropy": "policy entropy (nats)",
    "particles.killed": "particles killed per step",
    "episodes.num_ended": "episodes",
    "episodes.length": "steps per episode",
    "obs.fps": "environment steps / s",
    "obs.avg_nr_observed": "share of observations seen",
    "gradient.norm": "gradient norm before clipping",
    "wall_time": "seconds",
}


# Of 4 styles and 7 markers, 28 curves each have a pair of their own, so that they can be told apart without colour.
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NUM_MARKS = 8  # About as many markers on a curve.

WIDTH, PANEL_HEIGHT = 7.0, 3.9  # Inches.

KINDS = ("algorithm", "env.name")  # The fields that say what a run is; others follow from them.


class Run(NamedTuple):
    """One run: its directory, configuration by dotted names, and metrics lines."""

    path: Path
    fields: dict[str, Any]
    lines: list[dict[str, Any]]


class Curve(NamedTuple):
    """One line of a plot: `mean` and `spread` (None for a single run) at `steps`, and over what, such as "3 seeds"."""

    label: str
    steps: np.ndarray
    mean: np.ndarray
    spread: np.ndarray | None
    over: str = "1 seed"


def load_run(path: Path, defaults: Mapping[str, Any] = {}) -> Run:
    """Reads a run directory; fields younger than the run have their value from `defaults`.

    Raises:
        RunError: it is not one, or has no metrics yet; the message lists what there is.
    """
    fields = run_directory.read_config(path)
    if fields is None or not run_directory.has_metrics(path):
        root = path.parent
        found = sorted(
            (p.name for p in root.glob("*") if run_directory.has_metrics(p)), key=lambda name: (len(name), name)
        )
        raise RunError(f"{path}: not a run with metrics; {root} holds {', '.join(found) or 'none'}")
    for field in KINDS:
        if not isinstance(fields.get(field, ""), str):
            raise RunError(f"{path / 'config.json'}: {field} = {fields[field]!r}: must be a name")
    return Run(path, dict(defaults) | fields, run_directory.read_metrics(path))


def name_of(paths: list[Path], metrics: list[str], longest: int = 100) -> str:
    """A file's name for a plot of these metrics of these runs: both in full, or the first and the last of many."""

    def said(names: list[str]) -> str:
        whole = "_".join(names)
        return whole if len(whole) <= longest else f"{names[0]}_to_{names[-1]}"[:longest]

    return f"{said([path.resolve().name for path in paths])}-{said(metrics)}"


def check_metric(loaded: list[Run], name: str) -> None:
    """Raises RunError, listing what exists, if no run has logged a metric of that name."""
    known = {key for run in loaded for line in run.lines for key in line} - {"final"}
    if name not in known:
        raise RunError(f"{name}: no such metric; there are {', '.join(sorted(known)) or 'none yet'}")


def _settings(run: Run) -> dict[str, str]:
    """What makes a run comparable: its fields without seed, length, log and checkpoint settings, as text."""
    return {field: str(value) for field, value in config.settings_of(run.fields).items()}


def varied_fields(loaded: list[Run]) -> list[str]:
    """The fields in which runs of the same agent and task differ, without seed, length, log and checkpoint settings."""
    by_kind: dict[tuple, list[dict[str, str]]] = {}
    for run in loaded:
        settings = _settings(run)
        by_kind.setdefault(tuple(settings.get(field) for field in KINDS), []).append(settings)
    fields = sorted({field for run in loaded for field in _settings(run)})
    return [f for f in fields if any(len({one.get(f) for one in alike}) > 1 for alike in by_kind.values())]


def group_runs(loaded: list[Run]) -> dict[str, list[Run]]:
    """Runs by label; runs that differ in nothing but seed, length, log and checkpoint settings share one.

    The label has the agent and the task, where they differ, and the fields in which runs of one agent and task do.
    """
    kinds = [field for field in KINDS if len({run.fields.get(field) for run in loaded}) > 1]
    varied = varied_fields(loaded)
    groups: dict[str, list[Run]] = {}
    for run in loaded:
        settings = _settings(run)
        parts = [settings[field] for field in kinds] + [f"{field}={settings.get(field)}" for field in varied]
        groups.setdefault(", ".join(parts) or run.fields["algorithm"], []).append(run)
    return groups


def curve(label: str, group: list[Run], metric: str, smooth: int = 1) -> Curve:
    """Mean and sample standard deviation over the group's runs, on the steps that all of them cover.

    The label says so if there are no such steps.
    """
    series = []
    for run in group:
        steps = np.array(run_directory.column(run.lines, "env_steps"), float)
        values = np.array(run_directory.column(run.lines, metric), float)
        kept = np.isfinite(values)
        series.append((steps[kept], _smoothed(values[kept], smooth)))
    series = [(x, y) for x, y in series if x.size]
    if not series:  # No value yet, such as a return before any episode has ended.
        return Curve(label, np.array([]), np.array([]), None)
    if len(series) == 1:
        return Curve(label, *series[0], None)
    are_seeds = len({run.fields.get("seed") for run in group}) == len(group)
    over = f"{len(series)} {'seeds' if are_seeds else 'runs'}"
    label = f"{label} ({over})"
    low, high = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    grid = np.unique(np.concatenate([x[(x >= low) & (x <= high)] for x, _ in series]))
    if not grid.size:
        label += ", no steps in common"
    values = np.stack([np.interp(grid, x, y) for x, y in series])
    return Curve(label, grid, values.mean(0), values.std(0, ddof=1), over)


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    if width <= 1 or values.size == 0:
        return values
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(values.size)])


def plot(loaded: list[Run], metrics: list[str], smooth: int = 1) -> Figure:
    """One panel per metric against environment steps; bands are one standard deviation over seeds.

    Curves differ in line style and marker as well as in colour. The legend lies below, within the figure's width.
    """
    groups = group_runs(loaded)
    figure = Figure(figsize=(WIDTH, PANEL_HEIGHT * len(metrics)), layout="constrained", edgecolor="0.7", linewidth=1.0)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)
    over = set()
    for axis, metric in zip(axes[:, 0], metrics, strict=True):
        for index, (label, group) in enumerate(groups.items()):
            line = curve(label, group, metric, smooth)
            if metric == "loss.encoding" and not line.mean.any():
                line = Curve(line.label, np.array([]), np.array([]), None)  # A belief that has no ELBO, not one of 0.
            _draw(axis, line, index, len(groups))
            if line.spread is not None:
                over.add(line.over)
        axis.set_ylabel(f"{metric}\n{UNITS.get(metric, UNITS.get(metric.split('.')[0], ''))}")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("environment steps (millions)")
    title = f"line: mean, band: ± one standard deviation of {' or '.join(sorted(over))}" if over else None
    _add_legend(figure, *axes[0, 0].get_legend_handles_labels(), title)
    return figure


def _draw(axis: Axes, line: Curve, index: int, count: int) -> None:
    """Draws the curve of number `index` of `count`, whose markers lie between those of the others."""
    steps, color = line.steps / 1e6, f"C{index}"
    apart = max(1, steps.size // NUM_MARKS)
    style = {"linestyle": LINE_STYLES[index % len(LINE_STYLES)], "marker": MARKERS[index % len(MARKERS)]}
    style |= {"markersize": 5, "markevery": (apart * index // count, apart)}
    axis.plot(steps, line.mean, color=color, label=line.label, **style)
    if line.spread is not None:
        band = (line.mean - line.spread, line.mean + line.spread)
        axis.fill_between(steps, *band, color=color, alpha=0.2, linewidth=0)


def _add_legend(figure: Figure, handles: list, labels: list[str], title: str | None) -> None:
    """One legend for all panels, below them, in as many columns as fit or with broken lines; the figure grows by it."""
    style = {"loc": "outside lower center", "alignment": "left", "handlelength": 3.5}
    style |= {"fontsize": "small", "title_fontsize": "small"}
    for columns, length in ((3, 200), (2, 200), (1, 200), (1, 80), (1, 55), (1, 35)):
        wrapped = [textwrap.fill(label, length) for label in labels]
        legend = figure.legend(handles, wrapped, title=title, ncols=columns, **style)
        extent = legend.get_window_extent()
        if extent.width <= 0.97 * figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def save(figure: Figure, out: Path) -> list[Path]:
    """Writes a figure to out.png and out.svg, and returns these.

    Raises:
        RunError: they cannot be written.
    """
    files = [Path(f"{out}.{ending}") for ending in ("png", "svg")]
    for file in files:
        with run_directory.writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_name(f"{file.stem}.new{file.suffix}")
            figure.savefig(new, dpi=150, transparent=False)  # Readable on a dark page too.
            new.replace(file)
    return files
