"""RockSample as a picture: the map, and the exact belief about each rock over time."""

from collections.abc import Iterator

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dvrl_jax.envs import rock_sample
from dvrl_jax.viewing.pictures.aliased import NOT_TRACKED
from dvrl_jax.viewing.pictures.hike import figure_to_array, layout
from dvrl_jax.viewing.recording import Recording

COLOURS = "RdYlGn"  # P(rock is good) from 0 to 1.
SIDES = {2 * n + len(rocks): n for n, rocks in rock_sample.LAYOUTS.values()}  # By the size of an observation.
ACTIONS = ("north", "east", "south", "west", "sample")


def exact_belief(recording: Recording) -> np.ndarray:
    """P(rock is good), [T, k], given the observations so far; a blank one says nothing."""
    view = recording.view
    rocks = view.rocks[0]
    readings = recording.obs[:, -len(rocks) :] * recording.observed[:, None]

    def step(belief, inputs):
        belief = rock_sample.update_belief(belief, *inputs, rocks)
        return belief, belief

    first = rock_sample.first_belief(len(rocks))
    later = jax.lax.scan(step, first, (view.position[1:], recording.action[:-1], readings[1:]))[1]
    return np.concatenate([first[None], later])


def action_name(action: int) -> str:
    """What an action is called, such as "check 2"."""
    return ACTIONS[action] if action < rock_sample.CHECK else f"check {action - rock_sample.CHECK}"


class RockPainter:
    """One episode on the map. A rock is filled by the exact belief; its edge tells whether it is good."""

    fps, undrawn = 3, NOT_TRACKED

    def frames(self, recording: Recording) -> Iterator[np.ndarray]:
        """The map with the belief of the step; the belief over time, action probabilities and values."""
        figure, (axis, *side) = layout(4)
        belief = exact_belief(recording)
        cursors = _curves([side[0], side[2]], recording, belief)
        names = [action_name(a) for a in range(recording.policy.shape[1])]
        bars = side[1].bar(names, recording.policy[0], color="tab:blue")
        side[1].set(ylim=(0, 1), ylabel="policy")
        side[1].tick_params(axis="x", labelrotation=90, labelsize="x-small")
        total = np.concatenate([[0.0], np.cumsum(recording.reward)])
        for t in range(len(belief)):
            axis.clear()
            _draw_map(axis, recording, belief, t)
            for bar, probability in zip(bars, recording.policy[t], strict=True):
                bar.set_height(probability)
            for cursor in cursors:
                cursor.set_xdata([t, t])
            taken = action_name(int(recording.action[t]))
            axis.set_title(f"step {t + 1}: {taken}; return so far {total[t]:g}")
            yield figure_to_array(figure)

    def still(self, recording: Recording) -> np.ndarray:
        """The map at the end with the whole path, and the belief over time."""
        figure, (axis, *side) = layout(3)
        belief = exact_belief(recording)
        _draw_map(axis, recording, belief, len(belief) - 1)
        axis.set_title(f"one episode of {len(belief)} steps, return {recording.reward.sum():g}")
        _curves(side, recording, belief, cursor=False)
        return figure_to_array(figure)

    def predictions(
        self, observation: np.ndarray, observed: np.ndarray, predicted: dict[int, np.ndarray]
    ) -> np.ndarray:
        """A column per environment: each number of the observation, and what is expected of it dt steps later."""
        figure = Figure(figsize=(2.0 + 2.0 * len(observation), 6.3), dpi=80, layout="constrained")
        axes = figure.subplots(1, len(observation), squeeze=False, sharey=True)[0]
        times, n = sorted(predicted), SIDES[observation.shape[-1]]
        for number, axis in enumerate(axes):
            shown = observation[number] if observed[number] else np.full(observation.shape[-1], np.nan)
            columns = np.stack([shown, *(predicted[dt][number] for dt in times)], axis=-1)
            image = axis.imshow(columns, cmap="RdBu", vmin=-1.0, vmax=1.0, aspect="auto", interpolation="nearest")
            axis.set_xticks(range(len(times) + 1), ["seen", *(f"+{dt}" for dt in times)], fontsize="small")
            for edge in (n - 0.5, 2 * n - 0.5):
                axis.axhline(edge, color="black", linewidth=0.8)
            axis.set_title(f"environment {number}", fontsize="medium")
        k = observation.shape[-1] - 2 * n
        axes[0].set_yticks([n / 2, 1.5 * n, 2 * n + k / 2], ["row", "column", "readings"], rotation=90, va="center")
        figure.colorbar(image, ax=axes, shrink=0.6)
        return figure_to_array(figure)


def _draw_map(axis: Axes, recording: Recording, belief: np.ndarray, t: int) -> None:
    view = recording.view
    rocks, path = view.rocks[0], view.position[: t + 1]
    n = SIDES[recording.obs.shape[-1]]
    edges = np.where(view.good[t], "green", "darkred")
    style = {"cmap": COLOURS, "vmin": 0.0, "vmax": 1.0, "s": 16_000 / n, "linewidths": 3, "marker": "s"}
    axis.scatter(rocks[:, 1], rocks[:, 0], c=belief[t], edgecolors=edges, **style)
    for i, (row, column) in enumerate(rocks):
        plate = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
        text = f"{i}: {belief[t, i]:.2f}"
        axis.text(column, row + 0.28, text, ha="center", va="center", fontsize="small", bbox=plate)
    axis.plot(path[:, 1], path[:, 0], color="tab:blue", linewidth=1.5, alpha=0.6)
    axis.plot(path[-1, 1], path[-1, 0], "o", color="tab:blue", markeredgecolor="black", markersize=12)
    axis.axvline(n - 0.5, color="black", linewidth=3)
    axis.set(xlim=(-0.5, n - 0.4), ylim=(n - 0.5, -0.5), aspect="equal", xticks=range(n), yticks=range(n))
    axis.set_xlabel("filled: P(good); edge: green if good; the exit lies to the right")
    axis.set_axisbelow(True)
    axis.grid(alpha=0.3)


def _curves(axes: list[Axes], recording: Recording, belief: np.ndarray, cursor: bool = True) -> list:
    """The belief over time, with a mark for each reading, and values; returns the cursors to move."""
    steps, k = np.arange(len(belief)), belief.shape[1]
    axes[0].imshow(belief.T, cmap=COLOURS, vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    readings = recording.obs[:, -k:] * recording.observed[:, None]
    for value, marker in ((1.0, "+"), (-1.0, "_")):
        axes[0].plot(*np.nonzero(readings == value), marker, color="black", markersize=7)
    axes[0].set(ylabel="rock", yticks=range(k), title="exact P(good); + and - are readings")
    axes[1].plot(steps, recording.value, color="tab:green")
    axes[1].set(ylabel="value", xlabel="step")
    axes[1].ticklabel_format(useOffset=False)
    axes[1].grid(alpha=0.3)
    return [axis.axvline(0, color="black", linewidth=0.8) for axis in axes] if cursor else []
