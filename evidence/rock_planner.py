"""Policies of RockSample on its exact belief: QMDP, and point-based value iteration.

The rover's cell x is seen and moves are sure: a belief is one number for each rock, or the probabilities b(s) of all
combinations s of rocks. A value function is a set of vectors for each cell, V(x, b) = max_j sum_s b(s) v_j(x, s):

    QMDP (Littman et al., 1995)     v_a(x, s) = r(x, s, a) + gamma V(x', s'), one for each action, as if s were seen.
                                    It takes all for known after one step. V is at least the best value.
    PBVI (Pineau et al., 2003)      v from backups at beliefs b that were met. V is at most the best value:
                                    v = r_a + gamma sum_o P(o given x, s, a) v_{j(a, o)}(x', s') for the a best at b

Both act by one step of lookahead: Q(x, b, a) = r(x, b, a) + gamma sum_o P(o given x, b, a) V(x', b').
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax.envs import rock_sample as task

Array = jax.Array


class Model(NamedTuple):
    """The task as tables. There are C = n (n + 1) cells, n + 1 in a row: the last one lies outside the map.

    Attributes:
        successor: [C, 4] the cells that moves lead to. exit: [C, 4] what moves earn.
        sampled: [C, 2^k] the rocks after sampling (bit i: rock i is good). sample: [C, 2^k] what sampling earns.
        outside: [C] bool. good: [k, 2^k] bool, the bits. efficiency: [C, k] 2^(-d/20), see `task.half_efficiency`.
    """

    successor: np.ndarray
    exit: np.ndarray
    sampled: np.ndarray
    sample: np.ndarray
    outside: np.ndarray
    good: np.ndarray
    efficiency: np.ndarray


def make_model(env: task.RockSample) -> Model:
    """The tables of an environment."""
    n, rocks = env.n, np.arange(2 ** len(env.rocks))
    row, column = np.divmod(np.arange(n * (n + 1)), n + 1)
    outside = column == n
    moves = [
        np.clip(row + down, 0, n - 1) * (n + 1) + np.clip(column + right, 0, n)
        for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1))  # North, east, south, west.
    ]
    successor = np.where(outside[:, None], np.arange(len(row))[:, None], np.stack(moves, axis=-1))
    bit = np.zeros((len(row), 1), int)
    for i, (y, x) in enumerate(env.rocks):
        bit[y * (n + 1) + x] = 1 << i
    sample = np.where(rocks & bit, task.GOOD_REWARD, task.BAD_REWARD)
    distance = task.distances(jnp.stack([row, column], axis=-1), jnp.array(env.rocks))
    return Model(
        successor=successor,
        exit=np.where(outside[successor] & ~outside[:, None], task.EXIT_REWARD, 0.0),
        sampled=rocks & ~bit,
        sample=np.where(bit > 0, sample, 0.0),
        outside=outside,
        good=(rocks >> np.arange(len(env.rocks))[:, None] & 1).astype(bool),
        efficiency=np.asarray(task.half_efficiency(distance)),
    )


def joint(belief: Array) -> Array:
    """Probabilities [..., 2^k] of all combinations (bit i: rock i is good) of independent rocks [..., k]."""
    every = jnp.ones((*belief.shape[:-1], 1))
    for i in range(belief.shape[-1]):  # The later rock has the higher bit.
        good = belief[..., i, None]
        every = jnp.concatenate([every * (1.0 - good), every * good], axis=-1)
    return every


def qmdp(model: Model, gamma: float) -> Array:
    """QMDP's vectors [C, 2^k, 6], of moves, sampling and a check: value iteration until nothing changes."""
    value = np.zeros(model.sample.shape)
    while True:
        q = [model.exit[:, a, None] + gamma * value[model.successor[:, a]] for a in range(4)]
        q += [model.sample + gamma * np.take_along_axis(value, model.sampled, axis=1), gamma * value]
        q = np.where(model.outside[:, None, None], 0.0, np.stack(q, axis=-1))
        value, before = q.max(axis=-1), value
        if np.max(np.abs(value - before)) < 1e-9:
            return jnp.asarray(q, jnp.float32)


