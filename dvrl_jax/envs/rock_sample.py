"""RockSample (Smith and Simmons, 2004): which rocks are good is told by a sensor that errs more from further away.

The rover knows where it is. Rocks are good or bad with equal probability, independently; sampling a good one earns
10, a bad one -10, and leaving the map to the east 10. Looking from afar costs time, and looking twice makes surer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dvrl_jax.envs.base import ActionSpec, Environment, ObservationSpec, Step

Array = jax.Array

GOOD_REWARD, BAD_REWARD, EXIT_REWARD = 10.0, -10.0, 10.0
HALF_EFFICIENCY_DISTANCE = 20.0
NORTH, EAST, SOUTH, WEST, SAMPLE, CHECK = range(6)  # Action CHECK + i looks at rock i.

# Side of the map and the rocks' (column, row), row 0 in the south. 5x5, 7x8 and 11x11 are the layouts that planners
# are compared on (those of the programs POMCP and DESPOT); 15x15 has none that all agree on, and was drawn once.
LAYOUTS = {
    "5x5": (5, ((2, 4), (0, 4), (3, 3), (2, 2), (4, 1))),
    "7x8": (7, ((2, 0), (0, 1), (3, 1), (6, 3), (2, 4), (3, 4), (5, 5), (1, 6))),
    "11x11": (11, ((0, 3), (0, 7), (1, 8), (2, 4), (3, 3), (3, 8), (4, 3), (5, 8), (6, 1), (9, 3), (9, 9))),
    "15x15": (
        15,
        # numpy.random.default_rng(0).choice(225, 15, replace=False), each cell as (cell % 15, cell // 15).
        (
            *((12, 3), (0, 9), (7, 13), (13, 14), (6, 4), (13, 11), (14, 11), (8, 0)),
            *((7, 7), (3, 7), (8, 14), (1, 1), (3, 0), (8, 2), (8, 9)),
        ),
    ),
}


class RockState(NamedTuple):
    """Position [2] int32 (row from the north, column), which rocks are good [k] bool, and steps taken, [] int32."""

    position: Array
    good: Array
    time: Array


class RockView(NamedTuple):
    """What a person is shown: position [2] (row from the north, column), good [k], and the rocks' positions [k, 2]."""

    position: Array
    good: Array
    rocks: Array


def half_efficiency(distance: Array) -> Array:
    """2^(-d/20) of distances [...]: a reading is right with probability (1 + that) / 2."""
    return jnp.exp2(-distance / HALF_EFFICIENCY_DISTANCE)


def distances(position: Array, rocks: Array) -> Array:
    """Euclidean distances [..., k] in cells from positions [..., 2] to rocks [k, 2]."""
    return jnp.linalg.norm((position[..., None, :] - rocks).astype(jnp.float32), axis=-1)


def first_belief(num_rocks: int) -> Array:
    """P(rock is good) [k] before the first reading."""
    return jnp.full(num_rocks, 0.5)


def update_belief(belief: Array, position: Array, action: Array, readings: Array, rocks: Array) -> Array:
    """The exact belief P(rock is good) [..., k] after a step: rocks stay independent, so it is one number for each.

    With e = 2^(-d/20) and reading r (1 good, -1 bad, 0 none), P(r given good) is proportional to 1 + r e and
    P(r given bad) to 1 - r e. A rock that was sampled is bad; its reward tells nothing of the others. A reading that
    the belief holds for impossible changes nothing.

    Args:
        belief: [..., k] before the step. position: [..., 2] after the step, where readings are taken.
        action: [...] of the step. readings: [..., k] of the observation after it. rocks: [k, 2].
    """
    change = readings * half_efficiency(distances(position, rocks))
    good, bad = belief * (1.0 + change), (1.0 - belief) * (1.0 - change)
    belief = jnp.where(good + bad > 0.0, good / jnp.maximum(good + bad, 1e-30), belief)
    here = jnp.all(position[..., None, :] == rocks, axis=-1)
    return jnp.where(here & (action == SAMPLE)[..., None], 0.0, belief)


