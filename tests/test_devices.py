"""Environments divided over devices: the update is that of one device."""

import math
import os
import re
import subprocess
import sys

import pytest

from dvrl_jax import devices
from dvrl_jax.errors import ConfigError

DEVICES = 4
UPDATES = 3


@pytest.mark.parametrize("name", ["hike", "pong"])
def test_an_update_is_that_of_one_device(name):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, "-m", "tests.test_devices", name]
    subprocess.run(command, check=True, timeout=600, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ConfigError, match=r"num_devices = 1000: must be at most \d+, the devices that JAX sees here"):
        devices.mesh(1000)


def compare(name: str) -> None:
    """Updates on one and on several devices: the same weights, to rounding, and the same games."""
    import jax
    import numpy as np

    from dvrl_jax import envs
    from dvrl_jax.choices import Choices
    from dvrl_jax.learner import make_learner
    from dvrl_jax.runs import config as config_lib
    from tests.tiny import tiny_hike, tiny_pong

    config = tiny_hike("dvrl") if name == "hike" else tiny_pong("rnn")
    more = {"num_envs": 8} if name == "hike" else {"num_envs": 4, "model.batch_norm": True}
    config = config_lib.from_fields(config_lib.flatten(config) | more)
    expected = None
    for number in (1, DEVICES):
        mesh = devices.mesh(number) if number > 1 else None
        env = envs.make_env(config.env, config.num_envs, 3, mesh=mesh)
        learner = make_learner(config, env, Choices().for_devices(mesh))
        state = learner.init(jax.random.PRNGKey(0))
        lies = devices.shardings(state, number)
        program = jax.jit(learner.run, out_shardings=lies).lower(jax.device_put(state, lies), UPDATES).compile()
        state = jax.device_get(program(jax.device_put(state, lies), UPDATES))
        if number > 1:
            text = program.as_text()
            assert "all-reduce" in text
            # Nothing with features is gathered: only numbers of each step and environment, and the pools of games.
            shapes = [
                [int(size) for size in shape.split(",")]
                for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
            ]
            assert max(map(math.prod, shapes)) <= (config.num_steps + 1) * config.num_envs
            np.testing.assert_allclose(state.actor.env.obs, expected.actor.env.obs, rtol=1e-5, atol=1e-5)
            for a, b in zip(*(jax.tree.leaves((x.params, x.batch_stats)) for x in (state, expected)), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if name == "hike" else 5e-5)
        expected = state


if __name__ == "__main__":
    compare(sys.argv[1])
