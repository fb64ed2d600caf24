"""DPFRL on Mountain Hike, with the choices of its paper."""

from dvrl_jax.configs import mountain_hike_rnn


def get_config():
    c = mountain_hike_rnn.get_config()
    c.algorithm = "dpfrl"
    c.model.resampling = "soft"
    c.model.summary = "mgf"
    return c
