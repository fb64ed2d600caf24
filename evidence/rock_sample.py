"""What can be reached on RockSample: mean returns of policies that act on the exact belief.

    python -m evidence.rock_sample --sizes=5x5,7x8

QMDP (Littman et al., 1995) solves the task in which the rocks are seen, Q(x, s, a) for position x and rocks s, and acts
by the belief b over s, here exact and one number for each rock:

    QMDP        Q(x, b, a) = sum_s b(s) Q(x, s, a),        V(x, b) = max_a Q(x, b, a)
    one step    Q1(x, b, a) = r(x, b, a) + gamma sum_o P(o given x, b, a) V(x', b')

QMDP believes that it will see everything after one step, so that all checks have one value; of these it takes the one
of largest Q1. One step of lookahead does weigh what a check tells. V is at least the best value of any policy.

Best discounted returns known at gamma = 0.95 (Silver and Veness, 2010; the same layouts): 21.4 on 7x8 and 21.6 on
11x11, both by SARSOP. Moves over the edge are forbidden there; here they are free and useless.
"""

import functools
import math
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dvrl_jax.envs import Batched
from dvrl_jax.envs import rock_sample as task
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, markdown

Array = jax.Array

LARGEST = "15x15"  # Its 7 million states are too many for these tables.


class Solution(NamedTuple):
    """The task in which the rocks are seen, solved.

    Attributes:
        q: [n (n + 1), 2^k, 6] values of moves, sampling and a check, by cell (n + 1 to a row, the last outside the map)
            and rocks (bit i: rock i is good). gamma: the discount.
        successor: [n (n + 1), 4] the cells that moves lead to. exit: [n (n + 1), 4] what they earn.
        rock: [n (n + 1)] the rock in a cell, -1 for none.
    """

    q: Array
    gamma: float
    successor: Array
    exit: Array
    rock: Array


def solve(env: task.RockSample, gamma: float) -> Solution:
    """Value iteration until nothing changes: the task is deterministic, so that this takes as long as the best path."""
    n, count = env.n, len(env.rocks)
    row, column = np.divmod(np.arange(n * (n + 1)), n + 1)
    outside = column == n
    moves = []
    for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):  # North, east, south, west.
        moves.append(np.clip(row + down, 0, n - 1) * (n + 1) + np.clip(column + right, 0, n))
    successor = np.where(outside[:, None], np.arange(len(row))[:, None], np.stack(moves, axis=-1))
    exit_reward = np.where(outside[successor] & ~outside[:, None], task.EXIT_REWARD, 0.0)
    rock = np.full(len(row), -1)
    for i, (y, x) in enumerate(env.rocks):
        rock[y * (n + 1) + x] = i
    rocks = np.arange(2**count)
    bit = np.where(rock >= 0, 1 << np.maximum(rock, 0), 0)[:, None]
    sampled = rocks & ~bit
    sample_reward = np.where(bit > 0, np.where(rocks & bit, task.GOOD_REWARD, task.BAD_REWARD), 0.0)

    value = np.zeros((len(row), len(rocks)))
    while True:
        q = [exit_reward[:, a, None] + gamma * value[successor[:, a]] for a in range(4)]
        q += [sample_reward + gamma * np.take_along_axis(value, sampled, axis=1), gamma * value]
        q = np.where(outside[:, None, None], 0.0, np.stack(q, axis=-1))
        value, before = q.max(axis=-1), value
        if np.max(np.abs(value - before)) < 1e-9:
            return Solution(jnp.asarray(q, jnp.float32), gamma, jnp.asarray(successor), jnp.asarray(exit_reward), rock)


def joint(belief: Array) -> Array:
    """Probabilities [..., 2^k] of all combinations (bit i: rock i is good) of independent rocks [..., k]."""
    every = jnp.ones((*belief.shape[:-1], 1))
    for i in range(belief.shape[-1]):  # The later rock has the higher bit.
        good = belief[..., i, None]
        every = jnp.concatenate([every * (1.0 - good), every * good], axis=-1)
    return every


def action_values(solution: Solution, env: task.RockSample, position: Array, belief: Array) -> tuple[Array, Array]:
    """QMDP's values [6] of moves, sampling and a check; and with one step of lookahead, of all actions [5 + k].

    Args:
        position: [2] int32. belief: [k].
    """
    cell = position[0] * (env.n + 1) + position[1]
    rocks = jnp.array(env.rocks)
    value = lambda cell, belief: jnp.max((joint(belief) @ solution.q[cell])[..., : task.CHECK], axis=-1)
    moves = jax.vmap(lambda reward, cell: reward + solution.gamma * value(cell, belief))
    here = jnp.all(position == rocks, axis=-1)
    reward = jnp.sum(here * (task.BAD_REWARD + (task.GOOD_REWARD - task.BAD_REWARD) * belief))
    sample = reward + solution.gamma * value(cell, jnp.where(here, 0.0, belief))
    checks = 0.0
    for reading in (1.0, -1.0):
        readings = reading * jnp.eye(len(env.rocks))
        updated = task.update_belief(belief, position, jnp.int32(task.CHECK), readings, rocks)
        efficiency = task.half_efficiency(task.distances(position, rocks))
        probability = 0.5 * (1.0 + reading * efficiency * (2.0 * belief - 1.0))
        checks += probability * value(cell, updated)
    lookahead = [moves(solution.exit[cell], solution.successor[cell]), sample[None], solution.gamma * checks]
    return joint(belief) @ solution.q[cell], jnp.concatenate(lookahead)


