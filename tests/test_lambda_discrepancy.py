"""The lambda-discrepancy: its returns and losses by hand, and the second value head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import a2c
from dvrl_jax.agents import bind
from dvrl_jax.lambda_discrepancy import lambda_returns
from dvrl_jax.learner import make_learner
from tests.tiny import normals, recall, tiny_config

T, B = 5, 3
REWARDS, VALUES, ENDS, BOOTSTRAP = (normals(n, *shape) for n, shape in enumerate([(T, B)] * 3 + [(B,)]))
DONES = np.zeros((T, B), bool)
DONES[1, 0] = DONES[4, 1] = True


def by_recursion(rewards, dones, values, bootstrap, gamma, trace, ends):
    returns, following = np.zeros((T, B)), bootstrap
    for t in reversed(range(len(rewards))):
        next_value = bootstrap if t == len(rewards) - 1 else values[t + 1]
        for b in range(B):
            mixed = (1 - trace) * next_value[b] + trace * following[b]
            returns[t, b] = rewards[t, b] + gamma * (ends[t, b] if dones[t, b] else mixed)
        following = returns[t]
    return returns


@pytest.mark.parametrize("trace", [0.0, 0.6, 1.0])
def test_lambda_returns_are_those_of_their_recursion(trace):
    actual = lambda_returns(REWARDS, DONES, VALUES, BOOTSTRAP, 0.9, trace, ENDS)
    expected = by_recursion(REWARDS, DONES, VALUES, BOOTSTRAP, 0.9, trace, ENDS)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    if trace == 1.0:
        n_step = a2c.n_step_returns(jnp.asarray(REWARDS), DONES, BOOTSTRAP, 0.9, ENDS)
        np.testing.assert_allclose(actual, n_step, rtol=1e-5, atol=1e-6)


def test_there_is_a_second_head_only_where_it_is_asked_for():
    def weights(**fields):
        learner = make_learner(tiny_config("rnn", **fields), recall(B))
        return jax.eval_shape(learner.init, jax.random.key(0)).params

    plain, second = weights(), weights(loss__lambda_discrepancy_coef=0.5)
    assert "second_value_head" not in plain
    assert set(second) == {*plain, "second_value_head"}


def test_the_losses_of_an_update_are_those_of_both_heads():
    config = tiny_config("rnn", num_steps=T, loss__lambda_discrepancy_coef=0.5, loss__td_lambdas=(0.9, 0.2))
    learner = make_learner(config, recall(B))
    state = learner.init(jax.random.key(0))
    draws = learner.draw(jax.random.key(1))
    grads, outcome = jax.jit(learner.gradient)(state.params, state.batch_stats, state.actor, state.window, 0, draws)
    agent, rollout = bind(learner.graphdef, state.params, state.batch_stats), outcome.rollout
    belief, values = state.actor.belief, []
    for t in range(T):
        timestep = jax.tree.map(lambda x, t=t: x[t], rollout.segment.timesteps)
        belief, _ = agent.update(agent.restart(belief, timestep.is_first), timestep, ())
        values.append(np.asarray(agent.values(agent.features(belief))))
    first, second = np.stack(values, axis=1)
    data = (np.asarray(rollout.env.reward), np.asarray(rollout.env.done))
    bootstrap, ends = np.asarray(rollout.bootstrap), np.zeros((T, B))
    targets = [
        by_recursion(*data, value, after, config.loss.gamma, trace, ends)
        for value, after, trace in zip((first, second), bootstrap, (0.9, 0.2), strict=True)
    ]
    found = {name: float(x) for name, x in outcome.losses.items()}
    np.testing.assert_allclose(outcome.returns, targets[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["value"], np.mean((targets[0] - first) ** 2), rtol=1e-4)
    np.testing.assert_allclose(found["second_value"], np.mean((targets[1] - second) ** 2), rtol=1e-4)
    np.testing.assert_allclose(found["lambda_discrepancy"], np.mean((first - second) ** 2), rtol=1e-4)
    total = 0.5 * found["value"] + found["action"] - 0.01 * found["entropy"]
    total += 0.5 * found["second_value"] + 0.5 * found["lambda_discrepancy"]
    np.testing.assert_allclose(found["total"], total, rtol=1e-5)
    assert float(jnp.max(jnp.abs(grads["second_value_head"]["kernel"]["x"][...]))) > 0
