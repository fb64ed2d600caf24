"""An environment of Gymnax (the extra `gymnax`): `--config=configs/gymnax.py:MemoryChain-bsuite,dvrl`.

Its parameters are fields, such as `--config.env.params.memory_length=30`. Agents are "dvrl", "rnn" and so on.
"""

from dvrl_jax.configs import default


def get_config(argument: str = "MemoryChain-bsuite"):
    task, agent = default.task_and_agent(argument)
    c = default.with_agent(default.get_config(), agent)
    c.env.name = f"gymnax/{task}"
    c.total_env_steps = 2_000_000
    c.num_envs = 64
    c.num_steps = 16
    c.bptt_segments = 4  # A window of 64 steps.
    c.model.h_dim = 128
    c.model.z_dim = 64
    c.model.action_encoding = 32
    c.model.update_gate_bias = 3.0  # Without it, memory of an episode's beginning is not learned.
    c.model.min_emission_std = 0.1  # Many observations have components that hardly change.
    if task.endswith("-MinAtar") or task == "Pong-misc":  # Images.
        c.model.channels = (16, 32, 32)
    c.log.interval = 100
    return c
