"""RNN baseline on Mountain Hike."""

from dvrl_jax.configs import default


def get_config():
    c = default.get_config()
    c.env.observation_std = 0.3
    c.model.h_dim = 128
    c.model.action_encoding = 64
    c.total_env_steps = 25_000_000
    return c
