"""Time limits: a terminated episode is worth nothing further, a cut-off one what its last observation is worth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax.a2c import n_step_returns
from dvrl_jax.acting import value_of
from dvrl_jax.agents import bind
from dvrl_jax.envs import ActionSpec, Batched, Environment, ObservationSpec, Step
from dvrl_jax.learner import make_learner
from tests.tiny import tiny_config


class Counter(Environment):
    """Shows how many steps there were; even environments terminate after 3 steps, odd ones are cut off after 4."""

    observation = ObservationSpec((2,), jnp.float32)
    action = ActionSpec(discrete=True, size=2)

    class State(NamedTuple):
        time: jax.Array
        odd: jax.Array

    def reset(self, key):
        state = self.State(jnp.zeros(()), jax.random.bernoulli(key))
        return state, self.see(state)

    def step(self, key, state, action):
        state = state._replace(time=state.time + 1)
        over = lambda odd, limit: (state.odd == odd) & (state.time == limit)
        return Step(state, self.see(state), 1.0 + state.time, over(False, 3), over(True, 4))

    @staticmethod
    def see(state):
        return jnp.stack([state.time, state.odd.astype(jnp.float32)])


def test_returns_end_with_the_value_that_stands_there():
    """By hand: R = r + gamma * (value where the episode ends, else the next return)."""
    rewards, dones = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[False], [True], [False]])
    returns = n_step_returns(rewards, dones, jnp.array([10.0]), 0.5)
    np.testing.assert_allclose(returns[:, 0], [1 + 0.5 * 2, 2, 3 + 0.5 * 10])
    returns = n_step_returns(rewards, dones, jnp.array([10.0]), 0.5, jnp.full((3, 1), 4.0))
    np.testing.assert_allclose(returns[:, 0], [1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 3 + 0.5 * 10])


@pytest.mark.parametrize(("bootstrap", "algorithm"), [(False, "rnn"), (True, "rnn"), (True, "dvrl")])
def test_a_time_limit_is_bootstrapped_from_where_that_is_set(bootstrap, algorithm):
    config = tiny_config(algorithm, num_steps=6, num_envs=5, loss__bootstrap_truncated=bootstrap, loss__gamma=0.9)
    env = Batched(Counter(), config.num_envs)
    learner = make_learner(config, env)
    state = learner.init(jax.random.PRNGKey(2))
    draws = learner.draw(jax.random.PRNGKey(1))
    rollout = jax.jit(learner.roll_out)(state.params, state.batch_stats, state.actor, draws)
    done, truncated = np.asarray(rollout.env.done), np.asarray(rollout.env.truncated)
    assert truncated.any() and (done & ~truncated).any()
    value = np.asarray(rollout.end_value)
    assert np.all(value[~truncated] == 0.0) and np.all((value[truncated] != 0.0) == bootstrap)
    _, outcome = jax.jit(learner.gradient)(
        state.params, state.batch_stats, state.actor, state.window, jnp.int32(0), draws
    )
    expected, following = [], np.asarray(rollout.bootstrap)
    for reward, ends, worth in zip(np.asarray(rollout.env.reward)[::-1], done[::-1], value[::-1], strict=True):
        following = reward + 0.9 * np.where(ends, worth, following)
        expected.insert(0, following)
    np.testing.assert_allclose(outcome.returns, expected, rtol=1e-5)
    if bootstrap:
        check_first_end_value(learner, state, draws, rollout, truncated, value)


def check_first_end_value(learner, state, draws, rollout, truncated, value):
    """It is V after the cut-off episode's last observation, which the next episode's first has replaced in `obs`."""
    at = lambda tree, step: jax.tree.map(lambda x: x[step], tree)
    t, env = next(zip(*np.nonzero(truncated), strict=True))
    actor = state.actor
    for step in range(t + 1):
        agent = bind(learner.graphdef, state.params, state.batch_stats)
        before = agent.restart(actor.belief, actor.is_first)
        belief, _ = agent.update(before, at(rollout.segment.timesteps, step), at(draws.noise, step))
        outcome = learner.env.step(actor.env, rollout.action[step])
        actor = actor._replace(
            env=outcome, belief=belief, prev_action=agent.action_vector(rollout.action[step]), is_first=outcome.done
        )
    assert actor.env.final_obs[env, 0] == 4 and actor.env.obs[env, 0] == 0
    last = actor._replace(env=actor.env._replace(obs=actor.env.final_obs), is_first=jnp.zeros_like(actor.is_first))
    np.testing.assert_allclose(value_of(agent, last, at(draws.noise, t + 1))[env], value[t, env], rtol=1e-5)
