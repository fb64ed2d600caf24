"""Wrappers: what an agent gets to see of an environment, changed. They compose, and off they cost nothing.

Those of one environment (`Wrapper`) change an observation by itself. Those of a batch (`BatchWrapper`) also remember
earlier ones; Atari takes them too. `wrap` and `wrap_batch` apply what a configuration says, in the order of this file.
None but `Flicker` changes the random numbers of the environments that it wraps.
"""

import abc
import copy
from typing import Any

import jax
import jax.numpy as jnp

from dvrl_jax.envs.base import Environment, ObservationSpec, Step
from dvrl_jax.envs.batched import BatchedEnvironment, EnvState, checked_reset, checked_step
from dvrl_jax.errors import ConfigError

Array = jax.Array

# Fields of the `env` group by which wrappers are asked for, with the values that leave them out.
OF_ONE = {"reveal_state": False, "keep_components": (), "obs_noise_std": 0.0, "noise_components": 0}
OF_BATCHES = {"obs_delay": 0, "p_repeat": 0.0, "p_blank": 0.0}

# Folded into an environment's key for the draws of a wrapper: larger than any number of keys that one is split into.
NOISE_TAG, COMPONENTS_TAG, REPEAT_TAG = 0x6E6F6973, 0x636F6D70, 0x72657065


def in_use(config) -> list[str]:
    """The fields of `config` (the `env` group of a configuration) by which wrappers are asked for."""
    return [field for field, off in (OF_ONE | OF_BATCHES).items() if config[field] != off]


def refusal(config, field: str, rule: str) -> ConfigError:
    """The error of a field of the `env` group that does not fit the environment."""
    return ConfigError(f"env.{field} = {config[field]!r}: must be {rule}")


# --- Of one environment ----------------------------------------------------------------------------------------------


class Wrapper(Environment):
    """One environment with other observations, as `field` of the `env` group asks; its states are the wrapped one's."""

    field: str = ""

    def __init__(self, env: Environment, observation: ObservationSpec):
        self.env, self.observation, self.action = env, observation, env.action
        self.name, self.settings, self.painter = env.name, env.settings, env.painter
        self.steps_per_second, self.wrapped = env.steps_per_second, (*env.wrapped, self.field)

    @abc.abstractmethod
    def change(self, key: Array, state: Any, obs: Array) -> Array:
        """The observation that is shown in place of `obs`, of that state; `key` is that of the reset or step."""

    def reset(self, key: Array) -> tuple[Any, Array]:
        state, obs = checked_reset(self.env, key)
        return state, self.change(key, state, obs)

    def step(self, key: Array, state: Any, action: Array) -> Step:
        step = checked_step(self.env, key, state, action)
        return step._replace(obs=self.change(key, step.state, step.obs))

    def view(self, state: Any, obs: Array) -> Any:
        """The wrapped environment's view; where that is the observation, the one that is shown."""
        return self.env.view(state, obs)

    def state_vector(self, state: Any) -> Array:
        return self.env.state_vector(state)


class RevealState(Wrapper):
    """The state itself is the observation (`Environment.state_vector`): a control that has nothing to remember.

    Raises NotImplementedError if the environment has no such vector.
    """

    field = "reveal_state"

    def __init__(self, env: Environment):
        vector = jax.eval_shape(lambda: env.state_vector(checked_reset(env, jax.random.key(0))[0]))
        super().__init__(env, ObservationSpec(vector.shape, vector.dtype))

    def change(self, key: Array, state: Any, obs: Array) -> Array:
        return self.env.state_vector(state)


class KeepComponents(Wrapper):
    """Of a vector observation [D], the components with the numbers `kept`, in that order."""

    field = "keep_components"

    def __init__(self, env: Environment, kept: tuple[int, ...]):
        _, dtype, emission = env.observation
        # A part of a one-hot vector is none.
        emission = None if emission == "categorical" else emission
        super().__init__(env, ObservationSpec((len(kept),), dtype, emission))
        self.kept = kept

    def change(self, key: Array, state: Any, obs: Array) -> Array:
        return obs[jnp.asarray(self.kept)]


class GaussianNoise(Wrapper):
    """Adds independent normal noise of standard deviation `std` to every component of an observation."""

    field = "obs_noise_std"

    def __init__(self, env: Environment, std: float):
        super().__init__(env, env.observation._replace(emission="normal"))
        self.std = std

    def change(self, key: Array, state: Any, obs: Array) -> Array:
        return obs + self.std * jax.random.normal(jax.random.fold_in(key, NOISE_TAG), obs.shape, obs.dtype)


