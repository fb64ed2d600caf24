"""Environments by name. A new one is a module here and a line in `make_env`."""

from dvrl_jax.envs.base import ActionSpec, Environment, EnvState, ObservationSpec
from dvrl_jax.envs.flicker import Flicker
from dvrl_jax.envs.mountain_hike import MountainHike


def make_env(config, num_envs: int, seed: int, keep_view: bool = False) -> Environment:
    """Makes the environment that `config` (the `env` group of a configuration) describes.

    With `keep_view`, `Environment.view` shows the true state also where observations are blanked.
    """
    if config.name == "MountainHike":
        env = MountainHike(num_envs, config.observation_std)
    else:
        from dvrl_jax.envs.atari import Atari

        env = Atari(config.name, num_envs, seed, config.frame_skip)
    return Flicker(env, config.p_blank, keep_view) if config.p_blank > 0 else env


__all__ = ["ActionSpec", "EnvState", "Environment", "Flicker", "MountainHike", "ObservationSpec", "make_env"]
