"""DVRL on Mountain Hike with rewards times 0.03 and a small learning rate: its returns do not collapse later."""

from configs import mountain_hike_dvrl


def get_config():
    c = mountain_hike_dvrl.get_config()
    c.loss.reward_scale = 0.03
    c.loss.entropy_coef *= c.loss.reward_scale  # What is best to do stays the same.
    c.optimizer.learning_rate = 1e-4
    return c
