"""Mountain Hike: find and follow a ridge from noisy position readings. Written in JAX, it runs on any device.

The task of Igl et al. (2018), called Death Valley in their release. Rewards are paid in the box [-1, 1]^2; outside it,
each step costs `OUTSIDE_REWARD`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dvrl_jax.envs.base import ActionSpec, Environment, ObservationSpec, Step

Array = jax.Array

START = (-0.85, -0.85)
START_STD = 0.1
TRANSITION_STD = 0.025
MAX_ACTION_NORM = 0.05
ACTION_COST = 0.1
OUTSIDE_REWARD = -6.0
OBSERVATION_SCALE = 10.0
EPISODE_LENGTH = 75
# The three ridges: centre, standard deviations along x and y, height factor.
RIDGES = (
    ((0.5, 0.5), (0.75, 0.1), 1.0),
    ((0.0, 0.2), (0.1, 0.75), 0.8),
    ((-0.375, -0.5), (0.75, 0.1), 0.55),
)


def height_reward(position: Array) -> Array:
    """Reward [...] of standing at `position` [..., 2], before the action's cost.

    -6 outside the box, else 4 (1 - (1 - Z)^4) - 4.5 + (x + y)/4, where Z is the highest of the ridges, each
    f/3 times a normal density.
    """
    x, y = position[..., 0], position[..., 1]
    heights = []
    for (mean_x, mean_y), (std_x, std_y), factor in RIDGES:
        exponent = -0.5 * (jnp.square((x - mean_x) / std_x) + jnp.square((y - mean_y) / std_y))
        heights.append(factor / (3.0 * 2.0 * math.pi * std_x * std_y) * jnp.exp(exponent))
    ridge = jnp.maximum(jnp.maximum(heights[0], heights[1]), heights[2])
    inside = 4.0 * (1.0 - (1.0 - ridge) ** 4) - 4.5 + (x + y) / 4.0
    outside = (jnp.abs(x) > 1.0) | (jnp.abs(y) > 1.0)
    return jnp.where(outside, OUTSIDE_REWARD, inside)


def clip_action(action: Array) -> Array:
    """Shortens actions [..., 2] to a norm of at most `MAX_ACTION_NORM`, keeping their direction."""
    norm = jnp.linalg.norm(action, axis=-1, keepdims=True)
    return action * jnp.minimum(1.0, MAX_ACTION_NORM / jnp.maximum(norm, 1e-12))


class HikeState(NamedTuple):
    """Position [2], and steps taken in the episode, [] int32."""

    position: Array
    time: Array


class MountainHike(Environment):
    """One hiker; `observation_std` is the noise of a position reading in units of the box (0, 0.15, 0.3)."""

    name = "MountainHike"
    settings = {"observation_std": 0.0}
    observation = ObservationSpec((2,), jnp.float32)
    action = ActionSpec(discrete=False, size=2)

    def __init__(self, observation_std: float = 0.0):
        self.observation_std = observation_std

    def reset(self, key: Array) -> tuple[HikeState, Array]:
        start_noise, reading_noise = jnp.split(jax.random.normal(key, (4,)), 2)
        position = jnp.asarray(START) + START_STD * start_noise
        return HikeState(position, jnp.zeros((), jnp.int32)), self._observe(position, reading_noise)

    def step(self, key: Array, state: HikeState, action: Array) -> Step:
        """Moves, pays, and observes; an episode is cut off after `EPISODE_LENGTH` steps."""
        move_noise, reading_noise = jnp.split(jax.random.normal(key, (4,)), 2)
        position = state.position + clip_action(action) + TRANSITION_STD * move_noise
        reward = height_reward(position) - ACTION_COST * jnp.linalg.norm(action)
        time = state.time + 1
        return Step(
            state=HikeState(position, time),
            obs=self._observe(position, reading_noise),
            reward=reward,
            terminated=jnp.zeros((), bool),
            truncated=time >= EPISODE_LENGTH,
        )

    def view(self, state: HikeState, obs: Array) -> Array:
        """The true position [2]."""
        return state.position

    def state_vector(self, state: HikeState) -> Array:
        """The true position [2], scaled as readings are."""
        return OBSERVATION_SCALE * state.position

    def _observe(self, position: Array, noise: Array) -> Array:
        return OBSERVATION_SCALE * (position + self.observation_std * noise)