class RockSample(Environment):
    """One rover on an n x n map with k rocks; `rock_sample_size` is "5x5", "7x8", "11x11" or "15x15" (n x k).

    Actions: 0 to 3 move north, east, south, west, 4 samples, 5 + i checks rock i. East from the last column leaves the
    map and terminates. Other moves over the edge, and sampling where no rock is, change nothing and cost nothing. A
    rock that was sampled is bad afterwards.

    Observation, float32 [2 n + k]: the row from the north, one-hot [n]; the column, one-hot [n]; for each rock the
    reading of this step's check, 1 good, -1 bad, 0 none [k]. Outside the map no column is hot.

    Rewards, sensor, actions and observation are those of POBAX. As in the planning literature, the map has n columns
    and the exit lies beyond them, where POBAX takes the last column away; and the rover starts in the west, in the
    middle row, unless `rock_sample_random_start`, when it starts in any cell, as POBAX has it.

    Args:
        rock_sample_steps: an episode is cut off after so many steps.
    Raises:
        ValueError: there is no such size, or episodes have no step.
    """

    name = "RockSample"
    settings = {"rock_sample_size": "7x8", "rock_sample_steps": 200, "rock_sample_random_start": False}

    def __init__(
        self, rock_sample_size: str = "7x8", rock_sample_steps: int = 200, rock_sample_random_start: bool = False
    ):
        if rock_sample_size not in LAYOUTS:
            raise ValueError(f"env.rock_sample_size = {rock_sample_size!r}: must be one of {', '.join(LAYOUTS)}")
        if rock_sample_steps < 1:
            raise ValueError(f"env.rock_sample_steps = {rock_sample_steps}: must be at least 1")
        self.n, rocks = LAYOUTS[rock_sample_size]
        self.rocks = tuple((self.n - 1 - row, column) for column, row in rocks)  # As `RockState.position`.
        self.steps, self.random_start = rock_sample_steps, rock_sample_random_start
        self.observation = ObservationSpec((2 * self.n + len(rocks),), jnp.float32)
        self.action = ActionSpec(discrete=True, size=CHECK + len(rocks))

    def reset(self, key: Array) -> tuple[RockState, Array]:
        good_key, start_key = jax.random.split(key)
        position = jnp.array([self.n // 2, 0], jnp.int32)
        if self.random_start:
            position = jax.random.randint(start_key, (2,), 0, self.n, jnp.int32)
        good = jax.random.bernoulli(good_key, shape=(len(self.rocks),))
        state = RockState(position, good, jnp.int32(0))
        return state, self._observe(position, jnp.zeros(len(self.rocks)))

    def step(self, key: Array, state: RockState, action: Array) -> Step:
        """Moves, samples or checks; an episode ends outside the map and is cut off after `rock_sample_steps`."""
        row = state.position[0] + (action == SOUTH) - (action == NORTH)
        column = state.position[1] + (action == EAST) - (action == WEST)
        position = jnp.stack([jnp.clip(row, 0, self.n - 1), jnp.maximum(column, 0)]).astype(jnp.int32)
        rocks = jnp.array(self.rocks, jnp.int32)
        sampled = jnp.all(position == rocks, axis=-1) & (action == SAMPLE)
        left = position[1] == self.n
        reward = jnp.sum(jnp.where(sampled, jnp.where(state.good, GOOD_REWARD, BAD_REWARD), 0.0))
        right = jax.random.uniform(key) < 0.5 * (1.0 + half_efficiency(distances(position, rocks)))
        checked = jnp.arange(len(self.rocks)) == action - CHECK
        readings = jnp.where(checked, jnp.where(state.good == right, 1.0, -1.0), 0.0)
        time = state.time + 1
        return Step(
            state=RockState(position, state.good & ~sampled, time),
            obs=self._observe(position, readings),
            reward=reward + jnp.where(left, EXIT_REWARD, 0.0),
            terminated=left,
            truncated=time >= self.steps,
        )

    def view(self, state: RockState, obs: Array) -> RockView:
        return RockView(state.position, state.good, jnp.array(self.rocks, jnp.int32))

    def state_vector(self, state: RockState) -> Array:
        """The true state [2 n + k]: an observation in which each rock is read, and read right."""
        return self._observe(state.position, jnp.where(state.good, 1.0, -1.0))

    def _observe(self, position: Array, readings: Array) -> Array:
        place = position[:, None] == jnp.arange(self.n)
        return jnp.concatenate([place.astype(jnp.float32).ravel(), readings])
