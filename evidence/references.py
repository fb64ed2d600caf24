"""What can be reached on Mountain Hike: mean returns to read others by.

    python -m evidence.references --out=docs/results/references.json

Each reference plays whole episodes in the environment that agents are trained in. Prints a table and writes JSON.
"""

import functools
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dvrl_jax.envs import Batched, MountainHike
from dvrl_jax.envs import mountain_hike as hike
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.runs import command_line, markdown
from evidence import kalman, planner

Array = jax.Array

NOISE = (0.0, 0.15, 0.3)
RANDOM, SIGHTED, BEST = "random", "sees the position", "best with readings"


class Seen(NamedTuple):
    """What a reference may act on at step `time`: the true position, the last reading, the filter's mean, [B, 2]."""

    time: Array
    position: Array
    reading: Array
    mean: Array


POSITION, READING, MEAN = 1, 2, 3  # Fields of `Seen`, as data.


def stand_still(parameters: tuple, seen: Seen, key: Array) -> Array:
    """No action."""
    del parameters, key
    return jnp.zeros_like(seen.mean)


def untrained(parameters: tuple, seen: Seen, key: Array) -> Array:
    """What policies do before they are trained."""
    del parameters
    return jax.random.normal(key, seen.mean.shape)


def follow(parameters: tuple[planner.Plan, Array], seen: Seen, key: Array) -> Array:
    """The plan's action at the position, the reading or the mean."""
    del key
    plan, field = parameters
    points = jnp.stack([seen.position, seen.reading, seen.mean])
    return planner.act(plan, plan.outlook[seen.time], points[field - POSITION])


def play(
    choose: Callable[[Any, Seen, Array], Array],
    parameters: Any,
    observation_std: float,
    gains: np.ndarray,
    episodes: int,
    seed: int,
) -> np.ndarray:
    """Returns [episodes] of whole episodes, float64.

    Args:
        choose: the actions [B, 2] from the parameters, what is seen, and a key. gains: [T] of the filter behind
            `Seen.mean`.
    """
    gains = jnp.asarray(gains, jnp.float32)
    rewards, done = _play(choose, parameters, observation_std, gains, episodes, jax.random.PRNGKey(seed))
    assert bool(jnp.all(done[-1])) and not bool(jnp.any(done[:-1]))
    return np.sum(np.asarray(rewards, np.float64), axis=0)


@functools.partial(jax.jit, static_argnames=("choose", "episodes"))
def _play(choose, parameters, observation_std, gains, episodes, key):
    """Rewards and ends of episodes, [T, B]."""
    env = Batched(MountainHike(observation_std), episodes)
    reset_key, action_key = jax.random.split(key)

    def step(carry, time):
        state, prior = carry
        mean = kalman.correct(prior, state.obs, gains[time])
        seen = Seen(time, env.view(state), state.obs / hike.OBSERVATION_SCALE, mean)
        action = choose(parameters, seen, jax.random.fold_in(action_key, time))
        state = env.step(state, action)
        return (state, kalman.predict(mean, action)), (state.reward, state.done)

    start = (env.reset(reset_key), kalman.first_mean(episodes))
    return jax.lax.scan(step, start, jnp.arange(hike.EPISODE_LENGTH))[1]


class Reference(NamedTuple):
    """One policy's mean return; `observation_std` is None where readings play no role, `planned` the plan's promise."""

    name: str
    observation_std: float | None
    mean: float
    standard_error: float
    planned: float | None


def measure(spacing: float, directions: int, episodes: int, seed: int) -> list[Reference]:
    """Plays all references, each on the same starts and noise."""
    found = []

    def add(name, noise, choose, parameters=(), planned=None, filter_std=math.inf):
        gains = kalman.schedule(filter_std).gain
        returns = play(choose, parameters, noise or 0.0, gains, episodes, seed)
        error = float(np.std(returns, ddof=1) / math.sqrt(episodes))
        found.append(Reference(name, noise, float(np.mean(returns)), error, planned))

    add("standing still", None, stand_still)
    add(RANDOM, None, untrained)
    blind = planner.make_plan(math.inf, spacing, directions)
    add("best without readings", None, follow, (blind, MEAN), blind.value)
    del blind
    sighted = planner.make_plan(0.0, spacing, directions)
    noisy = [noise for noise in NOISE if noise > 0]
    for noise in noisy:
        add("takes the last reading for the position", noise, follow, (sighted, READING))
    for noise in noisy:
        name = "takes the exact filter's mean for the position"
        add(name, noise, follow, (sighted, MEAN), filter_std=noise)
    for noise in noisy:
        plan = planner.make_plan(noise, spacing, directions)
        add(BEST, noise, follow, (plan, MEAN), plan.value, noise)
    add(SIGHTED, None, follow, (sighted, POSITION), sighted.value)
    return found


