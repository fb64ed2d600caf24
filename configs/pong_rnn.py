"""RNN baseline on flickering Pong."""

from configs import atari_rnn


def get_config():
    return atari_rnn.get_config("Pong")
