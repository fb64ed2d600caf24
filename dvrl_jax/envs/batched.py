"""Batches of environments, stepped inside the compiled program: arrays have the environments on their first axis."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvrl_jax import choices
from dvrl_jax.envs.base import Environment, ObservationSpec, Step, Task
from dvrl_jax.errors import RunError
from dvrl_jax.products import materialised

Array = jax.Array


class EnvState(NamedTuple):
    """What one call of `reset` or `step` returned, for B environments.

    Attributes:
        inner: the environments' own state, any pytree.
        obs: [B, ...] the observation to act on next.
        reward: [B] reward to learn from (clipped, where the environment clips).
        done: [B] bool, the episode as the agent sees it (on Atari: a life) ended with this call.
        truncated: [B] bool, it ended by being cut off, and did not terminate.
        valid: [B] bool, the call was a step. False where the environment only delivered the first frame of a new
            episode and ignored the action; such a call counts in no loss and in no statistic.
        true_reward: [B] reward of the underlying game, unclipped.
        game_over: [B] bool, the underlying game ended (or was cut off) with this call.
        observed: [B] bool, the observation was delivered (not blanked).
        final_obs: [B, ...] where done, the last observation of the episode that ended; elsewhere the same as `obs`.
    """

    inner: Any
    obs: Array
    reward: Array
    done: Array
    truncated: Array
    valid: Array
    true_reward: Array
    game_over: Array
    observed: Array
    final_obs: Array

    @classmethod
    def begin(cls, inner: Any, obs: Array) -> "EnvState":
        """What `reset` returns: new episodes everywhere, observed for the first time."""
        no = jnp.zeros(obs.shape[0], bool)
        return cls.go_on(inner, obs, jnp.zeros(obs.shape[0]), done=no)

    @classmethod
    def go_on(
        cls,
        inner: Any,
        obs: Array,
        reward: Array,
        done: Array,
        truncated: Array | None = None,
        final_obs: Array | None = None,
    ) -> "EnvState":
        """What `step` returns where each call is a step, an episode is a game, and rewards are as they are.

        `truncated` and `final_obs` may be left out where no episode is cut off.
        """
        yes = jnp.ones_like(done)
        return cls(
            inner=inner,
            obs=obs,
            reward=reward,
            done=done,
            truncated=~yes if truncated is None else truncated,
            valid=yes,
            true_reward=reward,
            game_over=done,
            observed=yes,
            final_obs=obs if final_obs is None else final_obs,
        )


class BatchedEnvironment(Task):
    """A batch of `num_envs` environments that start new episodes by themselves. Wrappers wrap another one.

    Attributes:
        num_envs: size of the batch.
        restorable: whether `EnvState` holds all there is, so that a checkpoint can bring the environments back exactly.
    """

    num_envs: int
    restorable: bool

    @classmethod
    def from_config(cls, config, num_envs: int, seed: int) -> "BatchedEnvironment":
        """Makes it as `config` (the `env` group of a configuration) says.

        `seed` is for what has randomness of its own, besides the key that `reset` gets.
        Raises:
            ValueError: it cannot be made so; the message says why.
        """
        raise ValueError("its class has no from_config")

    @classmethod
    def for_seeds(cls, config, num_envs: int, seeds: Sequence[int]) -> "BatchedEnvironment":
        """Makes it for several seeds of one program, each with `num_envs` environments; here, one that serves them all.

        Raises:
            ValueError: it cannot be made so; the message says why.
        """
        env = cls.from_config(config, num_envs, seeds[0])
        if len(seeds) > 1 and not env.restorable:
            raise ValueError("its state is not all in EnvState, so it serves a single seed")
        return env

    def of_seed(self, place: int) -> "BatchedEnvironment":
        """The one whose `reset` begins the episodes of the seed in that place; here, of any seed."""
        del place
        return self

    @classmethod
    def observation_of(cls, config) -> ObservationSpec:
        """What observations are like as `config` has it; here, makes an environment to see. Raises as `from_config`."""
        return cls.from_config(config, num_envs=1, seed=0).observation

    @abc.abstractmethod
    def reset(self, key: Array) -> EnvState:
        """Starts new episodes everywhere; `reward` is 0 and `done` is False."""

    @abc.abstractmethod
    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes actions [B] int32 (discrete) or [B, A] float32 (continuous). Pure, to be called in compiled code."""

    def view(self, state: EnvState) -> Any:
        """What a person is shown of the true state, arrays [B, ...]: the observation, where nothing says more."""
        return state.obs


class Inner(NamedTuple):
    """What a `Batched` carries: the environments' states, and a key [B] for each of them."""

    state: Any
    key: Array


