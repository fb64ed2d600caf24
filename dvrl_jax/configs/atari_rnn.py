"""RNN baseline on a flickering Atari game: `--config=configs/atari_rnn.py:Asteroids`."""

from dvrl_jax.configs import default


def get_config(game: str = "Pong"):
    c = default.get_config()
    c.env.name = game
    c.env.p_blank = 0.5
    c.env.frame_skip = 1 if game == "Asteroids" else 4
    c.bptt_segments = 10
    c.model.channels = (32, 64, 32)
    c.model.batch_norm = True
    c.model.policy_batch_norm = True
    c.optimizer.learning_rate = 1e-4
    c.log.interval = 100  # 8,000 steps: minutes on a CPU.
    return c
