"""RNN baseline on Mountain Hike with scaled rewards: no plateau of a million steps (docs/results/README.md)."""

from dvrl_jax.configs import mountain_hike_rnn


def get_config():
    return scale_rewards(mountain_hike_rnn.get_config(), 0.1)


def scale_rewards(c, scale):
    """Scales rewards, and the entropy bonus with them: what is best to do stays the same."""
    c.loss.reward_scale = scale
    c.loss.entropy_coef *= scale
    return c
