"""Gymnax's environments: by name, `env.name = "gymnax/<id>"`, or any object of its interface in Python, `Gymnax(env)`.

How their observations and actions are adapted is said in `docs/environments.md` and at `Gymnax`.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax.envs.base import ActionSpec, Environment, ObservationSpec, Step
from dvrl_jax.errors import ConfigError

Array = jax.Array

PREFIX = "gymnax/"
INSTALL = "pip install 'dvrl-jax[gymnax]'"
SMALLEST_IMAGE = 5  # Of the shorter side, in pixels; the encoders have none for smaller ones.
UNBOUNDED = 1e30  # Bounds of at least this size are none: Gymnax writes float32's largest number for them.


def is_gymnax(name: Any) -> bool:
    """Whether configurations mean one of Gymnax's environments by this name."""
    return isinstance(name, str) and name.startswith(PREFIX)


class Gymnax(Environment):
    """One environment of Gymnax's interface, `reset(key, params)` and `step(key, state, action, params)`.

    Observations: those of a discrete space are one-hot. Three axes [H, W, C] of at least 5 x 5 pixels stay an image,
    of uint8, bool, or float32 whatever else it was; everything else becomes a vector, of bool, or float32 whatever else
    it was. Values of two or more axes that the space bounds by 0 and 1 have a Bernoulli emission; else see
    `ObservationSpec`.

    Actions: a policy's real numbers are clipped to [-1, 1], and scaled from there to the space's bounds; a component
    without bounds stays as it is.

    Ends: Gymnax's time limit truncates. The older form, of which `step` returns (obs, state, reward, done, info), does
    not say why an episode ended, so that each `done` terminates. Where an object has nothing but a `step` that begins
    the next episode by itself, as wrappers have, that episode is left out, and another one begun.
    """

    def __init__(self, env: Any, params: Any = None, name: str | None = None):
        """Adapts an object; `params` are its default ones if None.

        Raises:
            ValueError: its observations or actions are none that agents have networks for, or its observations change
                shape or type from `reset` to `step`.
        """
        for attribute in ("reset", "step", "action_space"):
            if not hasattr(env, attribute):
                raise ValueError(f"{type(env).__name__} has no {attribute}, and is none of Gymnax's interface")
        self.env, self.name = env, name
        self.params = getattr(env, "default_params", None) if params is None else params
        # Looked up in the class: wrappers hand on the attributes of what they wrap, whose `step_env` is not theirs.
        own = lambda method: getattr(env, method) if hasattr(type(env), method) else None
        self._reset, self._step = own("reset_env") or env.reset, own("step_env") or env.step
        self._is_truncated = own("is_truncated") if own("step_env") else None
        self.action, self.to_gymnax = _action(env.action_space(self.params))
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        obs, state = jax.eval_shape(self._begin, key)
        action = jax.ShapeDtypeStruct(() if self.action.discrete else (self.action.size,), jnp.float32)
        if self.action.discrete:
            action = jax.ShapeDtypeStruct((), jnp.int32)
        after = jax.eval_shape(self._go_on, key, state, action)[0]
        kinds = [_kind(x) for x in (obs, after)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"step returns observations as {kinds[1]}, and reset as {kinds[0]}")
        space = env.observation_space(self.params) if hasattr(env, "observation_space") else None
        self.observation, self._show = _observation(obs, space)

    @classmethod
    def settings_of(cls, name: str) -> Mapping[str, Any]:
        """The numbers among the parameters of the environment, `env.params.<parameter>`, with Gymnax's defaults.

        Raises:
            ConfigError: Gymnax is not installed, or does not have the environment or cannot make it.
        """
        return {f"params.{field}": value for field, value in _scalars(_make(name)[1]).items()}

    @classmethod
    def from_config(cls, config) -> "Gymnax":
        """Makes the one that `config.name` says, with the parameters `config.params`, if there are any.

        Raises:
            ConfigError: as `settings_of`.
        """
        params = dict(config.get("params", {}))
        if unknown := set(params) - set(_scalars(_make(config.name)[1])):
            raise ValueError(f"it has no parameter {', '.join(sorted(unknown))}")
        return _adapted(config.name, tuple(sorted(params.items())))

    def reset(self, key: Array) -> tuple[Any, Array]:
        obs, state = self._begin(key)
        return jax.tree.map(_strong, state), self._show(obs)

    def step(self, key: Array, state: Any, action: Array) -> Step:
        obs, state, reward, terminated, truncated = self._go_on(key, state, action)
        return Step(
            state=jax.tree.map(_strong, state),
            obs=self._show(obs),
            reward=jnp.asarray(reward, jnp.float32),
            terminated=jnp.asarray(terminated, bool),
            truncated=jnp.asarray(truncated, bool),
        )

    def _begin(self, key: Array) -> tuple[Any, Any]:
        return self._reset(key, self.params)

    def _go_on(self, key: Array, state: Any, action: Array) -> tuple[Any, Any, Array, Array, Any]:
        """(observation, state, reward, terminated, truncated) in Gymnax's own terms."""
        made = self._step(key, state, self.to_gymnax(action), self.params)
        if not isinstance(made, tuple) or len(made) not in (5, 6):
            raise ValueError("step must return (obs, state, reward, terminated, truncated, info), or done for the two")
        if len(made) == 6:  # The next episode has begun in what it returns, if this one has ended.
            obs, state, reward, terminated, truncated, info = made
            return info.get("final_observation", obs), state, reward, terminated, truncated
        obs, state, reward, terminated, _ = made
        truncated = self._is_truncated(state, self.params) if self._is_truncated else False
        return obs, state, reward, terminated, truncated