def qmdp(solution: Solution, env: task.RockSample, position: Array, belief: Array) -> Array:
    """QMDP's action; of the checks, the one that is best with a step of lookahead."""
    plain, ahead = action_values(solution, env, position, belief)
    best = jnp.argmax(plain)
    return jnp.where(best < task.CHECK, best, task.CHECK + jnp.argmax(ahead[task.CHECK :]))


def qmdp_one_step(solution: Solution, env: task.RockSample, position: Array, belief: Array) -> Array:
    """The best action with one step of lookahead, then QMDP."""
    return jnp.argmax(action_values(solution, env, position, belief)[1])


def leave(solution: Solution, env: task.RockSample, position: Array, belief: Array) -> Array:
    """East."""
    return jnp.int32(task.EAST)


def play(
    choose: Callable[..., Array], solution: Solution, env: task.RockSample, episodes: int, seed: int, sees: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Discounted returns, returns and lengths [episodes] of whole episodes.

    Args:
        choose: an action [] from the solution, the environment, a position [2] and a belief [k].
        sees: whether it is shown the rocks instead of the exact belief.
    """
    results = _play(choose, env, episodes, sees, solution, jax.random.PRNGKey(seed))
    return tuple(np.asarray(x, np.float64) for x in results)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _play(choose: Any, env: task.RockSample, episodes: int, sees: bool, solution: Solution, key: Array):
    batch, rocks = Batched(env, episodes), jnp.array(env.rocks)

    def step(carry):
        state, belief, alive, discount, results = carry
        rover = state.inner.state
        known = rover.good.astype(jnp.float32) if sees else belief
        action = jax.vmap(functools.partial(choose, solution, env))(rover.position, known)
        after = batch.step(state, action)
        # An episode that ends begins anew: its later steps do not count, and neither does its belief.
        readings = after.obs[:, 2 * env.n :]
        belief = task.update_belief(belief, after.inner.state.position, action, readings, rocks)
        earned = jnp.where(alive, after.reward, 0.0)
        results = (results[0] + discount * earned, results[1] + earned, results[2] + alive)
        return after, belief, alive & ~after.done, discount * solution.gamma, results

    zeros = jnp.zeros(episodes)
    belief = jnp.broadcast_to(task.first_belief(len(env.rocks)), (episodes, len(env.rocks)))
    start = (batch.reset(key), belief, jnp.ones(episodes, bool), 1.0, (zeros, zeros, zeros))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[2]), step, start)[4]


REFERENCES = (
    ("leaves at once", leave, False),
    ("QMDP on the exact belief", qmdp, False),
    ("QMDP with a step of lookahead, on the exact belief", qmdp_one_step, False),
    ("sees the rocks", qmdp_one_step, True),
)


def table(sizes: list[str], gamma: float, episodes: int, seed: int) -> str:
    """All references on maps of these sizes, as Markdown: means ± standard errors over episodes."""
    rows = []
    for size in sizes:
        env = task.RockSample(size)
        solution = solve(env, gamma)
        for name, choose, sees in REFERENCES:
            results = play(choose, solution, env, episodes, seed, sees)
            error = [np.std(x, ddof=1) / math.sqrt(episodes) for x in results]
            rows.append([size, name, *(f"{np.mean(x):.2f} ± {e:.2f}" for x, e in zip(results, error, strict=True))])
    return markdown.table(["size", "policy", f"return, discounted by {gamma:g}", "return", "steps"], rows)


def main() -> int:
    known = [size for size in task.LAYOUTS if size != LARGEST]
    if wrong := [size for size in FLAGS.sizes if size not in known]:
        raise ConfigError(f"--sizes: {wrong[0]!r} must be one of {', '.join(known)}")
    print(f"{FLAGS.episodes:,} episodes each; {platform.processor() or platform.machine()}, {jax.default_backend()}\n")
    print(table(FLAGS.sizes, FLAGS.gamma, FLAGS.episodes, FLAGS.seed), end="")
    return 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["5x5", "7x8"], "Sizes of maps.")
    flags.DEFINE_float("gamma", 0.95, "Discount, of planning and of the returns.", lower_bound=0.0, upper_bound=0.999)
    flags.DEFINE_integer("episodes", 4000, "How many episodes each policy plays.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Fixes rocks and readings.", lower_bound=0, upper_bound=2**31 - 1)
    command_line.run(main)
