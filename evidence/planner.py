"""The best policy of Mountain Hike by dynamic programming on a grid, for any noise of the readings.

The exact belief (see `kalman.py`) is N(m_t, v_t) with variances that are known in advance: the mean alone is the state
of a Markov decision process, in two dimensions. After action a in belief m at step t, position and next mean are

    p_{t+1} ~ N(m + a, v-_{t+1})            m_{t+1} ~ N(m + a, k_{t+1} v-_{t+1})

both around the same point, so with the outlook of a point x,

    G_t(x) = E[r(x + N(0, v-_{t+1}))] + E[V_{t+1}(x + N(0, k_{t+1} v-_{t+1}))]
    V_t(m) = max_a G_t(m + a) - 0.1 |a|,    V_T = 0

Readings without noise give the planner that sees the true position; noise 0.3 gives the best that any memory can
reach; infinite noise gives the best that can be reached without looking.

Functions live on square cells; expectations sum over cells with the exact probability of each, and values between
cells' centres are interpolated linearly. Beyond the grid the outermost cell goes on for ever. The box's sides lie
between cells, where the reward jumps.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from dvrl_jax.envs import mountain_hike as hike
from dvrl_jax.envs.hike_grid import cell_probabilities
from evidence import kalman

Array = jax.Array

EXTENT = 1.5  # The grid covers [-EXTENT, EXTENT]^2: starts lie 6.5 standard deviations inside.


class Plan(NamedTuple):
    """A policy, and what it promises.

    Attributes:
        axis: [n] centres of cells along x, and along y. actions: [N, 2].
        outlook: [T, n, n] G_t at the cells' centres, before the action's cost.
        value: the mean return that the recursion promises, over the beliefs at the start.
    """

    axis: np.ndarray
    actions: np.ndarray
    outlook: Array
    value: float


def action_set(directions: int) -> np.ndarray:
    """No action, and `directions` directions at the longest and at half the useful length: [1 + 2 directions, 2]."""
    angle = 2.0 * np.pi * np.arange(directions) / max(directions, 1)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    lengths = (hike.MAX_ACTION_NORM, 0.5 * hike.MAX_ACTION_NORM)
    return np.concatenate([np.zeros((1, 2)), *(length * circle for length in lengths)])


def cost(actions: Array) -> Array:
    """What actions [..., 2] cost, [...]."""
    return hike.ACTION_COST * jnp.linalg.norm(actions, axis=-1)


def blur(field: Array, axis: Array, variance: Array) -> Array:
    """E[field(x + N(0, variance))] at every centre x, for field [n, n]."""
    probabilities = cell_probabilities(axis, axis, variance)
    return probabilities @ field @ probabilities.T


def best_action_value(outlook: Array, actions: np.ndarray, spacing: float) -> Array:
    """max_a outlook(x + a) - cost(a) [n, n] at every centre x, for an outlook [n, n].

    The centres are evenly spaced: an action shifts all of them by the same part of a cell.
    """
    cells = np.floor(actions / spacing).astype(np.int32)
    fractions = jnp.asarray(actions / spacing - cells, jnp.float32)
    margin = int(np.abs(cells).max()) + 1
    padded = jnp.pad(outlook, margin, mode="edge")
    n = outlook.shape[0]

    def shifted(x, y):
        return jax.lax.dynamic_slice(padded, (margin + x, margin + y), (n, n))

    def better(best, action):
        (x, y), (u, v), price = action
        left = (1.0 - v) * shifted(x, y) + v * shifted(x, y + 1)
        right = (1.0 - v) * shifted(x + 1, y) + v * shifted(x + 1, y + 1)
        return jnp.maximum(best, (1.0 - u) * left + u * right - price), None

    start = jnp.full_like(outlook, -jnp.inf)
    return jax.lax.scan(better, start, (jnp.asarray(cells), fractions, cost(jnp.asarray(actions))))[0]


def make_plan(observation_std: float, spacing: float, directions: int, steps: int = hike.EPISODE_LENGTH) -> Plan:
    """Plans for readings with noise `observation_std` in box units.

    Args:
        observation_std: infinite for no readings.
        spacing: side of a cell in box units, a whole fraction of 0.5, so that the box's sides lie between cells.
        directions: of the actions. steps: length of an episode.
    """
    count = round(2.0 * EXTENT / spacing)
    axis = (np.arange(count) + 0.5) * spacing - EXTENT
    variances = kalman.schedule(observation_std, steps + 1)
    spread = np.stack([variances.prior, variances.gain * variances.prior], axis=-1)
    outlook, value = _solve(jnp.asarray(axis, jnp.float32), jnp.asarray(spread, jnp.float32), spacing, directions)
    return Plan(axis, action_set(directions), outlook, float(value))


@functools.partial(jax.jit, static_argnames=("spacing", "directions"))
def _solve(axis: Array, spread: Array, spacing: float, directions: int) -> tuple[Array, Array]:
    """G [T, n, n] and the mean of V_0, for the variances [T + 1, 2] of positions and of the next mean around m + a."""
    reward = hike.height_reward(jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1))

    def back(value, variance):
        of_position, of_mean = variance
        outlook = blur(reward, axis, of_position) + blur(value, axis, of_mean)
        return best_action_value(outlook, action_set(directions), spacing), outlook

    value, outlook = jax.lax.scan(back, jnp.zeros_like(reward), spread[1:], reverse=True)
    start = [cell_probabilities(jnp.asarray(x), axis, spread[0, 1]) for x in hike.START]
    return outlook, start[0] @ value @ start[1]


def act(plan: Plan, outlook: Array, point: Array) -> Array:
    """The best actions [B, 2] at points [B, 2], positions or means, under the outlook [n, n] of the step."""
    actions = jnp.asarray(plan.actions, jnp.float32)
    reached = point[:, None] + actions
    cells = (reached - plan.axis[0]) / (plan.axis[1] - plan.axis[0])
    outlooks = map_coordinates(outlook, (cells[..., 0], cells[..., 1]), order=1, mode="nearest")
    return actions[jnp.argmax(outlooks - cost(actions), axis=1)]