class Batched(BatchedEnvironment):
    """`num_envs` copies of one environment. Where an episode ends, `obs` is the next one's first observation.

    What happens in one of the copies depends on its own key alone, wherever in whichever batch it is.
    """

    restorable = True

    def __init__(self, env: Environment, num_envs: int):
        self.env, self.num_envs = env, num_envs
        self.name, self.settings, self.painter = env.name, env.settings, env.painter
        self.observation, self.action, self.steps_per_second = env.observation, env.action, env.steps_per_second
        self.wrapped = env.wrapped

    def reset(self, key: Array) -> EnvState:
        """Splits the key into one for each of the environments. Traceable under `jit` and `vmap`."""

        def begin(key):
            key, reset_key = jax.random.split(key)
            state, obs = checked_reset(self.env, reset_key)
            return Inner(state, key), obs

        return EnvState.begin(*jax.vmap(begin)(jax.random.split(key, self.num_envs)))

    def step(self, state: EnvState, action: Array) -> EnvState:
        def step(inner, action):
            key, step_key, reset_key = jax.random.split(inner.key, 3)
            first, first_obs = checked_reset(self.env, reset_key)
            state, obs, reward, terminated, truncated = checked_step(self.env, step_key, inner.state, action)
            done = terminated | truncated
            state, next_obs = jax.tree.map(lambda new, old: jnp.where(done, new, old), (first, first_obs), (state, obs))
            return EnvState.go_on(Inner(state, key), next_obs, reward, done, truncated & ~terminated, obs)

        stepped, how = jax.vmap(step)(state.inner, action), choices.current()
        return jax.tree.map(lambda x: how.over_envs(materialised, 0, x), stepped) if how.materialise else stepped

    def view(self, state: EnvState) -> Any:
        return jax.vmap(self.env.view)(state.inner.state, state.obs)


# What an environment returns is checked whenever it is traced: then shapes are those of one environment, which is what
# its author wrote.


def checked_reset(env: Environment, key: Array) -> tuple[Any, Array]:
    """What `env.reset` returns. Raises RunError if that is not as its interface says."""
    maker, made = f"{type(env).__name__}: reset", env.reset(key)
    if not isinstance(made, tuple) or len(made) != 2:
        raise RunError(f"{maker} returns {_sort(made)}, and must return (state, obs)")
    _check_field(maker, "obs", made[1], env.observation.shape, env.observation.dtype)
    return made


def checked_step(env: Environment, key: Array, state: Any, action: Array) -> Step:
    """What `env.step` returns, as arrays. Raises RunError if that is not as its interface says."""
    maker, step = f"{type(env).__name__}: step", env.step(key, state, action)
    if not isinstance(step, Step):
        raise RunError(f"{maker} returns {_sort(step)}, and must return a Step")
    _check_field(maker, "obs", step.obs, env.observation.shape, env.observation.dtype)
    _check_field(maker, "reward", step.reward, (), jnp.float32)
    for field in ("terminated", "truncated"):
        _check_field(maker, field, getattr(step, field), (), bool)
    _check_alike(maker, "state", state, step.state)
    return jax.tree.map(jnp.asarray, step)


def check(env: BatchedEnvironment, state: EnvState) -> None:
    """Makes sure that what `reset` has returned, and what `step` would, are as the interface says.

    Raises:
        RunError: they are not; the message says what is, and what should be.
    """
    name = env.name or type(env).__name__
    _check_state(f"{name}: reset", env, state)
    action = (env.num_envs,) if env.action.discrete else (env.num_envs, env.action.size)
    action = jax.ShapeDtypeStruct(action, jnp.int32 if env.action.discrete else jnp.float32)
    after = jax.eval_shape(env.step, state, action)
    _check_state(f"{name}: step", env, after)
    _check_alike(f"{name}: step", "inner", state.inner, after.inner)


def _check_state(maker: str, env: BatchedEnvironment, state: Any) -> None:
    if not isinstance(state, EnvState):
        raise RunError(f"{maker} returns {_sort(state)}, and must return an EnvState")
    batch = (env.num_envs,)
    wanted = dict.fromkeys(("obs", "final_obs"), ((*batch, *env.observation.shape), env.observation.dtype))
    wanted |= dict.fromkeys(("reward", "true_reward"), (batch, jnp.float32))
    wanted |= dict.fromkeys(("done", "truncated", "valid", "game_over", "observed"), (batch, bool))
    for field, (shape, dtype) in wanted.items():
        _check_field(maker, field, getattr(state, field), shape, dtype)


def _check_field(maker: str, field: str, value: Any, shape: tuple[int, ...], dtype: Any) -> None:
    try:
        found = jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value))
    except (TypeError, ValueError):
        raise RunError(f"{maker} returns {field} as {_sort(value)}, and must return an array") from None
    should = jax.ShapeDtypeStruct(shape, dtype)
    # Numbers may have more bits, where JAX is set to that.
    same = found.dtype == should.dtype or all(jnp.issubdtype(x.dtype, jnp.floating) for x in (found, should))
    if not same or found.shape != should.shape:
        raise RunError(f"{maker} returns {field} as {_kind(found)}, and must return {_kind(should)}")


def _check_alike(maker: str, field: str, before: Any, after: Any) -> None:
    """Makes sure that a state keeps its structure, shapes and dtypes from `reset` to `step`."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise RunError(f"{maker} returns `{field}` of other parts than reset does")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if _kind(old) != _kind(new):
            place = ".".join([field, *(jax.tree_util.keystr((part,), simple=True) for part in path)])
            raise RunError(f"{maker} returns {place} as {_kind(new)}, and reset as {_kind(old)}")


def _sort(x: Any) -> str:
    """The type of an object, for messages; of a tuple, how long it is."""
    return f"a tuple of {len(x)}" if type(x) is tuple else type(x).__name__


def _kind(x: Any) -> str:
    """Type and shape of an array, for messages: float32[4, 2]."""
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
