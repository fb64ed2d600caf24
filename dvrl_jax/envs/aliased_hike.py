"""Mountain Hikes from several corners: one whose readings fit several places, and one with distractors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax.envs import hike_grid
from dvrl_jax.envs.base import ObservationSpec
from dvrl_jax.envs.mountain_hike import OBSERVATION_SCALE, START, START_STD, HikeState, MountainHike

Array = jax.Array

CORNERS = tuple((x, y) for x in (START[0], -START[0]) for y in (START[1], -START[1]))
BEACONS = ((-1.0, 0.0), (1.0, 0.0))


class CornersHike(MountainHike):
    """A Mountain Hike that starts near one of `starts`, each as likely as the others."""

    starts: tuple[tuple[float, float], ...]

    def reset(self, key: Array) -> tuple[HikeState, Array]:
        corner_key, noise_key = jax.random.split(key)
        corner = jnp.asarray(self.starts)[jax.random.randint(corner_key, (), 0, len(self.starts))]
        start_noise, reading_noise = jnp.split(jax.random.normal(noise_key, (4,)), 2)
        position = corner + START_STD * start_noise
        return HikeState(position, jnp.zeros((), jnp.int32)), self._observe(position, reading_noise)


class AliasedView(NamedTuple):
    """What a person is shown: the true position [2], and the noise of readings [] in box units."""

    position: Array
    observation_std: Array


class AliasedHike(CornersHike):
    """A hiker who reads the distances to two beacons that look alike, from one of four corners.

    The beacons stand at (-1, 0) and (1, 0). Observation, float32 [2]: 10 times the distance to the nearer one, then to
    the farther one, each with noise of `observation_std` in box units. Mirrored at either axis a place gives the same
    reading: four corners look alike. Each asks for another way: what leads from one corner to the ridge leads from
    another out of the box, where a step costs 6. A move along an axis tells the two sides of the other one apart, since
    distances then change otherwise; it takes many moves of 0.05 to show behind the noise. Moves and rewards are those
    of Mountain Hike, and so is the time limit.
    """

    name = "AliasedHike"
    starts = CORNERS

    def view(self, state: HikeState, obs: Array) -> AliasedView:
        return AliasedView(state.position, jnp.float32(self.observation_std))

    def _observe(self, position: Array, noise: Array) -> Array:
        return OBSERVATION_SCALE * (beacon_distances(position) + self.observation_std * noise)


class DistractorHike(CornersHike):
    """Mountain Hike of DPFRL (Ma et al., 2020): three corners to start in, and distractors beside the reading.

    Observation, float32 [2 + D]: the reading of Mountain Hike, then D = `distractor_dims` numbers that say nothing,
    uniform in +-10 times `distractor_size`. In every step they are drawn anew. Episodes have 75 steps.

    Raises:
        ValueError: a number or size of distractors is negative.
    """

    name = "DistractorHike"
    settings = {"observation_std": 0.0, "distractor_dims": 20, "distractor_size": 1.0}
    starts = (START, (-START[0], START[1]), (-START[0], -START[1]))

    def __init__(self, observation_std: float = 0.0, distractor_dims: int = 20, distractor_size: float = 1.0):
        super().__init__(observation_std)
        for setting, value in (("distractor_dims", distractor_dims), ("distractor_size", distractor_size)):
            if value < 0:
                raise ValueError(f"env.{setting} = {value}: must be at least 0")
        self.dims, self.size = distractor_dims, distractor_size
        self.observation = ObservationSpec((2 + distractor_dims,), jnp.float32)

    def reset(self, key: Array) -> tuple[HikeState, Array]:
        hike_key, key = jax.random.split(key)
        state, obs = super().reset(hike_key)
        return state, self._distract(obs, key)

    def step(self, key: Array, state: HikeState, action: Array):
        hike_key, key = jax.random.split(key)
        step = super().step(hike_key, state, action)
        return step._replace(obs=self._distract(step.obs, key))

    def _distract(self, obs: Array, key: Array) -> Array:
        limit = OBSERVATION_SCALE * self.size
        return jnp.concatenate([obs, jax.random.uniform(key, (self.dims,), minval=-limit, maxval=limit)])


def beacon_distances(position: Array) -> Array:
    """Distances [..., 2] in box units from positions [..., 2] to the nearer and the farther beacon."""
    return jnp.sort(jnp.linalg.norm(position[..., None, :] - jnp.asarray(BEACONS), axis=-1), axis=-1)


def log_likelihood(obs: Array, observation_std: Array, axis: np.ndarray) -> Array:
    """log p(obs [2] given the position) up to a constant at the cells' centres, [n, n] (see `hike_grid`).

    A cell's own extent counts as noise too, which matters where readings have less of it.
    """
    places = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1)
    variance = observation_std**2 + (axis[1] - axis[0]) ** 2 / 12.0
    errors = obs / OBSERVATION_SCALE - beacon_distances(places)
    return -0.5 * jnp.sum(jnp.square(errors), axis=-1) / variance


def track(
    obs: Array,
    action: Array,
    observation_std: Array,
    spacing: float = hike_grid.SPACING,
    observed: Array | None = None,
) -> Array:
    """The exact belief [T, n, n] about the position of one episode, [x, y], after each of its observations [T, 2].

    Args:
        obs: all observations from the episode's first on. action: [T, 2], action t taken after observation t; the last
            one has no effect. spacing: side of a cell. observed: [T] bool, False for a blank observation.
    """
    axis = hike_grid.centres(spacing)
    observed = jnp.ones(len(obs), bool) if observed is None else observed

    def step(prior, inputs):
        obs, action, observed = inputs
        told = jnp.where(observed, log_likelihood(obs, observation_std, axis), 0.0)
        belief = hike_grid.correct(prior, told)
        return hike_grid.predict(belief, action, axis), belief

    start = hike_grid.first_belief(jnp.asarray(CORNERS), axis)
    return jax.lax.scan(step, start, (obs, action, observed))[1]
