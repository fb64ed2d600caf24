"""The interface between environments and training: batched, pure, stepped inside the compiled program.

An environment is an object with static facts (`num_envs`, `observation`, `action`) and two functions,
`reset(key) -> EnvState` and `step(state, action) -> EnvState`. All arrays have the environments on their first axis.
"""

import abc
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvrl_jax.errors import RunError

Array = jax.Array


class ObservationSpec(NamedTuple):
    """Shape of one observation, (H, W, C) for images or (D,) for vectors, and its dtype (uint8 means 0..255)."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3


class ActionSpec(NamedTuple):
    """`size` choices if `discrete`, else vectors of `size` real numbers."""

    discrete: bool
    size: int


class EnvState(NamedTuple):
    """What one call of `reset` or `step` returned, for B environments.

    Attributes:
        inner: the environment's own state, any pytree.
        obs: [B, ...] the observation to act on next.
        reward: [B] reward to learn from (clipped, where the environment clips).
        done: [B] bool, the episode as the agent sees it (on Atari: a life) ended with this call.
        transition: [B] bool, the call was a transition. False where the environment only delivered the first frame
            of a new episode and ignored the action; such a call counts in no loss and in no statistic.
        true_reward: [B] reward of the underlying game, unclipped.
        game_over: [B] bool, the underlying game ended (or was cut off) with this call.
        observed: [B] bool, the observation was delivered (not blanked).
    """

    inner: Any
    obs: Array
    reward: Array
    done: Array
    valid: Array
    true_reward: Array
    game_over: Array
    observed: Array
    truncated: Array = ()
    final_obs: Array = ()

    @classmethod
    def begin(cls, inner: Any, obs: Array) -> "EnvState":
        """What `reset` returns: new episodes everywhere, observed for the first time."""
        no, zero = jnp.zeros(obs.shape[0], bool), jnp.zeros(obs.shape[0])
        return cls(inner, obs, reward=zero, done=no, valid=~no, true_reward=zero, game_over=no, observed=~no)

    @classmethod
    def go_on(cls, inner: Any, obs: Array, reward: Array, done: Array) -> "EnvState":
        """What `step` returns where each call is a transition, an episode is a game, and rewards are as they are.

        Where done, `obs` is the first observation of the next episode.
        """
        yes = jnp.ones_like(done)
        return cls(inner, obs, reward, done, valid=yes, true_reward=reward, game_over=done, observed=yes)


class Environment(abc.ABC):
    """A batch of `num_envs` environments. Wrappers implement the same interface around another one.

    Attributes:
        name: what configurations call it (`env.name`); None for wrappers, and for Atari, which is called by its games.
        settings: what may be set about it, with defaults. They are fields of the `env` group of its configurations.
        num_envs: size of the batch. observation, action: what they are like.
        restorable: whether `EnvState` holds all there is, so that a checkpoint can bring the environment back exactly.
        steps_per_second: how fast a video of it runs, where its painter does not say.
    """

    name: str | None = None
    settings: Mapping[str, Any] = {}
    num_envs: int
    observation: ObservationSpec
    action: ActionSpec
    restorable: bool
    steps_per_second: float = 15.0

    @classmethod
    def from_config(cls, config, num_envs: int, seed: int) -> "Environment":
        """Makes it as `config` (the `env` group of a configuration) says: here, cls(num_envs, **settings).

        `seed` is for what has randomness of its own, besides the key that `reset` gets.
        Raises:
            ValueError: it cannot be made so; the message says why.
        """
        del seed
        settings = {setting: config[setting] for setting in cls.settings}
        try:
            inspect.signature(cls).bind(num_envs, **settings)
        except TypeError as error:
            raise ValueError(f"its __init__ does not take num_envs and its settings: {error}") from None
        return cls(num_envs, **settings)

    @classmethod
    def observation_of(cls, config, num_envs: int) -> ObservationSpec:
        """What observations are like as `config` has it; here, makes an environment to see. Raises as `from_config`."""
        return cls.from_config(config, num_envs, seed=0).observation

    @classmethod
    def painter(cls) -> Any:
        """Who draws it, a `pictures.Painter`; None leaves that to whoever draws images, and vectors undrawn."""
        return None

    @abc.abstractmethod
    def reset(self, key: Array) -> EnvState:
        """Starts new episodes everywhere. Called outside compiled code; `reward` is 0 and `done` is False."""

    @abc.abstractmethod
    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes actions [B] int32 (discrete) or [B, A] float32 (continuous). Pure, to be called in compiled code."""

    def view(self, state: EnvState) -> Any:
        """What a person is shown of the true state, arrays [B, ...]: the observation, where nothing says more."""
        return state.obs


BatchedEnvironment = Environment

# What is in an EnvState besides `inner` and `obs`: for each of the environments a number or a truth value.
_NUMBERS, _TRUTHS = ("reward", "true_reward"), ("done", "valid", "game_over", "observed")


def check(env: Environment, state: EnvState) -> None:
    """Makes sure that what `reset` has returned, and what `step` would, are as `Environment` and `EnvState` say.

    Raises:
        RunError: they are not; the message says what is, and what should be.
    """
    name = env.name or type(env).__name__
    _check_state(f"{name}: reset", env, state)
    action = (env.num_envs,) if env.action.discrete else (env.num_envs, env.action.size)
    action = jax.ShapeDtypeStruct(action, jnp.int32 if env.action.discrete else jnp.float32)
    after = jax.eval_shape(env.step, state, action)
    _check_state(f"{name}: step", env, after)
    if jax.tree.structure(state) != jax.tree.structure(after):
        raise RunError(f"{name}: step returns an `inner` of other parts than reset does")
    for (path, before), now in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(after), strict=True):
        if _kind(before) != _kind(now):
            place = jax.tree_util.keystr(path, simple=True, separator=".")
            raise RunError(f"{name}: step returns {place} as {_kind(now)}, and reset as {_kind(before)}")


def _check_state(maker: str, env: Environment, state: Any) -> None:
    if not isinstance(state, EnvState):
        raise RunError(f"{maker} returns {type(state).__name__}, and must return an EnvState")
    batch = (env.num_envs,)
    wanted = {"obs": ((*batch, *env.observation.shape), env.observation.dtype)}
    wanted |= dict.fromkeys(_NUMBERS, (batch, jnp.float32)) | dict.fromkeys(_TRUTHS, (batch, bool))
    for field, (shape, dtype) in wanted.items():
        should = jax.ShapeDtypeStruct(shape, dtype)
        found = jax.ShapeDtypeStruct(jnp.shape(getattr(state, field)), jnp.result_type(getattr(state, field)))
        # Numbers may have more bits, where JAX is set to that.
        same = found.dtype == should.dtype or all(jnp.issubdtype(x.dtype, jnp.floating) for x in (found, should))
        if not same or found.shape != should.shape:
            raise RunError(f"{maker} returns {field} as {_kind(found)}, and must return {_kind(should)}")


def _kind(x: Any) -> str:
    """Type and shape of an array, for messages: float32[4, 2]."""
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
