"""The aliased hike as a picture: the exact belief about the position, beside readings and particles."""

from collections.abc import Iterator

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dvrl_jax.envs import aliased_hike, hike_grid, mountain_hike, wrappers
from dvrl_jax.viewing.pictures.hike import PARTICLE, PATH, READING, figure_to_array, layout, legend
from dvrl_jax.viewing.recording import Recording

EXTENT = (-hike_grid.EXTENT, hike_grid.EXTENT) * 2
FARTHEST = 3.0  # Distances that are drawn.
NOT_TRACKED = (*wrappers.OF_ONE, "obs_delay", "p_repeat")  # An exact belief knows of blank observations alone.
QUARTERS = {"lower left": (-1, -1), "upper left": (-1, 1), "lower right": (1, -1), "upper right": (1, 1)}


def exact_belief(recording: Recording) -> np.ndarray:
    """P(position in a cell), [T, n, n] as [x, y], given the observations so far; a blank one says nothing."""
    std = recording.view.observation_std[0]
    return np.asarray(jax.jit(aliased_hike.track)(recording.obs, recording.action, std, observed=recording.observed))


def quarters(belief: np.ndarray) -> np.ndarray:
    """Probabilities [T, 4] of the map's quarters, in the order of `QUARTERS`."""
    half = belief.shape[-1] // 2
    return belief.reshape(len(belief), 2, half, 2, half).sum(axis=(2, 4)).reshape(len(belief), 4)


