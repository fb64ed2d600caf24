"""What can be reached on RockSample: mean returns of policies that act on the exact belief.

    python -m evidence.rock_sample --sizes=5x5,7x8

The policies are those of `rock_planner`. Best discounted returns known at gamma = 0.95, on the same layouts, are 21.4
on 7x8 and 21.6 on 11x11 (SARSOP; Silver and Veness, 2010). There moves over the edge are forbidden; here they are of
no use.
"""

import functools
import math
import platform
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dvrl_jax.envs import Batched
from dvrl_jax.envs import rock_sample as task
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, markdown
from evidence import rock_planner as planner

Array = jax.Array

SIZES = [size for size in task.LAYOUTS if size != "15x15"]  # Its 7 million states are too many for tables.
BATCH = 500  # Episodes played together.
EXPLORATION = (0.5, 0.3, 0.2, 0.1, 0.1)  # Shares of random actions when beliefs to plan at are met, round by round.


class Played(NamedTuple):
    """What happened in T steps of B episodes, [T, B, ...], before each action; `alive` until an episode has ended."""

    position: Array
    belief: Array
    reward: Array
    alive: Array


@functools.partial(jax.jit, static_argnames=("env", "episodes", "steps", "sees"))
def play(
    env: task.RockSample,
    episodes: int,
    steps: int,
    vectors: Array,
    gamma: float,
    key: Array,
    random: float = 0.0,
    sees: bool = False,
) -> Played:
    """Plays episodes for at most `steps` steps by the vectors [C, 2^k, m], with one step of lookahead.

    Args:
        random: share of random actions. sees: act as if knowing the rocks, not by the exact belief.
    """
    batch, rocks = Batched(env, episodes), jnp.array(env.rocks)

    def best(position, belief):
        values = lambda x: planner.action_values(env, vectors, gamma, *x)
        return jnp.argmax(jax.lax.map(values, (position, belief), batch_size=50), axis=-1)

    def step(carry, key):
        state, belief, alive = carry
        rover = state.inner.state
        known = rover.good.astype(jnp.float32) if sees else belief
        nothing = lambda *_: jnp.zeros(episodes, jnp.int32)
        action = jax.lax.cond(jnp.any(alive), best, nothing, rover.position, known)
        explore_key, action_key = jax.random.split(key)
        other = jax.random.randint(action_key, action.shape, 0, env.action.size)
        action = jnp.where(jax.random.uniform(explore_key, action.shape) < random, other, action).astype(jnp.int32)
        after = batch.step(state, action)
        # Where an episode has ended, what comes is another one's and does not count.
        readings = after.obs[:, 2 * env.n :]
        updated = task.update_belief(belief, after.inner.state.position, action, readings, rocks)
        played = Played(rover.position, belief, after.reward, alive)
        return (after, updated, alive & ~after.done), played

    reset_key, steps_key = jax.random.split(key)
    belief = jnp.broadcast_to(task.first_belief(len(env.rocks)), (episodes, len(env.rocks)))
    start = (batch.reset(reset_key), belief, jnp.ones(episodes, bool))
    return jax.lax.scan(step, start, jax.random.split(steps_key, steps))[1]


def plan(env: task.RockSample, model: planner.Model, gamma: float, points: int, sweeps: int, seed: int) -> Array:
    """The vectors [C, 2^k, points] of point-based value iteration.

    Each round meets beliefs by playing, with random actions among the best ones known, and backs up at `points` of them
    in each cell, all that were met so far counting. The first round plays by QMDP.
    """
    playing = planner.qmdp(model, gamma)
    vectors = planner.first_vectors(model, env, gamma, points)
    cells, beliefs = [], []
    for number, random in enumerate(EXPLORATION):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), number)
        played = jax.tree.map(np.asarray, play(env, BATCH, min(env.steps, 60), playing, gamma, key, random))
        position = played.position[played.alive]
        cells.append(position[:, 0] * (env.n + 1) + position[:, 1])
        beliefs.append(played.belief[played.alive])
        met = np.concatenate(cells), np.concatenate(beliefs)
        chosen = planner.choose_points(*met, points, len(model.outside))
        where = jax.lax.map(planner.joint, jnp.asarray(chosen, jnp.float32))
        playing = vectors = planner.back_up(model, where, vectors, gamma, sweeps)
    return vectors


