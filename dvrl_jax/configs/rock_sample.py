"""RockSample: `--config=configs/rock_sample.py:7x8,rnn`; sizes are 5x5, 7x8, 11x11 and 15x15."""

from dvrl_jax.configs import default


def get_config(argument: str = "7x8"):
    size, agent = default.task_and_agent(argument)
    c = default.with_agent(default.get_config(), agent)
    c.env.name = "RockSample"
    c.env.rock_sample_size = size
    c.env.rock_sample_steps = 200
    c.env.rock_sample_random_start = False
    c.total_env_steps = 5_000_000
    c.model.h_dim = 128
    c.model.z_dim = 64
    c.model.action_encoding = 64
    c.model.min_emission_std = 0.1  # Rocks that are not checked and fields that are not entered are always 0.
    c.loss.reward_scale = 0.1  # Rewards are 10 at most.
    c.loss.bootstrap_truncated = True  # The observation does not tell the time.
    return c
