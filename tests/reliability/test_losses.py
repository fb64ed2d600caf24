"""Returns, losses and optimiser against their formulas in plain NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from dvrl_jax import a2c, envs
from dvrl_jax.learner import make_learner
from tests.tiny import tiny_hike

T, B = 5, 3


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    value, log_prob, entropy, encoding, returns = rng.normal(size=(5, T, B)).astype(np.float32)
    return value, log_prob, entropy, encoding, returns, rng.random((T, B)) < 0.7


def test_returns_are_discounted_sums_up_to_the_end_of_an_episode():
    rng = np.random.default_rng(1)
    rewards, bootstrap = rng.normal(size=(T, B)).astype(np.float32), rng.normal(size=B).astype(np.float32)
    dones = np.zeros((T, B), bool)
    dones[1, 0] = dones[4, 1] = True
    expected = np.zeros((T, B))
    for t in range(T):
        for b in range(B):
            for later in range(t, T):
                expected[t, b] += 0.9 ** (later - t) * rewards[later, b]
                if dones[later, b]:
                    break
            else:
                expected[t, b] += 0.9 ** (T - t) * bootstrap[b]
    np.testing.assert_allclose(a2c.n_step_returns(rewards, dones, bootstrap, 0.9), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(a2c.n_step_returns(rewards, dones, x, 0.9)))(bootstrap)
    np.testing.assert_array_equal(gradient, np.zeros(B))


def test_rewards_are_scaled_for_learning_and_reported_as_they_are():
    outcomes = {}
    for scale in (1.0, 0.5):
        config = tiny_hike("rnn", loss__reward_scale=scale)
        learner = make_learner(config, envs.make_env(config.env, config.num_envs, 0))
        state = learner.init(jax.random.PRNGKey(0))
        draws = learner.draw(jax.random.PRNGKey(1))
        given = (state.params, state.batch_stats, state.actor, state.window, state.update, draws)
        _, outcomes[scale] = learner.gradient(*given)
    for scale, outcome in outcomes.items():
        env = outcome.rollout.env
        expected = a2c.n_step_returns(scale * env.reward, env.done, outcome.rollout.bootstrap, config.loss.gamma)
        np.testing.assert_allclose(outcome.returns, expected, rtol=1e-6)
    for name in ("reward", "true_reward"):
        half, whole = (getattr(outcomes[scale].rollout.env, name) for scale in (0.5, 1.0))
        np.testing.assert_array_equal(half, whole)


def test_losses_and_their_gradients_by_hand():
    value, log_prob, entropy, encoding, returns, mask = inputs()
    coefs = default.get_config().loss
    coefs.value_coef, coefs.action_coef, coefs.entropy_coef, coefs.encoding_coef = 0.5, 2.0, 0.01, 0.3
    mean = lambda x: np.sum(x[mask], dtype=np.float64) / np.sum(mask)
    advantage = returns - value
    parts = [mean(advantage**2), -mean(advantage * log_prob), mean(entropy), mean(encoding)]
    total = 0.5 * parts[0] + 2.0 * parts[1] - 0.01 * parts[2] + 0.3 * parts[3]

    def losses_of(value, log_prob, entropy, encoding):
        return a2c.a2c_losses(value, log_prob, entropy, {"encoding": encoding}, returns, mask, coefs)

    names = ["total", "value", "action", "entropy", "encoding"]
    losses = losses_of(value, log_prob, entropy, encoding)
    assert losses.keys() == set(names)
    np.testing.assert_allclose([losses[name] for name in names], [total, *parts], rtol=1e-5)
    gradients = jax.grad(lambda *x: losses_of(*x)["total"], argnums=(0, 1, 2, 3))(value, log_prob, entropy, encoding)
    one = mask / np.sum(mask)
    # No gradient reaches the value through the policy's loss.
    expected = [-advantage * one, -2.0 * advantage * one, -0.01 * one, 0.3 * one]
    for gradient, by_hand in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, by_hand, rtol=1e-5, atol=1e-7)


def test_a_mean_over_nothing_is_zero():
    nothing = jnp.zeros((T, B), bool)
    assert float(a2c.masked_mean(jnp.full((T, B), jnp.nan), nothing)) == 0
    assert float(a2c.masked_mean(jnp.ones((T, B)), ~nothing)) == 1


def test_rmsprop_clips_and_adds_eps_outside_the_root():
    config = default.get_config().optimizer
    config.learning_rate, config.alpha, config.eps, config.max_grad_norm = 0.1, 0.8, 0.01, 0.5
    optimizer = a2c.make_optimizer(config)
    params = {"x": jnp.zeros(2)}
    state, square, expected = optimizer.init(params), np.zeros(2), np.zeros(2)
    for gradient in ([3.0, 4.0], [0.1, -0.2]):
        updates, state = optimizer.update({"x": jnp.asarray(gradient)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        clipped = np.asarray(gradient) * min(1.0, 0.5 / np.linalg.norm(gradient))
        square = 0.8 * square + 0.2 * clipped**2
        expected = expected - 0.1 * clipped / (np.sqrt(square) + 0.01)
        np.testing.assert_allclose(params["x"], expected, rtol=1e-5)


def test_adam_uses_its_own_decays():
    config = default.get_config().optimizer
    config.name, config.learning_rate, config.betas, config.eps = "adam", 0.1, (0.5, 0.75), 0.01
    optimizer = a2c.make_optimizer(config)
    updates, _ = optimizer.update({"x": jnp.asarray([0.3])}, optimizer.init({"x": jnp.zeros(1)}))
    # The first step's averages, corrected for their start at 0, are the gradient and its square.
    np.testing.assert_allclose(updates["x"], [-0.1 * 0.3 / (0.3 + 0.01)], rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite_looks_at_every_number_of_every_leaf(value):
    tree = {"a": jnp.zeros(3), "b": [jnp.ones((2, 2)), jnp.zeros((), jnp.int32)]}
    assert bool(a2c.all_finite(tree))
    tree["b"][0] = tree["b"][0].at[1, 0].set(value)
    assert not bool(a2c.all_finite(tree))


def test_every_update_draws_anew():
    """Actions of consecutive updates differ by their noise; an untrained policy's means hardly differ."""
    config = tiny_hike("rnn", optimizer__learning_rate=1e-9)
    learner = make_learner(config, envs.make_env(config.env, config.num_envs, 0))
    state, run, actions = learner.init(jax.random.PRNGKey(0)), jax.jit(learner.run), []
    for _ in range(3):
        state = run(state, jnp.int32(1))
        actions.append(np.asarray(state.actor.prev_action))
    assert all(np.max(np.abs(a - b)) > 0.5 for a, b in itertools.pairwise(actions))
