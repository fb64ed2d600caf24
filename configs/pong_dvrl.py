"""DVRL on flickering Pong."""

from configs import atari_dvrl


def get_config():
    return atari_dvrl.get_config("Pong")