def action_values(env: task.RockSample, vectors: Array, gamma: float, position: Array, belief: Array) -> Array:
    """Q [5 + k] of all actions with one step of lookahead.

    Args:
        vectors: [C, 2^k, m]. position: [2] int32. belief: [k].
    """
    n, rocks = env.n, jnp.array(env.rocks)
    cell = position[0] * (n + 1) + position[1]
    value = lambda cell, belief: jnp.max(joint(belief) @ vectors[cell], axis=-1)
    moves = []
    for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):
        row, column = jnp.clip(position[0] + down, 0, n - 1), jnp.maximum(position[1] + right, 0)
        left = jnp.where(column == n, task.EXIT_REWARD, 0.0)
        moves.append(left + gamma * value(row * (n + 1) + column, belief))
    here = jnp.all(position == rocks, axis=-1)
    reward = jnp.sum(here * (task.BAD_REWARD + (task.GOOD_REWARD - task.BAD_REWARD) * belief))
    sample = reward + gamma * value(cell, jnp.where(here, 0.0, belief))
    efficiency = task.half_efficiency(task.distances(position, rocks))
    checks = 0.0
    for reading in (1.0, -1.0):
        every = reading * jnp.eye(len(env.rocks))  # A row for each check.
        after = task.update_belief(belief, position, jnp.int32(task.CHECK), every, rocks)
        checks += 0.5 * (1.0 + reading * efficiency * (2.0 * belief - 1.0)) * value(cell, after)
    return jnp.concatenate([jnp.stack([*moves, sample]), gamma * checks])


@functools.partial(jax.jit, static_argnames="sweeps")
def back_up(model: Model, points: Array, vectors: Array, gamma: float, sweeps: int) -> Array:
    """Vectors [C, 2^k, m] after point-based backups of all cells, at the beliefs `points` [C, m, 2^k].

    At a point, the value never falls: the old vector stays where it is better.
    """

    def at(cell, vectors):
        belief, own = points[cell], vectors[cell]
        best = lambda belief, options: options.T[jnp.argmax(belief @ options, axis=-1)]  # [..., m, 2^k]
        found = [best(belief, own)]
        for a in range(4):
            found.append(model.exit[cell, a] + gamma * best(belief, vectors[model.successor[cell, a]]))
        found.append(model.sample[cell] + gamma * best(belief, own[model.sampled[cell]]))
        checks = 0.0
        for reading in (1.0, -1.0):
            sign = jnp.where(model.good, reading, -reading)
            chance = 0.5 * (1.0 + sign * model.efficiency[cell, :, None])[:, None]  # [k, 1, 2^k]
            checks += gamma * chance * best(belief * chance, own)
        found = jnp.concatenate([jnp.stack(found), checks])
        chosen = jnp.argmax(jnp.sum(found * belief, axis=-1), axis=0)
        new = jnp.take_along_axis(found, chosen[None, :, None], axis=0)[0]
        return jnp.where(model.outside[cell], 0.0, new.T)

    def sweep(vectors, _):
        return jax.lax.map(lambda cell: at(cell, vectors), jnp.arange(len(model.outside))), None

    model = jax.tree.map(jnp.asarray, model)
    return jax.lax.scan(sweep, vectors, None, length=sweeps)[0]


def choose_points(cells: np.ndarray, beliefs: np.ndarray, count: int, num_cells: int) -> np.ndarray:
    """The `count` beliefs that were met most often in each cell, [C, count, k]; where there are fewer, 0.5.

    Args:
        cells: [N] where beliefs [N, k] were met.
    """
    points = np.full((num_cells, count, beliefs.shape[-1]), 0.5)
    for cell in np.unique(cells):
        met, times = np.unique(np.round(beliefs[cells == cell], 3), axis=0, return_counts=True)
        chosen = met[np.argsort(-times, kind="stable")][:count]
        points[cell, : len(chosen)] = chosen
    return points


def first_vectors(model: Model, env: task.RockSample, gamma: float, count: int) -> Array:
    """Vectors [C, 2^k, count] of leaving at once: the value of a policy, so that backups only raise it."""
    column = np.arange(len(model.outside)) % (env.n + 1)
    value = np.where(model.outside, 0.0, task.EXIT_REWARD * gamma ** (env.n - 1.0 - column))
    return jnp.broadcast_to(jnp.float32(value)[:, None, None], (*model.sample.shape, count))