def _gymnax():
    """The module.

    Raises:
        ConfigError: it is not installed, cannot be imported, or another package is in its place.
    """
    needed = f"env.name: {PREFIX}... needs Gymnax 1.0.1 or later ({INSTALL})"
    try:
        import gymnax
    except ImportError as error:
        raise ConfigError(f"env.name: {PREFIX}... needs the extra 'gymnax' ({INSTALL}); {error}") from None
    except Exception as error:  # An older or another one's, which does not fit this version of JAX.
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{needed}, and the package of that name here cannot be imported ({said})") from None
    if not hasattr(gymnax, "registered_envs") or not hasattr(gymnax, "register"):  # The latter is new in 1.0.
        place = gymnax.__file__ or next(iter(gymnax.__path__))  # A folder of that name is a package without a file.
        raise ConfigError(
            f"{needed}, and {place} is another package of that name, such as the one that popgym-arcade installs"
        )
    return gymnax


@functools.cache
def _make(name: str) -> tuple[Any, Any]:
    """The environment of that name and its default parameters. Raises ConfigError as `Gymnax.settings_of`."""
    gymnax, wanted = _gymnax(), name.removeprefix(PREFIX)
    if wanted not in gymnax.registered_envs:
        close = difflib.get_close_matches(wanted, gymnax.registered_envs, n=3, cutoff=0.3)
        close = ", ".join(PREFIX + known for known in close or gymnax.registered_envs)
        raise ConfigError(f"env.name = {name!r}: Gymnax has no such environment; the nearest are {close}")
    try:
        return gymnax.make(wanted)
    except Exception as error:  # Some need files from the network.
        raise ConfigError(f"env.name = {name!r}: Gymnax cannot make it ({type(error).__name__}: {error})") from None


@functools.cache
def _adapted(name: str, params: tuple[tuple[str, Any], ...]) -> Gymnax:
    env, defaults = _make(name)
    return Gymnax(env, dataclasses.replace(defaults, **dict(params)), name)


def _scalars(params: Any) -> dict[str, int | float | bool]:
    fields = dataclasses.fields(params) if dataclasses.is_dataclass(params) else ()
    values = {field.name: getattr(params, field.name) for field in fields}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _action(space: Any) -> tuple[ActionSpec, Callable[[Array], Array]]:
    """What actions are like, and a function that makes one of the space's from an agent's."""
    if hasattr(space, "n"):
        return ActionSpec(discrete=True, size=int(space.n)), lambda action: action.astype(space.dtype)
    if not all(hasattr(space, part) for part in ("low", "high", "shape")):
        raise ValueError(f"its actions are of a {type(space).__name__}, and must be of a Discrete or Box space")
    low, high = (np.broadcast_to(np.asarray(x, np.float32), space.shape) for x in (space.low, space.high))
    bounded = np.maximum(np.abs(low), np.abs(high)) < UNBOUNDED
    low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)

    def act(action: Array) -> Array:
        action = action.reshape(space.shape)
        scaled = low + (jnp.clip(action, -1, 1) + 1) / 2 * (high - low)
        return jnp.where(bounded, scaled, action).astype(space.dtype)

    return ActionSpec(discrete=False, size=math.prod(space.shape)), act


def _observation(obs: Any, space: Any) -> tuple[ObservationSpec, Callable[[Array], Array]]:
    """What observations are like, and a function that makes one from Gymnax's, `obs`."""
    if not hasattr(obs, "shape"):
        raise ValueError(f"its observations are a {type(obs).__name__}, and must be one array")
    if hasattr(space, "n") and obs.shape == ():
        size = int(space.n)
        return ObservationSpec((size,), jnp.float32, "categorical"), lambda obs: jax.nn.one_hot(obs, size)
    if 0 in obs.shape:
        raise ValueError(f"its observations, {_kind(obs)}, are empty")
    is_image = len(obs.shape) == 3 and min(obs.shape[:2]) >= SMALLEST_IMAGE
    shape = obs.shape if is_image else (math.prod(obs.shape),)
    dtype = obs.dtype if obs.dtype == bool or (is_image and obs.dtype == jnp.uint8) else jnp.float32
    in_unit = hasattr(space, "low") and np.all(np.asarray(space.low) == 0) and np.all(np.asarray(space.high) == 1)
    emission = "bernoulli" if in_unit and len(obs.shape) >= 2 and dtype == jnp.float32 else None
    return ObservationSpec(shape, dtype, emission), lambda obs: obs.reshape(shape).astype(dtype)


def _kind(obs: Any) -> str:
    """Types and shapes of an observation, for messages: float32[4]."""
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(obs))


def _strong(x: Any) -> Array:
    """As an array whose type no Python number has left weak."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(x.dtype)