class Result(NamedTuple):
    """Means over episodes of a policy, and their standard errors: discounted return, return, steps."""

    name: str
    mean: tuple[float, float, float]
    standard_error: tuple[float, float, float]


def evaluate(
    name: str, env: task.RockSample, vectors: Array, gamma: float, episodes: int, seed: int, sees: bool = False
) -> Result:
    """What a policy (see `play`) reaches over at least `episodes` whole episodes."""
    results, batch = [], min(episodes, BATCH)
    for number in range(-(-episodes // batch)):
        key = jax.random.fold_in(jax.random.PRNGKey(seed + 1), number)
        played = jax.tree.map(np.asarray, play(env, batch, env.steps, vectors, gamma, key, 0.0, sees))
        earned = np.where(played.alive, played.reward, 0.0).astype(np.float64)
        discount = gamma ** np.arange(env.steps)[:, None]
        results.append(np.stack([(discount * earned).sum(axis=0), earned.sum(axis=0), played.alive.sum(axis=0)]))
    results = np.concatenate(results, axis=1)
    error = results.std(axis=1, ddof=1) / math.sqrt(results.shape[1])
    return Result(name, tuple(results.mean(axis=1)), tuple(error))


def measure(size: str, gamma: float, episodes: int, points: int, sweeps: int, seed: int) -> list[Result]:
    """All references on a map of this size."""
    env = task.RockSample(size)
    model = planner.make_model(env)
    qmdp, leaving = planner.qmdp(model, gamma), planner.first_vectors(model, env, gamma, 1)
    pbvi = plan(env, model, gamma, points, sweeps, seed)
    return [
        evaluate("leaves at once", env, leaving, gamma, episodes, seed),
        evaluate("QMDP on the exact belief", env, qmdp, gamma, episodes, seed),
        evaluate("PBVI on the exact belief", env, pbvi, gamma, episodes, seed),
        evaluate("sees the rocks", env, qmdp, gamma, episodes, seed, sees=True),
    ]


def table(results: dict[str, list[Result]], gamma: float) -> str:
    """Results by size, as Markdown."""
    rows = [
        [size, one.name, *(f"{m:.2f} ± {e:.2f}" for m, e in zip(one.mean, one.standard_error, strict=True))]
        for size, found in results.items()
        for one in found
    ]
    return markdown.table(["size", "policy", f"return, discounted by {gamma:g}", "return", "steps"], rows)


def main() -> int:
    if wrong := [size for size in FLAGS.sizes if size not in SIZES]:
        raise ConfigError(f"--sizes: {wrong[0]!r} must be one of {', '.join(SIZES)}")
    settings = (FLAGS.gamma, FLAGS.episodes, FLAGS.points, FLAGS.sweeps, FLAGS.seed)
    results = {size: measure(size, *settings) for size in FLAGS.sizes}
    print(f"{FLAGS.episodes:,} episodes each; {platform.processor() or platform.machine()}, {jax.default_backend()}\n")
    print(table(results, FLAGS.gamma), end="")
    return 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["5x5", "7x8"], "Sizes of maps.")
    flags.DEFINE_float("gamma", 0.95, "Discount, of planning and of the returns.", lower_bound=0.0, upper_bound=0.999)
    flags.DEFINE_integer("episodes", 4000, "How many episodes each policy plays, in batches.", lower_bound=2)
    flags.DEFINE_integer("points", 128, "Beliefs for each cell that PBVI plans at.", lower_bound=1)
    flags.DEFINE_integer("sweeps", 20, "Backups of PBVI in each of its rounds.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Fixes rocks and readings.", lower_bound=0, upper_bound=2**31 - 1)
    command_line.run(main)
