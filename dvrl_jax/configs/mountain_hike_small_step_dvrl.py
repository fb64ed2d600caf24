"""DVRL on Mountain Hike with rewards times 0.03 and a small learning rate: its returns do not collapse later."""

from dvrl_jax.configs import mountain_hike_dvrl, mountain_hike_small_step_rnn


def get_config():
    return mountain_hike_small_step_rnn.take_small_steps(mountain_hike_dvrl.get_config())
