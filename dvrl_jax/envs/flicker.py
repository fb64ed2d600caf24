"""Flicker: each observation is blanked with some probability, which makes almost any task partially observable."""

import jax
import jax.numpy as jnp

from dvrl_jax.envs.base import Environment, EnvState

Array = jax.Array


class Flicker(Environment):
    """Replaces observations by zeros with probability `p_blank`, independently per environment and step.

    `EnvState.inner` is (the wrapped environment's state, key).
    """

    def __init__(self, env: Environment, p_blank: float):
        self.env = env
        self.p_blank = p_blank
        self.num_envs, self.observation, self.action = env.num_envs, env.observation, env.action
        self.restorable = env.restorable

    def reset(self, key: Array) -> EnvState:
        env_key, key = jax.random.split(key)
        return self._blank(self.env.reset(env_key), key)

    def step(self, state: EnvState, action: Array) -> EnvState:
        inner, key = state.inner
        return self._blank(self.env.step(state._replace(inner=inner), action), key)

    def _blank(self, state: EnvState, key: Array) -> EnvState:
        key, draw_key = jax.random.split(key)
        observed = jax.random.bernoulli(draw_key, 1.0 - self.p_blank, (self.num_envs,))
        shape = (self.num_envs,) + (1,) * (state.obs.ndim - 1)
        obs = jnp.where(observed.reshape(shape), state.obs, jnp.zeros_like(state.obs))
        return state._replace(inner=(state.inner, key), obs=obs, observed=observed & state.observed)
