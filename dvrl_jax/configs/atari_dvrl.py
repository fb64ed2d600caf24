"""DVRL on a flickering Atari game: `--config=configs/atari_dvrl.py:Asteroids`."""

from dvrl_jax.configs import atari_rnn


def get_config(game: str = "Pong"):
    c = atari_rnn.get_config(game)
    c.algorithm = "dvrl"
    c.model.num_particles = 15
    c.loss.encoding_coef = 0.1
    c.optimizer.learning_rate = 2e-4
    return c
