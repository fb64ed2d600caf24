"""The interface of one environment, unbatched. `batched.py` makes a batch of it, which is what training steps."""

import abc
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class ObservationSpec(NamedTuple):
    """What one observation is like.

    Attributes:
        shape: (H, W, C) for images or (D,) for vectors. dtype: uint8 means 0..255.
        emission: the distribution p(o) of agents that predict observations: "bernoulli" per component, for values in
            0..1, "normal" with a learned variance per component, or "categorical", for one-hot vectors. None leaves it
            to the dtype: Bernoulli for uint8 and bool, else normal.
    """

    shape: tuple[int, ...]
    dtype: Any
    emission: str | None = None

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def likelihood(self) -> str:
        """Which distribution p(o) is: `emission`, or what follows from the dtype."""
        return self.emission or ("bernoulli" if jnp.dtype(self.dtype).name in ("uint8", "bool") else "normal")


class ActionSpec(NamedTuple):
    """`size` choices if `discrete`, else vectors of `size` real numbers."""

    discrete: bool
    size: int


class Step(NamedTuple):
    """What one step of one environment returns.

    Attributes:
        state: the environment's state after the step, a pytree like that of `reset`.
        obs: of that state, also where the episode has ended: never a next episode's. reward: [] of the step.
        terminated: [] bool, the episode ended in this state, whose value is 0.
        truncated: [] bool, the episode was cut off, as by a time limit: the state has a value to bootstrap from.
    """

    state: Any
    obs: Array
    reward: Array
    terminated: Array
    truncated: Array


class Task(abc.ABC):
    """What one environment and a batch of environments have in common.

    Attributes:
        name: what configurations call it (`env.name`); None for wrappers, and for Atari, which is called by its games.
        settings: what may be set about it, with defaults. They are fields of the `env` group of its configurations.
        observation, action: what one environment's are like.
        steps_per_second: how fast a video of it runs, where its painter does not say.
        wrapped: the fields of the `env` group by which it is observed otherwise, such as "p_blank".
    """

    name: str | None = None
    settings: Mapping[str, Any] = {}
    observation: ObservationSpec
    action: ActionSpec
    steps_per_second: float = 15.0
    wrapped: tuple[str, ...] = ()

    @classmethod
    def check(cls, config) -> None:
        """Raises ConfigError if a field of a configuration is beyond what this environment allows."""
        del config

    @classmethod
    def settings_of(cls, name: str) -> Mapping[str, Any]:
        """What may be set about the one that configurations call `name`, by dotted name; here, `settings`."""
        del name
        return cls.settings

    @classmethod
    def painter(cls) -> Any:
        """Who draws it, a `pictures.Painter`; None leaves that to whoever draws images, and vectors undrawn."""
        return None


class Environment(Task):
    """One environment. Its functions are unbatched, pure, and traceable under `jit` and `vmap`."""

    @classmethod
    def from_config(cls, config) -> "Environment":
        """Makes it as `config` (the `env` group of a configuration) says: here, cls(**settings).

        Raises:
            ValueError: it cannot be made so; the message says why.
        """
        settings = {setting: config[setting] for setting in cls.settings}
        try:
            inspect.signature(cls).bind(**settings)
        except TypeError as error:
            raise ValueError(f"its __init__ does not take its settings: {error}") from None
        return cls(**settings)

    @classmethod
    def observation_of(cls, config) -> ObservationSpec:
        """What observations are like as `config` has it; here, makes an environment to see. Raises as `from_config`."""
        return cls.from_config(config).observation

    @abc.abstractmethod
    def reset(self, key: Array) -> tuple[Any, Array]:
        """Starts an episode. Returns (state, observation)."""

    @abc.abstractmethod
    def step(self, key: Array, state: Any, action: Array) -> Step:
        """Takes an action, [] int32 (discrete) or [A] float32 (continuous). It never resets."""

    def view(self, state: Any, obs: Array) -> Any:
        """What a person is shown of the true state, arrays: the observation, where nothing says more."""
        del state
        return obs

    def state_vector(self, state: Any) -> Array:
        """The state as one vector of floating point numbers, scaled as observations are, for `env.reveal_state`.

        Raises:
            NotImplementedError: the environment does not say.
        """
        raise NotImplementedError(f"{type(self).__name__} has no state_vector")