class AliasedPainter:
    """One episode: the exact belief on the map; distances read and reconstructed, and where the belief has its mass."""

    fps, undrawn = 8, NOT_TRACKED

    def frames(self, recording: Recording) -> Iterator[np.ndarray]:
        """The belief of the step as a heat map, with the path so far."""
        figure, (axis, *side) = layout(4)
        belief = exact_belief(recording)
        image = _draw_map(axis, belief[0])
        (path,) = axis.plot([], [], color=PATH, linewidth=1.2, label="true path")
        (here,) = axis.plot([], [], "o", color=PATH, markeredgecolor="black", markersize=8, label="true position")
        legend(axis)
        _prepare_distances(side[0])
        (reading,) = side[0].plot([], [], "x", color=READING, markersize=9, markeredgewidth=2.5, label="reading")
        (truth,) = side[0].plot([], [], "o", color="tab:gray", markeredgecolor="black", label="true distances")
        dots = side[0].scatter([], [], color=PARTICLE, edgecolors="black", linewidths=0.5, label="particles")
        side[0].legend(fontsize="small", loc="lower right")
        cursors = _curves(side[1:], recording, belief)
        total = np.concatenate([[0.0], np.cumsum(recording.reward)])
        position = recording.view.position
        distances = np.asarray(aliased_hike.beacon_distances(position))
        for t, now in enumerate(position):
            image.set(data=belief[t].T, clim=(0.0, belief[t].max()))
            path.set_data(*position[: t + 1].T)
            here.set_data([now[0]], [now[1]])
            reading.set_data(*(_distances(recording.obs[t : t + 1]).T if recording.observed[t] else ([], [])))
            truth.set_data(*distances[t : t + 1].T)
            if recording.particles is not None:
                dots.set_offsets(_distances(recording.particles[t]))
                dots.set_sizes(15 + 200 * recording.weights[t])
            for cursor in cursors:
                cursor.set_xdata([t, t])
            axis.set_title(f"step {t + 1}, return so far {total[t]:.1f}")
            yield figure_to_array(figure)

    def still(self, recording: Recording) -> np.ndarray:
        """The belief at eight times of the episode, each with the path so far, and where its mass was."""
        figure = Figure(figsize=(13.0, 9.0), dpi=80, layout="constrained")
        grid = figure.add_gridspec(3, 4, height_ratios=(2, 2, 1))
        belief, position = exact_belief(recording), recording.view.position
        times = np.linspace(0, len(position) - 1, 8).astype(int)
        for number, t in enumerate(times):
            axis = figure.add_subplot(grid[number // 4, number % 4])
            _draw_map(axis, belief[t])
            axis.plot(*position[: t + 1].T, color=PATH, linewidth=1.2)
            axis.plot(*position[t], "o", color=PATH, markeredgecolor="black", markersize=7)
            axis.set_title(f"step {t + 1}", fontsize="medium")
            axis.label_outer()
        sides = [figure.add_subplot(grid[2, :2]), figure.add_subplot(grid[2, 2:])]
        _curves(sides, recording, belief, cursor=False)
        figure.suptitle(f"exact belief in one episode of {len(position)} steps, return {recording.reward.sum():.1f}")
        return figure_to_array(figure)

    def predictions(
        self, observation: np.ndarray, observed: np.ndarray, predicted: dict[int, np.ndarray]
    ) -> np.ndarray:
        """Distances per environment: the reading, if any, and those expected dt steps later, dark red to white."""
        figure = Figure(figsize=(7.0, 6.3), dpi=80, layout="constrained")
        columns = 1 if len(observation) == 1 else 2
        axes = figure.subplots(-(-len(observation) // columns), columns, squeeze=False, sharex=True, sharey=True)
        times = sorted(predicted)
        for axis in axes.flat[len(observation) :]:
            axis.remove()
        for number, axis in enumerate(axes.flat[: len(observation)]):
            _prepare_distances(axis)
            expected = _distances(np.stack([predicted[dt][number] for dt in times]))
            dots = axis.scatter(*expected.T, c=times, cmap="Reds_r", edgecolors="black", linewidths=0.5, zorder=3)
            if observed[number]:
                axis.plot(*_distances(observation[number]), "x", color=READING, markersize=9, markeredgewidth=2.5)
            axis.set_title(f"environment {number}", fontsize="medium")
            axis.label_outer()
        figure.colorbar(dots, ax=axes, ticks=times, label="steps ahead", shrink=0.6)
        figure.suptitle("orange: the reading; dots: distances expected some steps ahead (0: now)", fontsize="medium")
        return figure_to_array(figure)


def _distances(observations: np.ndarray) -> np.ndarray:
    return observations / mountain_hike.OBSERVATION_SCALE


def _draw_map(axis: Axes, belief: np.ndarray):
    image = axis.imshow(belief.T, origin="lower", extent=EXTENT, cmap="magma", vmin=0.0)
    axis.add_patch(Rectangle((-1, -1), 2, 2, fill=False, edgecolor="white", linewidth=0.8, linestyle=":"))
    axis.plot(*np.transpose(aliased_hike.BEACONS), "^", color="tab:cyan", markersize=7, label="beacons")
    axis.set(xlim=EXTENT[:2], ylim=EXTENT[2:], xlabel="x", ylabel="y")
    return image


def _prepare_distances(axis: Axes) -> None:
    axis.set(xlim=(0, FARTHEST), ylim=(0, FARTHEST))
    axis.set(xlabel="to the nearer beacon", ylabel="to the farther one")
    axis.grid(alpha=0.3)


def _curves(axes: list[Axes], recording: Recording, belief: np.ndarray, cursor: bool = True) -> list:
    """The belief's mass by quarter of the map, and values; returns the cursors to move."""
    steps = np.arange(len(belief))
    axes[0].stackplot(steps, quarters(belief).T, labels=list(QUARTERS), alpha=0.8)
    axes[0].set(ylim=(0, 1), ylabel="exact belief's\nmass by quarter")
    axes[0].legend(fontsize="x-small", loc="upper left", ncols=2)
    axes[1].plot(steps, recording.value, color="tab:green")
    axes[1].set(ylabel="value", xlabel="step")
    axes[1].ticklabel_format(useOffset=False)
    for axis in axes:
        axis.margins(x=0)
        axis.grid(alpha=0.3)
    return [axis.axvline(0, color="black", linewidth=0.8) for axis in axes] if cursor else []
