"""DVRL on flickering Pong."""

from dvrl_jax.configs import atari_dvrl


def get_config():
    return atari_dvrl.get_config("Pong")
