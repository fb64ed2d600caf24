"""DVRL on Mountain Hike."""

from dvrl_jax.configs import mountain_hike_rnn


def get_config():
    c = mountain_hike_rnn.get_config()
    c.algorithm = "dvrl"
    c.loss.encoding_coef = 0.1
    return c
