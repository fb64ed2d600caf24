"""Environments by name. A new one is a module here, with a class that says its `name`."""

from dvrl_jax import discovery
from dvrl_jax.envs.atari import Atari, game_names
from dvrl_jax.envs.base import ActionSpec, Environment, EnvState, ObservationSpec
from dvrl_jax.envs.flicker import Flicker
from dvrl_jax.envs.mountain_hike import MountainHike


def named() -> dict[str, type[Environment]]:
    """The environments that have a name of their own: all but the Atari games."""
    return discovery.named(Environment, __name__)


def find(name: str) -> type[Environment] | None:
    """The class of environment that configurations call `name`: one of `named`, or an Atari game; None if neither."""
    return named().get(name) or (Atari if name in game_names() else None)


def make_env(config, num_envs: int, seed: int, keep_view: bool = False) -> Environment:
    """Makes the environment that `config` (the `env` group of a configuration) describes.

    With `keep_view`, `Environment.view` shows the true state also where observations are blanked.
    """
    env = find(config.name).from_config(config, num_envs, seed)
    return Flicker(env, config.p_blank, keep_view) if config.p_blank > 0 else env


__all__ = [
    "ActionSpec",
    "EnvState",
    "Environment",
    "Flicker",
    "MountainHike",
    "ObservationSpec",
    "find",
    "make_env",
    "named",
]
