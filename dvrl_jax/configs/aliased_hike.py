"""The aliased Mountain Hike: `--config=configs/aliased_hike.py:dvrl`."""

from dvrl_jax.configs import default, mountain_hike_scaled_rnn


def get_config(agent: str = "dvrl"):
    c = mountain_hike_scaled_rnn.get_config()
    c.env.name = "AliasedHike"
    return default.with_agent(c, agent)
