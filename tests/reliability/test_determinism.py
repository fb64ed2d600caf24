"""The same seed gives the same numbers, another seed others: on Mountain Hike, and on Pong with EnvPool's threads."""

import jax
import numpy as np
import pytest

from configs import pong_rnn
from dvrl_jax.envs.atari import make_pool
from dvrl_jax.runs import run_directory
from tests import tiny


def pong():
    c = pong_rnn.get_config()
    small = {"num_envs": 4, "model.channels": (4, 4, 4), "model.h_dim": 8, "model.action_encoding": 4}
    c.update_from_flattened_dict(small | {"bptt_segments": 2, "log.interval": 5, "total_env_steps": 2000})
    return c


def hike():
    return tiny.tiny_hike("dvrl", total_env_steps=2000)


def train(workdir, config, seed):
    """The state after training, and the lines of metrics without those that depend on the clock."""
    state = tiny.train(workdir, config, seed=seed)
    return state, tiny.untimed(run_directory.read_metrics(workdir))


@pytest.mark.parametrize("task", [hike, pong])
def test_a_seed_fixes_everything(tmp_path, task):
    (state, lines), (again, lines_again) = (train(tmp_path / str(i), task(), seed=3) for i in range(2))
    assert len(lines) >= 10 and lines == lines_again
    for tree in ("params", "batch_stats", "opt_state", "episodes"):
        for x, y in zip(*(jax.tree.leaves(getattr(s, tree)) for s in (state, again)), strict=True):
            np.testing.assert_array_equal(x, y)
    if task is hike:
        _, others = train(tmp_path / "other", task(), seed=4)
        assert all(line["loss.total"] != other["loss.total"] for line, other in zip(lines, others, strict=True))


def test_envpool_returns_environments_in_order():
    """Its threads finish in any order, but a pool that is stepped as a whole waits for all and sorts them."""
    pool, rng = make_pool("Pong", 8, 0, 4), np.random.default_rng(0)
    pool.reset()
    for _ in range(300):
        *_, info = pool.step(rng.integers(0, 6, 8).astype(np.int32))
        np.testing.assert_array_equal(info["env_id"], np.arange(8))