class NoiseComponents(Wrapper):
    """Appends `number` components to a vector observation that are normal noise of standard deviation `std` alone."""

    field = "noise_components"

    def __init__(self, env: Environment, number: int, std: float = 1.0):
        (size,), dtype, _ = env.observation
        super().__init__(env, ObservationSpec((size + number,), dtype))
        self.number, self.std = number, std

    def change(self, key: Array, state: Any, obs: Array) -> Array:
        noise = jax.random.normal(jax.random.fold_in(key, COMPONENTS_TAG), (self.number,), obs.dtype)
        return jnp.concatenate([obs, self.std * noise])


def wrap(env: Environment, config) -> Environment:
    """One environment as `config` (the `env` group of a configuration) lets it be seen.

    With `reveal_state` the state is all that is seen, and no other wrapper applies.
    Raises:
        ConfigError: a wrapper does not fit it.
    """
    name, (shape, dtype, _) = env.name or type(env).__name__, env.observation
    if config.reveal_state:
        try:
            revealed = RevealState(env)
        except NotImplementedError:
            raise refusal(config, "reveal_state", f"False for {name}, which does not say what its state is") from None
        if len(revealed.observation.shape) != 1:
            raise refusal(config, "reveal_state", f"False for {name}, whose state_vector is no vector")
        return revealed
    if kept := config.keep_components:
        if len(shape) != 1 or max(kept) >= shape[0]:
            components = f"numbers from 0 to {shape[0] - 1}" if len(shape) == 1 else "() for images"
            raise refusal(config, "keep_components", f"{components} (env.name is {name})")
        env = KeepComponents(env, kept)
    is_real = jnp.issubdtype(dtype, jnp.floating)
    if config.obs_noise_std > 0:
        if not is_real:
            raise refusal(config, "obs_noise_std", f"0 for {name}, whose observations are no real numbers")
        env = GaussianNoise(env, config.obs_noise_std)
    if config.noise_components > 0:
        if not is_real or len(shape) != 1:
            raise refusal(config, "noise_components", f"0 for {name}, whose observations are no vectors of reals")
        env = NoiseComponents(env, config.noise_components, config.noise_components_std)
    return env


# --- Of a batch ------------------------------------------------------------------------------------------------------


class BatchWrapper(BatchedEnvironment):
    """A batch with other observations, as `field` of the `env` group asks. `EnvState.inner` is (the wrapped batch's
    state, what the wrapper remembers, the wrapped batch's view if `keep_view`, for pictures, else nothing).
    """

    field: str = ""

    def __init__(self, env: BatchedEnvironment, keep_view: bool = False):
        self.env, self.keep_view = env, keep_view
        self.name, self.settings, self.painter = env.name, env.settings, env.painter
        self.num_envs, self.observation, self.action = env.num_envs, env.observation, env.action
        self.restorable, self.steps_per_second = env.restorable, env.steps_per_second
        self.wrapped = (*env.wrapped, self.field)

    def of_seed(self, place: int) -> "BatchWrapper":
        other = copy.copy(self)
        other.env = self.env.of_seed(place)
        return other

    @abc.abstractmethod
    def begin(self, key: Array, state: EnvState) -> tuple[Any, EnvState]:
        """What to remember [B, ...], and what is shown of `state`, which the wrapped batch's `reset` returned."""

    @abc.abstractmethod
    def change(self, memory: Any, state: EnvState) -> tuple[Any, EnvState]:
        """The same after a step that returned `state`."""

    def reset(self, key: Array) -> EnvState:
        state = self.env.reset(key)
        return self._shown(state, *self.begin(key, state))

    def step(self, state: EnvState, action: Array) -> EnvState:
        inner, memory, _ = state.inner
        state = self.env.step(state._replace(inner=inner), action)
        return self._shown(state, *self.change(memory, state))

    def _shown(self, state: EnvState, memory: Any, shown: EnvState) -> EnvState:
        return shown._replace(inner=(state.inner, memory, self.env.view(state) if self.keep_view else ()))

    def view(self, state: EnvState) -> Any:
        """The wrapped batch's view, of what it showed itself."""
        if not self.keep_view:
            raise ValueError("the state holds no view: make the environment with keep_view=True")
        return state.inner[2]


def _begins(state: EnvState) -> Array:
    """Where `obs` is the first observation of an episode, [B]."""
    return state.done | ~state.valid


def _where(condition: Array, yes: Array, no: Array) -> Array:
    """Per environment, of arrays [B, ...], the first where `condition` [B] holds, else the second."""
    return jnp.where(condition.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)


