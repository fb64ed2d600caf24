"""Mountain Hike as a picture: the landscape, the true path, the readings, and where the belief puts the hiker."""

import functools
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from dvrl_jax.envs import mountain_hike
from dvrl_jax.viewing.recording import Recording

LIMIT = 1.5  # The map goes a little beyond the box, since readings do.
READING, PARTICLE, BELIEF, PATH = "tab:orange", "tab:red", "tab:red", "white"
READABLE = {"width": 9.0, "ratio": 2.1}  # At 800 pixels, as on a page of GitHub.
# Edges of what lies on the light part of the landscape, or on particles.
DARK_EDGE = [withStroke(linewidth=3.0, foreground="black")]
LIGHT_EDGE = [withStroke(linewidth=3.5, foreground="white")]


def positions(observations: np.ndarray) -> np.ndarray:
    """Observations [..., 2] as positions in the box; further components, which are noise, are left out."""
    return observations[..., :2] / mountain_hike.OBSERVATION_SCALE


@functools.cache
def _heights() -> np.ndarray:
    """The reward of standing at each place of the map, [y, x]."""
    ticks = np.linspace(-LIMIT, LIMIT, 321)
    return np.asarray(mountain_hike.height_reward(np.stack(np.meshgrid(ticks, ticks), axis=-1)))


def draw_landscape(axis: Axes, colorbar: bool = True) -> None:
    """The reward of standing at each place, with the box's edge; x to the right, y upwards."""
    extent = (-LIMIT, LIMIT, -LIMIT, LIMIT)
    image = axis.imshow(_heights(), origin="lower", extent=extent, cmap="viridis", interpolation="bilinear")
    if colorbar:
        axis.figure.colorbar(image, ax=axis, label="reward per step at a place", fraction=0.046, pad=0.03)
    axis.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="white", linewidth=0.8, linestyle=":"))
    axis.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xlabel="x", ylabel="y")


def belief_positions(recording: Recording) -> np.ndarray | None:
    """Where the belief puts the hiker, [T, 2]: the weighted mean over particles; None if it reconstructs nothing."""
    return positions(recording.predictions[0]) if 0 in recording.predictions else None


