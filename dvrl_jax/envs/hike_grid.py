"""The exact belief about a hiker's position on square cells, for readings of any kind.

    predict    b-(x) = sum_y P(x given y + clip(a)) b(y)          correct    b(x) = p(o given x) b-(x) / p(o)

Probabilities of cells under normal noise are exact and densities of readings are taken at cells' centres. Rounding
a position to a cell adds side^2 / 12 to its variance, which is taken off the noise of moves. Beyond the grid the
outermost cell goes on for ever.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from dvrl_jax.envs import mountain_hike as hike

Array = jax.Array

EXTENT = 1.6  # The grid covers [-EXTENT, EXTENT]^2, as pictures do.
SPACING = 0.025  # Side of a cell in box units: the standard deviation of a move.


def centres(spacing: float = SPACING) -> np.ndarray:
    """Centres [n] of cells along x, and along y."""
    count = round(2.0 * EXTENT / spacing)
    return (np.arange(count) + 0.5) * spacing - EXTENT


def cell_probabilities(centre: Array, axis: Array, variance: Array) -> Array:
    """Probability [..., n] of each cell along one axis under N(centre [...], variance); all in one cell for 0."""
    edges = 0.5 * (axis[1:] + axis[:-1])
    below = norm.cdf((edges - centre[..., None]) / jnp.sqrt(jnp.maximum(variance, 1e-12)))
    zero = jnp.zeros_like(below[..., :1])
    return jnp.diff(jnp.concatenate([zero, below, zero + 1.0], axis=-1), axis=-1)


def first_belief(starts: Array, axis: np.ndarray) -> Array:
    """Probabilities [n, n] of cells, [x, y], before the first reading, for starts [S, 2] of equal chance."""
    along = cell_probabilities(jnp.asarray(starts), axis, hike.START_STD**2)  # [S, 2, n]
    return jnp.mean(along[:, 0, :, None] * along[:, 1, None, :], axis=0)


def predict(belief: Array, action: Array, axis: np.ndarray) -> Array:
    """Probabilities [n, n] after an action [2] (as the agent gave it, not clipped) and before the next reading."""
    move, side = hike.clip_action(action), axis[1] - axis[0]
    variance = hike.TRANSITION_STD**2 - side**2 / 12.0
    along_x, along_y = (cell_probabilities(axis + move[i], axis, variance) for i in range(2))
    return along_x.T @ belief @ along_y


def correct(belief: Array, log_likelihood: Array) -> Array:
    """Probabilities [n, n] after a reading whose log density at cells' centres, up to a constant, is [n, n]."""
    weighed = jnp.log(jnp.maximum(belief, 1e-30)) + log_likelihood
    return jax.nn.softmax(weighed.ravel()).reshape(belief.shape)


def count_modes(belief: Array, least: float = 0.1) -> Array:
    """How many cells [] are higher than their 8 neighbours, and at least `least` times as high as the highest."""
    around = jax.lax.reduce_window(belief, -jnp.inf, jax.lax.max, (3, 3), (1, 1), "same")
    return jnp.sum((belief >= around) & (belief >= least * jnp.max(belief)))
