"""Environments by name. A new one is a module here, with a class that says its `name`."""

from dvrl_jax import discovery
from dvrl_jax.envs.atari import Atari, game_names
from dvrl_jax.envs.base import ActionSpec, BatchedEnvironment, Environment, EnvState, ObservationSpec, check
from dvrl_jax.envs.flicker import Flicker
from dvrl_jax.envs.mountain_hike import MountainHike
from dvrl_jax.errors import DiscoveryError, RunError


def named() -> dict[str, type[Environment]]:
    """The environments that have a name of their own: all but the Atari games.

    Raises:
        DiscoveryError: one of them cannot be used, or is called like an Atari game.
    """
    found = discovery.named(Environment, __name__)
    for name, kind in found.items():
        if kind is not MountainHike and name in game_names():
            raise DiscoveryError(f"{kind.__module__}: calls a class {name!r}, which is an Atari game")
    return found


def find(name: str) -> type[Environment] | None:
    """The class of environment that configurations call `name`: one of `named`, or an Atari game; None if neither."""
    return named().get(name) or (Atari if name in game_names() else None)


def make_env(config, num_envs: int, seed: int, keep_view: bool = False) -> Environment:
    """Makes the environment that `config` (the `env` group of a configuration) describes.

    With `keep_view`, `Environment.view` shows the true state also where observations are blanked.

    Raises:
        RunError: it cannot be made so, or lacks an attribute of `Environment`.
    """
    if num_envs < 1:
        raise RunError(f"num_envs = {num_envs}: must be at least 1")
    try:
        env = find(config.name).from_config(config, num_envs, seed)
    except ValueError as error:
        raise RunError(f"env: {num_envs} of {config.name} cannot be made ({error})") from None
    if missing := [name for name in ("num_envs", "observation", "action", "restorable") if not hasattr(env, name)]:
        raise RunError(f"{config.name}: has no {missing[0]} (see the attributes of Environment)")
    return Flicker(env, config.p_blank, keep_view) if config.p_blank > 0 else env


__all__ = [
    "ActionSpec",
    "EnvState",
    "Environment",
    "Flicker",
    "MountainHike",
    "ObservationSpec",
    "check",
    "find",
    "make_env",
    "named",
]
