"""The interface between environments and training: batched, pure, stepped inside the compiled program.

An environment is an object with static facts (`num_envs`, `observation`, `action`) and two functions,
`reset(key) -> EnvState` and `step(state, action) -> EnvState`. All arrays have the environments on their first axis.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

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
    transition: Array
    true_reward: Array
    game_over: Array
    observed: Array


class Environment(abc.ABC):
    """A batch of `num_envs` environments. Wrappers implement the same interface around another one.

    Attributes:
        name: what configurations call it (`env.name`); None for wrappers, and for Atari, which is called by its games.
        settings: what may be set about it, with defaults. They are fields of the `env` group of its configurations.
        num_envs: size of the batch. observation, action: what they are like.
        restorable: whether `EnvState` holds all there is, so that a checkpoint can bring the environment back exactly.
    """

    name: str | None = None
    settings: Mapping[str, Any] = {}
    num_envs: int
    observation: ObservationSpec
    action: ActionSpec
    restorable: bool

    @classmethod
    def from_config(cls, config, num_envs: int, seed: int) -> "Environment":
        """Makes it as `config` (the `env` group of a configuration) says: here, cls(num_envs, **settings).

        `seed` is for what has randomness of its own, besides the key that `reset` gets.
        Raises:
            ValueError: it cannot be made so; the message says why.
        """
        del seed
        return cls(num_envs, **{setting: config[setting] for setting in cls.settings})

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
