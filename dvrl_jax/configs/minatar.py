"""A flickering game of MinAtar, in Gymnax (the extra `gymnax`): `--config=configs/minatar.py:Breakout,rnn`.

Games are Asterix, Breakout, Freeway, Seaquest and SpaceInvaders.
"""

from dvrl_jax.configs import default


def get_config(argument: str = "Breakout"):
    game, agent = default.task_and_agent(argument)
    c = default.with_agent(default.get_config(), agent)
    c.env.name = f"gymnax/{game}-MinAtar"
    c.env.p_blank = 0.5
    c.total_env_steps = 10_000_000
    c.num_envs = 32
    c.model.channels = (16, 32, 32)
    c.model.h_dim = 128
    c.model.z_dim = 64
    c.model.action_encoding = 32
    c.optimizer.learning_rate = 1e-3
    c.log.interval = 100
    return c
