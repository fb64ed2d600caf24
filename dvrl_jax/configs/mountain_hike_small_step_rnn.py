"""RNN baseline on Mountain Hike with rewards times 0.03 and a small learning rate, beside DVRL's best setting."""

from dvrl_jax.configs import mountain_hike_rnn, mountain_hike_scaled_rnn


def get_config():
    return take_small_steps(mountain_hike_rnn.get_config())


def take_small_steps(c):
    """Scales rewards by 0.03 and takes a third of the default learning rate."""
    c.optimizer.learning_rate = 1e-4
    return mountain_hike_scaled_rnn.scale_rewards(c, 0.03)
