"""RNN baseline on Mountain Hike with rewards times 0.03 and a small learning rate, beside DVRL's best setting."""

from configs import mountain_hike_rnn


def get_config():
    c = mountain_hike_rnn.get_config()
    c.loss.reward_scale = 0.03
    c.loss.entropy_coef *= c.loss.reward_scale  # What is best to do stays the same.
    c.optimizer.learning_rate = 1e-4
    return c