class Delay(BatchWrapper):
    """Observations come `steps` steps late, at least 1; until then an episode's first one is shown.

    At its end, `final_obs` is as late as all others. The memory is the observations [B, steps, ...] still to come.
    """

    field = "obs_delay"

    def __init__(self, env: BatchedEnvironment, steps: int, keep_view: bool = False):
        super().__init__(env, keep_view)
        self.steps = steps

    def begin(self, key: Array, state: EnvState) -> tuple[Array, EnvState]:
        return self._filled(state.obs), state

    def change(self, memory: Array, state: EnvState) -> tuple[Array, EnvState]:
        late, begins = memory[:, 0], _begins(state)
        moved = jnp.concatenate([memory[:, 1:], state.obs[:, None]], axis=1)
        obs, final_obs = _where(begins, state.obs, late), _where(state.valid, late, state.final_obs)
        return _where(begins, self._filled(state.obs), moved), state._replace(obs=obs, final_obs=final_obs)

    def _filled(self, obs: Array) -> Array:
        return jnp.repeat(obs[:, None], self.steps, axis=1)


class Sticky(BatchWrapper):
    """With probability `p_repeat`, independently per environment and step, the observation shown before is repeated.

    An episode's first observation is always new. One draw is for `obs` and `final_obs`. The memory is (a key [B] each,
    the observation shown).
    """

    field = "p_repeat"

    def __init__(self, env: BatchedEnvironment, p_repeat: float, keep_view: bool = False):
        super().__init__(env, keep_view)
        self.p_repeat = p_repeat

    def begin(self, key: Array, state: EnvState) -> tuple[tuple[Array, Array], EnvState]:
        return (jax.random.split(jax.random.fold_in(key, REPEAT_TAG), self.num_envs), state.obs), state

    def change(self, memory: tuple[Array, Array], state: EnvState) -> tuple[tuple[Array, Array], EnvState]:
        keys, before = memory
        keys, repeated = _draw(keys, self.p_repeat)
        obs = _where(repeated & ~_begins(state), before, state.obs)
        final_obs = _where(repeated & state.valid, before, state.final_obs)
        return (keys, obs), state._replace(obs=obs, final_obs=final_obs)


class Flicker(BatchWrapper):
    """Replaces observations by zeros with probability `p_blank`, independently per environment and step.

    This makes almost any task partially observable. One draw blanks both `obs` and `final_obs`. The memory is a key [B]
    each.
    """

    field = "p_blank"

    def __init__(self, env: BatchedEnvironment, p_blank: float, keep_view: bool = False):
        super().__init__(env, keep_view)
        self.p_blank = p_blank

    def reset(self, key: Array) -> EnvState:
        env_key, key = jax.random.split(key)
        state = self.env.reset(env_key)
        return self._shown(state, *self.begin(key, state))

    def begin(self, key: Array, state: EnvState) -> tuple[Array, EnvState]:
        return self.change(jax.random.split(key, self.num_envs), state)

    def change(self, memory: Array, state: EnvState) -> tuple[Array, EnvState]:
        keys, observed = _draw(memory, 1.0 - self.p_blank)
        obs, final_obs = (_where(observed, x, jnp.zeros_like(x)) for x in (state.obs, state.final_obs))
        return keys, state._replace(obs=obs, final_obs=final_obs, observed=observed & state.observed)


def _draw(keys: Array, probability: float) -> tuple[Array, Array]:
    """The next keys [B], and whether what has that probability happens, [B] bool."""

    def draw(key):
        key, draw_key = jax.random.split(key)
        return key, jax.random.bernoulli(draw_key, probability)

    return jax.vmap(draw)(keys)


def wrap_batch(env: BatchedEnvironment, config, keep_view: bool = False) -> BatchedEnvironment:
    """A batch as `config` (the `env` group of a configuration) lets it be seen, but for what `wrap` does."""
    if config.reveal_state:
        return env
    if config.obs_delay > 0:
        env = Delay(env, config.obs_delay, keep_view)
    if config.p_repeat > 0:
        env = Sticky(env, config.p_repeat, keep_view)
    return Flicker(env, config.p_blank, keep_view) if config.p_blank > 0 else env


def check_batch(config) -> None:
    """Raises ConfigError if wrappers of one environment are asked for where batches cannot be taken apart (Atari)."""
    for field, off in OF_ONE.items():
        if config[field] != off:
            raise refusal(config, field, f"{off!r} for {config.name}, which is stepped as a whole batch")
