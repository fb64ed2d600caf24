"""Wrappers of batched environments."""

import copy
from typing import Any

import jax
import jax.numpy as jnp

from dvrl_jax.envs.batched import BatchedEnvironment, EnvState

Array = jax.Array


class Flicker(BatchedEnvironment):
    """Replaces observations by zeros with probability `p_blank`, independently per environment and step.

    This makes almost any task partially observable. One draw blanks both `obs` and `final_obs`. `EnvState.inner` is
    (the wrapped environments' state, a key [B] each, their view if `keep_view`, for pictures, else nothing).
    """

    def __init__(self, env: BatchedEnvironment, p_blank: float, keep_view: bool = False):
        self.env = env
        self.p_blank, self.keep_view = p_blank, keep_view
        self.name, self.settings, self.painter = env.name, env.settings, env.painter
        self.num_envs, self.observation, self.action = env.num_envs, env.observation, env.action
        self.restorable, self.steps_per_second = env.restorable, env.steps_per_second

    def of_seed(self, place: int) -> "Flicker":
        other = copy.copy(self)
        other.env = self.env.of_seed(place)
        return other

    def reset(self, key: Array) -> EnvState:
        env_key, key = jax.random.split(key)
        return self._blank(self.env.reset(env_key), jax.random.split(key, self.num_envs))

    def step(self, state: EnvState, action: Array) -> EnvState:
        inner, keys, _ = state.inner
        return self._blank(self.env.step(state._replace(inner=inner), action), keys)

    def _blank(self, state: EnvState, keys: Array) -> EnvState:
        def draw(key):
            key, draw_key = jax.random.split(key)
            return key, jax.random.bernoulli(draw_key, 1.0 - self.p_blank)

        keys, observed = jax.vmap(draw)(keys)
        shown = lambda obs: jnp.where(observed.reshape(-1, *(1,) * (obs.ndim - 1)), obs, jnp.zeros_like(obs))
        return state._replace(
            inner=(state.inner, keys, self.env.view(state) if self.keep_view else ()),
            obs=shown(state.obs),
            observed=observed & state.observed,
            final_obs=shown(state.final_obs),
        )

    def view(self, state: EnvState) -> Any:
        """The wrapped environments' view, not blanked."""
        if not self.keep_view:
            raise ValueError("the state holds no view: make the environment with keep_view=True")
        return state.inner[2]
