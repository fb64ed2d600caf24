"""DVRL on Mountain Hike with scaled rewards: no plateau of a million steps (docs/results/README.md)."""

from dvrl_jax.configs import mountain_hike_dvrl, mountain_hike_scaled_rnn


def get_config():
    return mountain_hike_scaled_rnn.scale_rewards(mountain_hike_dvrl.get_config(), 0.1)