class HikePainter:
    """One episode on the map, or predictions of several at once."""

    fps = 8

    def frames(self, recording: Recording) -> Iterator[np.ndarray]:
        """The map with the step's particles, earlier readings small; at the right distances, values and weights."""
        figure, (axis, *side) = layout(4 if recording.weights is not None else 3, **READABLE)
        draw_landscape(axis)
        (path,) = axis.plot([], [], color=PATH, linewidth=1.8, label="true path", path_effects=DARK_EDGE)
        (earlier,) = axis.plot([], [], "x", color=READING, markersize=5, markeredgewidth=1.2)
        dots = axis.scatter(
            [], [], color=PARTICLE, edgecolors="black", linewidths=0.6, zorder=2, label="particles (area: weight)"
        )
        ring = {"markerfacecolor": "none", "markersize": 13, "markeredgewidth": 2.0, "path_effects": DARK_EDGE}
        (here,) = axis.plot([], [], "o", markeredgecolor=PATH, label="true position", **ring)
        (reading,) = axis.plot([], [], "x", color=READING, markersize=10, markeredgewidth=3.0, label="reading")
        reading.set_path_effects([withStroke(linewidth=5, foreground="black")])
        believed = belief_positions(recording)
        if believed is not None:
            (guess,) = axis.plot([], [], "+", color=BELIEF, markersize=9, markeredgewidth=1.8, label="belief's mean")
            guess.set_path_effects(LIGHT_EDGE)  # It usually lies on particles.
        legend(axis, skip=() if recording.particles is not None else ("particles (area: weight)",))
        title = axis.set_title("")
        cursors = _curves(side, recording)
        if recording.weights is not None:
            bars = side[-1].bar(np.arange(recording.weights.shape[1]), recording.weights[0], color="tab:blue")
            side[-1].set(ylim=(0, 1), xlabel="particle", ylabel="weight")
        total = np.concatenate([[0.0], np.cumsum(recording.reward)])
        for t, now in enumerate(recording.view):
            path.set_data(*recording.view[: t + 1].T)
            here.set_data([now[0]], [now[1]])
            reading.set_data(*(positions(recording.obs[t : t + 1]).T if recording.observed[t] else ([], [])))
            earlier.set_data(*positions(recording.obs[:t][recording.observed[:t]]).T)
            if believed is not None:
                guess.set_data(*believed[t : t + 1].T)
            if recording.particles is not None:
                dots.set_offsets(positions(recording.particles[t]))
                dots.set_sizes(25 + 400 * recording.weights[t])
            if recording.weights is not None:
                for bar, weight in zip(bars, recording.weights[t], strict=True):
                    bar.set_height(weight)
            for cursor in cursors:
                cursor.set_xdata([t, t])
            title.set_text(f"step {t + 1}, return so far {total[t]:.1f}")
            yield figure_to_array(figure)

    def still(self, recording: Recording) -> np.ndarray:
        """The whole episode: path, all readings, all particles, and the belief's mean step by step."""
        return figure_to_array(self.figure(recording))

    def figure(self, recording: Recording) -> Figure:
        """The still as a matplotlib figure, for notebooks."""
        figure, (axis, *side) = layout(3, **READABLE)
        draw_landscape(axis)
        if recording.particles is not None:
            where, sizes = positions(recording.particles).reshape(-1, 2), 8 + 120 * recording.weights.ravel()
            axis.scatter(*where.T, s=sizes, color=PARTICLE, alpha=0.75, linewidths=0, label="particles (area: weight)")
        readings = positions(recording.obs[recording.observed])
        axis.plot(*readings.T, "x", color=READING, markersize=6, markeredgewidth=1.6, label="readings")
        axis.plot(*recording.view.T, color=PATH, linewidth=1.8, label="true path", path_effects=DARK_EDGE)
        believed = belief_positions(recording)
        if believed is not None:
            axis.plot(*believed.T, "-", color=BELIEF, linewidth=1.2, label="belief's mean", path_effects=DARK_EDGE)
        axis.plot(*recording.view[0], "o", color=PATH, markeredgecolor="black", markersize=8, label="start")
        legend(axis)
        axis.set_title(f"one episode of {len(recording.view)} steps, return {recording.reward.sum():.1f}")
        _curves(side, recording, cursor=False)
        return figure

    def predictions(
        self, observation: np.ndarray, observed: np.ndarray, predicted: dict[int, np.ndarray]
    ) -> np.ndarray:
        """A map per environment: the reading, if any, and the positions expected dt steps later, dark red to white."""
        figure = Figure(figsize=(7.0, 6.3), dpi=80, layout="constrained")
        columns = 1 if len(observation) == 1 else 2
        rows = -(-len(observation) // columns)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        times = sorted(predicted)
        expected = positions(np.stack([predicted[dt] for dt in times], axis=1))
        for number, axis in enumerate(axes.flat):
            if number >= len(observation):
                axis.remove()
                continue
            draw_landscape(axis, colorbar=False)
            axis.plot(*expected[number].T, color=PATH, linewidth=0.8)
            dots = axis.scatter(
                *expected[number].T, c=times, cmap="Reds_r", edgecolors="black", linewidths=0.5, zorder=3
            )
            if observed[number]:
                axis.plot(*positions(observation[number]), "x", color=READING, markersize=9, markeredgewidth=2.5)
            axis.set_title(f"environment {number}", fontsize="medium")
            axis.label_outer()
        figure.colorbar(dots, ax=axes.flat[: len(observation)], ticks=times, label="steps ahead", shrink=0.6)
        figure.suptitle(
            "orange: the reading; dots: positions expected some steps ahead (0: the reconstruction)", fontsize="medium"
        )
        return figure_to_array(figure)


def layout(panels: int, width: float = 11.0, ratio: float = 1.75) -> tuple[Figure, list[Axes]]:
    """A map at the left, `ratio` times as wide as panels - 1 small axes at the right.

    The figure has 990 x 594 pixels; the smaller its `width` in inches, the larger is its text.
    """
    figure = Figure(figsize=(width, 0.6 * width), dpi=990 / width, layout="constrained")
    grid = figure.add_gridspec(panels - 1, 2, width_ratios=(ratio, 1.0))
    return figure, [figure.add_subplot(grid[:, 0]), *(figure.add_subplot(grid[i, 1]) for i in range(panels - 1))]


def legend(axis: Axes, skip: tuple[str, ...] = ()) -> None:
    entries = [(h, label) for h, label in zip(*axis.get_legend_handles_labels(), strict=True) if label not in skip]
    # Below the map, where it hides nothing; dark, because the path is white.
    style = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 3}
    style |= {"handlelength": 1.5, "handletextpad": 0.5, "columnspacing": 1.0}
    style |= {"facecolor": "0.35", "labelcolor": "white"}
    for handle in axis.legend(*zip(*entries, strict=True), **style).legend_handles:
        handle.set_alpha(1.0)


def _curves(axes: list[Axes], recording: Recording, cursor: bool = True) -> list:
    """Distances to the true position, and values with the effective sample size; returns the cursors to move."""
    steps = np.arange(len(recording.view))
    distance = lambda where: np.linalg.norm(where - recording.view, axis=-1)
    readings = np.where(recording.observed, distance(positions(recording.obs)), np.nan)
    axes[0].plot(steps, readings, "x", color=READING, markersize=4, label="reading")
    believed = belief_positions(recording)
    if believed is not None:
        axes[0].plot(steps, distance(believed), color=BELIEF, label="belief's mean")
    axes[0].set(ylabel="distance to the\ntrue position", ylim=(0, None))
    axes[0].legend(fontsize="small")
    axes[1].plot(steps, recording.value, color="tab:green", label="value")
    axes[1].set(ylabel="value", xlabel="step")
    axes[1].ticklabel_format(useOffset=False)
    if recording.weights is not None:
        twin = axes[1].twinx()
        twin.plot(steps, recording.effective_sample_size, color="tab:blue", linewidth=1)
        twin.set_ylabel("effective sample size", color="tab:blue")
        twin.set_ylim(0.9, recording.weights.shape[1])
        axes[1].yaxis.label.set_color("tab:green")
    for axis in axes[:2]:
        axis.grid(alpha=0.3)
    return [axis.axvline(0, color="black", linewidth=0.8) for axis in axes[:2]] if cursor else []


def figure_to_array(figure: Figure) -> np.ndarray:
    """A figure as pixels, uint8 [height, width, 3], cropped to an even size; needs no display."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2].copy()
