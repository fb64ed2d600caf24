"""RNN baseline on flickering Pong."""

from dvrl_jax.configs import atari_rnn


def get_config():
    return atari_rnn.get_config("Pong")