def share(value: float, known: list[Reference], observation_std: float) -> float:
    """(value - random) / (best - random): 0 for the untrained policy, 1 for the best with readings of this noise.

    NaN if there is no reference for this noise.
    """
    means = {(one.name, one.observation_std): one.mean for one in known}
    # Who reads without noise sees the position.
    top = (SIGHTED, None) if observation_std == 0 else (BEST, observation_std)
    low = means[RANDOM, None]
    return (value - low) / (means.get(top, math.nan) - low)


def table(measured: dict[str, Any]) -> str:
    """What `measure_all` returned, as Markdown."""
    references = [Reference(**fields) for fields in measured["references"]]
    noises = sorted({0.0, *(one.observation_std for one in references if one.observation_std is not None)})
    fine = measured["finer"] is not None
    head = ["reference", "noise", "return", "planned", *(f"share at {noise:g}" for noise in noises)]
    head += ["return, finer", "planned, finer"] if fine else []
    rows = []
    finer = [Reference(**fields) for fields in measured["finer"]["references"]] if fine else references
    for one, again in zip(references, finer, strict=True):
        name = "any" if one.observation_std is None else f"{one.observation_std:g}"
        means_it = lambda noise, one=one: one.observation_std in (None, noise)
        shares = [f"{share(one.mean, references, noise):.3f}" if means_it(noise) else "-" for noise in noises]
        more = [_mean(again), _planned(again)] if fine else []
        rows.append([one.name, name, _mean(one), _planned(one), *shares, *more])
    return markdown.table(head, rows)


def _mean(reference: Reference) -> str:
    return f"{reference.mean:.2f} ± {reference.standard_error:.2f}"


def _planned(reference: Reference) -> str:
    return "-" if reference.planned is None else f"{reference.planned:.2f}"


def measure_all(spacing: float, directions: int, episodes: int, seed: int, finer: bool) -> dict[str, Any]:
    """Everything that is stored: the references, and the same on half the spacing and twice the directions."""

    def at(spacing: float, directions: int) -> dict[str, Any]:
        found = measure(spacing, directions, episodes, seed)
        return {"spacing": spacing, "directions": directions, "references": [r._asdict() for r in found]}

    again = at(spacing / 2, 2 * directions) if finer else None
    return {"episodes": episodes, "seed": seed} | at(spacing, directions) | {"finer": again}


def load(path: Path) -> list[Reference]:
    """The references stored in a file.

    Raises:
        RunError: it is not such a file.
    """
    try:
        return [Reference(**fields) for fields in json.loads(Path(path).read_text())["references"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not the references that evidence.references writes ({error})") from None


def main() -> int:
    cells = 0.5 / FLAGS.spacing
    if abs(cells - round(cells)) > 1e-6:
        raise ConfigError(f"--spacing={FLAGS.spacing}: must be a whole fraction of 0.5, such as 0.01")
    out = Path(FLAGS.out) if FLAGS.out else None
    if out and not out.parent.is_dir():
        raise RunError(f"--out: there is no directory {out.parent}")
    measured = measure_all(FLAGS.spacing, FLAGS.directions, FLAGS.episodes, FLAGS.seed, FLAGS.finer)
    print(f"{FLAGS.episodes:,} episodes, cells of {FLAGS.spacing:g}, {FLAGS.directions} directions")
    print(f"{platform.processor() or platform.machine()}, {jax.default_backend()}\n")
    print(table(measured), end="")
    if out:
        out.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_integer("episodes", 4000, "How many episodes each reference plays.", lower_bound=2)
    flags.DEFINE_float("spacing", 0.01, "Side of the planners' cells in box units.", lower_bound=0.001, upper_bound=0.5)
    flags.DEFINE_integer("directions", 32, "Directions of the planners' actions.", lower_bound=1)
    flags.DEFINE_boolean("finer", True, "Do it all again with half the spacing and twice the directions.")
    flags.DEFINE_integer("seed", 0, "Fixes starts and noise.", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("out", None, "JSON file to write.")
    command_line.run(main)
