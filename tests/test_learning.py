"""Agents learn a task that needs memory, and the test notices when they have none."""

import jax
import jax.numpy as jnp
import pytest

from dvrl_jax.agents import Agent
from dvrl_jax.learner import make_learner
from tests.tiny import Recall, recall, tiny_config

BEST = Recall.LENGTH - 1
UPDATES = 300  # Six times as many as both agents need.


def mean_return_after_training(algorithm: str) -> float:
    config = tiny_config(
        algorithm,
        num_envs=16,
        num_steps=5,
        bptt_segments=5,
        model__channels=(32, 32),
        model__h_dim=32,
        model__z_dim=8,
        model__num_particles=4,
        model__action_encoding=0,  # Else the previous action would carry the cue from step to step.
        optimizer__learning_rate=2e-3,
    )
    learner = make_learner(config, recall(config.num_envs))
    state = jax.jit(learner.run)(learner.init(jax.random.PRNGKey(0)), jnp.int32(UPDATES))
    return state.episodes.summary()["result.mean"]


@pytest.mark.parametrize("algorithm", ["rnn", "dvrl"])
def test_learns_to_remember(algorithm):
    assert mean_return_after_training(algorithm) > 0.8 * BEST


@pytest.mark.parametrize("algorithm", ["rnn", "dvrl"])
def test_a_broken_belief_learns_nothing(algorithm, monkeypatch):
    """The same training with the belief set to zero in every step stays at chance."""
    for name in ("restart", "restart_carry"):  # While acting, and while learning.
        intact = getattr(Agent, name)
        broken = lambda self, x, is_first, intact=intact: intact(self, x, jnp.ones_like(is_first))
        monkeypatch.setattr(Agent, name, broken)
    assert mean_return_after_training(algorithm) < 0.3 * BEST
