"""Mountain Hike with distractors, as in DPFRL: `--config=configs/distractor_hike.py:dvrl`."""

from dvrl_jax.configs import default, mountain_hike_scaled_rnn


def get_config(agent: str = "dvrl"):
    c = mountain_hike_scaled_rnn.get_config()
    c.env.name = "DistractorHike"
    c.env.observation_std = 0.0
    c.env.distractor_dims = 20
    c.env.distractor_size = 1.0
    return default.with_agent(c, agent)
