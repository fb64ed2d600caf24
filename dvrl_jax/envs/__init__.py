"""Environments by name. A new one is a module here, with a class that says its `name`."""

from dvrl_jax import discovery
from dvrl_jax.envs.atari import Atari, game_names
from dvrl_jax.envs.base import ActionSpec, Environment, ObservationSpec, Step, Task
from dvrl_jax.envs.batched import Batched, BatchedEnvironment, EnvState, check
from dvrl_jax.envs.gymnax import Gymnax, is_gymnax
from dvrl_jax.envs.mountain_hike import MountainHike
from dvrl_jax.envs.wrappers import Flicker
from dvrl_jax.errors import DiscoveryError, RunError


def named() -> dict[str, type[Environment] | type[BatchedEnvironment]]:
    """The environments that have a name of their own: all but the Atari games.

    Raises:
        DiscoveryError: one of them cannot be used, or is called like an Atari game.
    """
    found = discovery.named(Task, __name__)
    for name, kind in found.items():
        if kind is not MountainHike and name in game_names():
            raise DiscoveryError(f"{kind.__module__}: calls a class {name!r}, which is an Atari game")
    return found


def find(name: str) -> type[Environment] | type[BatchedEnvironment] | None:
    """The class of environment that configurations call `name`; None if it is not one of `named`, or an Atari game, or
    "gymnax/" and then anything.
    """
    if is_gymnax(name):
        return Gymnax
    return named().get(name) or (Atari if name in game_names() else None)


def as_batch(env: Environment | BatchedEnvironment, num_envs: int) -> BatchedEnvironment:
    """`num_envs` copies of one environment; a batch is returned as it is.

    Raises:
        RunError: it lacks an attribute of its interface.
    """
    kind = Environment if isinstance(env, Environment) else BatchedEnvironment
    own = ("observation", "action") if kind is Environment else ("num_envs", "observation", "action", "restorable")
    if missing := [name for name in own if not hasattr(env, name)]:
        name = env.name or type(env).__name__
        raise RunError(f"{name}: has no {missing[0]} (see the attributes of {kind.__name__})")
    return Batched(env, num_envs) if kind is Environment else env


def make_env(config, num_envs: int, seed: int, keep_view: bool = False) -> BatchedEnvironment:
    """Makes the environments that `config` (the `env` group of a configuration) describes.

    With `keep_view`, `BatchedEnvironment.view` shows the true state also where observations are blanked.

    Raises:
        RunError: they cannot be made so, or lack an attribute of their interface.
    """
    if num_envs < 1:
        raise RunError(f"num_envs = {num_envs}: must be at least 1")
    kind = find(config.name)
    try:
        one = issubclass(kind, Environment)
        env = kind.from_config(config) if one else kind.from_config(config, num_envs, seed)
    except ValueError as error:
        raise RunError(f"env: {num_envs} of {config.name} cannot be made ({error})") from None
    env = as_batch(env, num_envs)
    return Flicker(env, config.p_blank, keep_view) if config.p_blank > 0 else env


__all__ = [
    "ActionSpec",
    "Batched",
    "BatchedEnvironment",
    "EnvState",
    "Environment",
    "Flicker",
    "Gymnax",
    "MountainHike",
    "ObservationSpec",
    "Step",
    "as_batch",
    "check",
    "find",
    "is_gymnax",
    "make_env",
    "named",
]
