"""The exact belief of Mountain Hike about its position: a Kalman filter.

Given the actions, which the agent knows, the task is linear with normal noise, and both coordinates are alike and
independent (rewards are not observed):

    p_0 ~ N(START, START_STD^2)                 p_{t+1} = p_t + clip(a_t) + N(0, TRANSITION_STD^2)
    o_t = OBSERVATION_SCALE * (p_t + N(0, sigma^2))

so that p_t given o_0 .. o_t and a_0 .. a_{t-1} is N(m_t, v_t), and no estimate has a smaller squared error than m_t:

    predict    m- = m + clip(a)                 v- = v + TRANSITION_STD^2        (at t = 0 the start's own)
    correct    m = m- + k (o / SCALE - m-)      v = (1 - k) v-                   k = v- / (v- + sigma^2)

The variances depend on neither observations nor actions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax.envs import mountain_hike as hike

Array = jax.Array


class Schedule(NamedTuple):
    """Variances of one coordinate at each step, [T], before (`prior`) and after (`posterior`) its reading; gains k."""

    prior: np.ndarray
    gain: np.ndarray
    posterior: np.ndarray


def schedule(observation_std: float, steps: int = hike.EPISODE_LENGTH) -> Schedule:
    """The variances v-, gains k and variances v of `steps` readings. An infinite `observation_std` is blindness."""
    rows = []
    prior = hike.START_STD**2
    for _ in range(steps):
        gain = prior / (prior + observation_std**2)
        rows.append((prior, gain, (1.0 - gain) * prior))
        prior = rows[-1][2] + hike.TRANSITION_STD**2
    return Schedule(*np.array(rows).T)


def least_encoding_loss(observation_std: float, steps: int = hike.EPISODE_LENGTH) -> float:
    """The least -ELBO that a belief can have on average, in nats per step: what observations cost under this filter.

        -E log p(o_t | o_0 .. o_{t-1}, a_0 .. a_{t-1}) = log(2 pi e SCALE^2 (v- + sigma^2)),    of both coordinates,

    averaged over the `steps` of an episode. The ELBO is a bound of the logarithm, so that no belief's loss is less.
    """
    variances = hike.OBSERVATION_SCALE**2 * (schedule(observation_std, steps).prior + observation_std**2)
    return float(np.mean(np.log(2.0 * np.pi * np.e * variances)))


def first_mean(num_envs: int) -> Array:
    """Mean [B, 2] before the first reading."""
    return jnp.broadcast_to(jnp.asarray(hike.START), (num_envs, 2))


def predict(mean: Array, action: Array) -> Array:
    """Mean [B, 2] after action [B, 2] (as the agent gave it, not clipped) and before the next reading."""
    return mean + hike.clip_action(action)


def correct(mean: Array, obs: Array, gain: Array) -> Array:
    """Mean [B, 2] after an observation [B, 2]."""
    return mean + gain * (obs / hike.OBSERVATION_SCALE - mean)


def track(obs: Array, action: Array, observation_std: float) -> Array:
    """Posterior means [T, B, 2] of the positions that obs [T, B, 2] were read at.

    Args:
        obs: all observations from the episodes' first on. action: [T, B, 2], action t taken after observation t; the
            last one has no effect.
    """
    gains = jnp.asarray(schedule(observation_std, obs.shape[0]).gain, obs.dtype)

    def step(prior, inputs):
        obs, action, gain = inputs
        mean = correct(prior, obs, gain)
        return predict(mean, action), mean

    return jax.lax.scan(step, first_mean(obs.shape[1]), (obs, action, gains))[1]
