"""Flicker: each observation is blanked with some probability, which makes almost any task partially observable."""

from typing import Any

import jax
import jax.numpy as jnp

from dvrl_jax.envs.base import Environment, EnvState

Array = jax.Array


class Flicker(Environment):
    """Replaces observations by zeros with probability `p_blank`, independently per environment and step.

    `EnvState.inner` is (the wrapped environment's state, key, its view if `keep_view`, for pictures, else nothing).
    """

    def __init__(self, env: Environment, p_blank: float, keep_view: bool = False):
        self.env = env
        self.p_blank, self.keep_view = p_blank, keep_view
        self.name, self.settings, self.painter = env.name, env.settings, env.painter
        self.num_envs, self.observation, self.action = env.num_envs, env.observation, env.action
        self.restorable, self.steps_per_second = env.restorable, env.steps_per_second

    def reset(self, key: Array) -> EnvState:
        env_key, key = jax.random.split(key)
        return self._blank(self.env.reset(env_key), key)

    def step(self, state: EnvState, action: Array) -> EnvState:
        inner, key, _ = state.inner
        return self._blank(self.env.step(state._replace(inner=inner), action), key)

    def _blank(self, state: EnvState, key: Array) -> EnvState:
        key, draw_key = jax.random.split(key)
        observed = jax.random.bernoulli(draw_key, 1.0 - self.p_blank, (self.num_envs,))
        shape = (self.num_envs,) + (1,) * (state.obs.ndim - 1)
        obs = jnp.where(observed.reshape(shape), state.obs, jnp.zeros_like(state.obs))
        view = self.env.view(state) if self.keep_view else ()
        return state._replace(inner=(state.inner, key, view), obs=obs, observed=observed & state.observed)

    def view(self, state: EnvState) -> Any:
        """The wrapped environment's view, not blanked."""
        if not self.keep_view:
            raise ValueError("the state holds no view: make the environment with keep_view=True")
        return state.inner[2]
