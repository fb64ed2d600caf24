"""DVRL on Mountain Hike with scaled rewards: no plateau of a million steps (docs/results/README.md)."""

from configs import mountain_hike_dvrl


def get_config():
    c = mountain_hike_dvrl.get_config()
    c.loss.reward_scale = 0.1
    c.loss.entropy_coef *= c.loss.reward_scale  # What is best to do stays the same.
    return c
