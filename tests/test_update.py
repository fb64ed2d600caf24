"""An update of training is the gradient of the window and a step of the optimiser; what is logged of it is measured."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dvrl_jax import a2c, acting
from dvrl_jax.agents import Timestep, bind, dvrl
from dvrl_jax.envs import Batched, Flicker
from dvrl_jax.learner import make_learner
from tests.tiny import Recall, recall, tiny_config

WINDOW = 3


def assert_same(actual, expected, what):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=what)


def masked_mean(x, mask):
    return float(np.sum(np.asarray(x, float) * np.asarray(mask)) / np.sum(mask))


@pytest.fixture(scope="module")
def updates():
    """Updates one by one, more than a window of them: (state before, what the parts give, state after)."""
    # Enough environments that seldom all observations of a step are blank: batch norm would make much of little then.
    fields = {"num_envs": 8, "bptt_segments": WINDOW, "model__batch_norm": True, "model__policy_batch_norm": True}
    config = tiny_config("dvrl", **fields)
    # Steps in proportion to the gradient: else the rounding of those that batch norm makes 0 would be steps of its own.
    config.optimizer.eps, config.optimizer.learning_rate = 1.0, 0.1
    learner = make_learner(config, Flicker(recall(config.num_envs), 0.4))
    optimizer = a2c.make_optimizer(config.optimizer)
    run, gradient = jax.jit(learner.run), jax.jit(learner.gradient)
    state = learner.init(jax.random.PRNGKey(0))
    window, found = state.window, []
    for _ in range(WINDOW + 1):
        state = state._replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics))
        draws = learner.draw(jax.random.fold_in(state.key, state.update))
        place = state.update % WINDOW
        grads, outcome = gradient(state.params, state.batch_stats, state.actor, window, place, draws)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        window = window.put(outcome.rollout.segment, place)
        after = run(state, jnp.int32(1))
        found.append((state, (grads, outcome, optax.apply_updates(state.params, steps), opt_state), after))
        state = after
    return learner, found


def test_an_update_is_the_gradient_of_the_window_and_a_step_of_the_optimiser(updates):
    _, found = updates
    for before, (_, outcome, params, opt_state), after in found:
        update = int(before.update)
        assert_same(after.params, params, f"weights after update {update}")
        assert_same(after.opt_state, opt_state, f"optimiser after update {update}")
        assert_same(after.batch_stats, outcome.rollout.batch_stats, f"averages after update {update}")
        assert_same(after.actor.belief, outcome.rollout.actor.belief, f"beliefs after update {update}")
        assert int(after.update) == update + 1 and int(after.skipped) == 0
        for a, b in zip(*map(jax.tree.leaves, (before.batch_stats, after.batch_stats)), strict=True):
            assert np.all(a != b)


def test_what_is_logged_of_an_update_is_what_happened_in_it(updates):
    _, found = updates
    for _, (grads, outcome, *_), after in found:
        logged, env = after.metrics.means(), outcome.rollout.env
        assert 0 < np.mean(env.observed) < 1
        norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
        expected = {"gradient.norm": norm, "obs.avg_nr_observed": masked_mean(env.observed, env.valid)}
        expected |= {f"loss.{name}": float(value) for name, value in outcome.losses.items()}
        expected |= {name: masked_mean(x, env.valid) for name, x in outcome.metrics.items()}
        assert logged.keys() == expected.keys()
        for name, value in expected.items():
            assert logged[name] == pytest.approx(value, rel=1e-4), name


def test_a_line_of_several_updates_is_their_mean(updates):
    learner, found = updates
    start = found[0][0]
    together = jax.jit(learner.run)(start, jnp.int32(2)).metrics.means()
    one, two = (after.metrics.means() for _, _, after in found[:2])
    for name, value in together.items():
        assert value == pytest.approx((one[name] + two[name]) / 2, rel=1e-4), name


def test_losses_over_particles_are_summed_up_as_in_numpy():
    loss = np.random.default_rng(0).normal(size=(4, 5))
    found = dvrl._spread("loss.prior", jnp.asarray(loss))
    np.testing.assert_allclose(found["loss.prior.mean"], loss.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found["loss.prior.std"], loss.std(-1, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(found["loss.prior.logsumexp"], -np.log(np.exp(-loss).sum(-1)), rtol=1e-5)


def test_what_is_logged_of_particles_is_of_their_densities():
    """Prior term log q(z) - log p(z), emission term -log p(o), and killed particles, of one step by hand."""
    config = tiny_config("dvrl")
    env = recall(config.num_envs)
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    obs = env.reset(jax.random.PRNGKey(1)).obs
    belief = agent.initial(env.num_envs)._replace(h=jax.random.normal(jax.random.PRNGKey(2), (3, 3, 8)))
    belief = belief._replace(log_weight=jnp.log(jnp.array([[0.8, 0.1, 0.1]] * 3)))
    noise = jax.tree.map(lambda x: x[0], agent.draw(jax.random.PRNGKey(3), 1, env.num_envs))
    none = jnp.zeros(env.num_envs)
    timestep = Timestep(obs, agent.initial_action(env.num_envs), none, none > 0)
    _, info = agent.update(belief, timestep, noise)
    inputs = agent.encode(timestep)
    step = agent.advance(belief.carry, inputs, info.trace)

    def log_normal(x, mean, var):
        x, mean, var = (np.asarray(a, float) for a in (x, mean, var))
        return np.sum(-0.5 * (x - mean) ** 2 / var - 0.5 * np.log(2 * np.pi * var), axis=-1)

    prior = log_normal(step.z, step.proposal_mean, step.proposal_var)
    prior -= log_normal(step.z, *agent.prior_of(step.h_prev, inputs))
    mean, var = (np.asarray(x).reshape(3, 3, 2) for x in agent.emission_of(step.phi_z, step.h_prev, inputs))
    emission = -log_normal(np.asarray(obs)[:, None], mean, var)
    np.testing.assert_allclose(info.metrics["loss.prior.mean"], prior.mean(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(info.metrics["loss.emission.mean"], emission.mean(-1), rtol=1e-4, atol=1e-5)
    elbo = np.log(np.mean(np.exp(-prior - emission), axis=-1))
    np.testing.assert_allclose(info.losses["encoding"], -elbo, rtol=1e-4, atol=1e-5)
    killed = [3 - len(set(row)) for row in np.asarray(info.trace.ancestors).tolist()]
    np.testing.assert_array_equal(info.metrics["particles.killed"], killed)
    assert max(killed) > 0


@pytest.mark.parametrize("particles", [1, 3])
def test_noise_of_particles_is_uniform_and_normal_and_independent(particles):
    config = tiny_config("dvrl", model__num_particles=particles)
    agent = acting.make_agent(config, recall(3), jax.random.PRNGKey(0))
    steps, envs = 100, 40
    noise = agent.draw(jax.random.PRNGKey(1), steps, envs)
    u, eps = np.asarray(noise.u, float), np.asarray(noise.eps, float)
    assert u.shape == (steps, envs) and eps.shape == (steps, envs, particles, config.model.z_dim)
    assert u.min() >= 0 and u.max() < 1
    # Of n numbers: the share below q is known to sqrt(q (1 - q) / n), a mean to sqrt(1 / n), a fourth moment to
    # sqrt(96 / n), and a correlation to sqrt(1 / n); five times that is allowed.
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(np.mean(u < q) - q) < 5 * np.sqrt(q * (1 - q) / u.size)
    assert abs(eps.mean()) < 5 / np.sqrt(eps.size) and abs(eps.var() - 1) < 5 * np.sqrt(2 / eps.size)
    assert abs(np.mean(eps**4) - 3) < 5 * np.sqrt(96 / eps.size)
    pairs = [(eps[1:], eps[:-1]), (eps[:, 1:], eps[:, :-1]), (eps[..., 1:], eps[..., :-1]), (u[1:], u[:-1])]
    # With one key for both, u would be made of the same bits as the numbers that come first in eps.
    pairs += [(u[:, 1:], u[:, :-1]), (u, eps[:, :, 0, 0]), (u.ravel(), eps.ravel()[: u.size])]
    pairs += [(eps[:, :, 1:], eps[:, :, :-1])] if particles > 1 else []
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
    other = agent.draw(jax.random.PRNGKey(2), steps, envs)
    assert not np.any(np.asarray(other.u) == u) and not np.any(np.asarray(other.eps) == eps)


class CutOff(Recall):
    """Recall, whose episodes are cut off instead of coming to their end."""

    def step(self, key, state, action):
        step = super().step(key, state, action)
        return step._replace(terminated=step.truncated, truncated=step.terminated)


@pytest.mark.parametrize(("task", "bootstrap"), [(CutOff, True), (CutOff, False), (Recall, True)])
def test_a_cut_off_episode_ends_with_the_value_of_its_last_observation(task, bootstrap):
    config = tiny_config("rnn", num_steps=Recall.LENGTH, loss__bootstrap_truncated=bootstrap)
    learner = make_learner(config, Batched(task(), 3))
    state = learner.init(jax.random.PRNGKey(0))
    given = (state.params, state.batch_stats, state.actor, state.window, state.update)
    _, outcome = jax.jit(learner.gradient)(*given, learner.draw(jax.random.PRNGKey(1)))
    rollout = outcome.rollout
    assert not rollout.env.done[:-1].any() and rollout.env.done[-1].all()
    expected = np.zeros((Recall.LENGTH, 3))
    if task is CutOff and bootstrap:
        # The environments show new episodes by now; the last observation of the old ones is known.
        env = rollout.actor.env._replace(obs=jnp.broadcast_to(jnp.array([0.0, 1.0]), (3, 2)))
        last = rollout.actor._replace(env=env, is_first=jnp.zeros(3, bool))
        expected[-1] = acting.value_of(bind(learner.graphdef, state.params, state.batch_stats), last, ())
        assert np.abs(expected[-1]).min() > 1e-3
    np.testing.assert_allclose(rollout.end_value, expected, rtol=1e-4, atol=1e-6)
    last_return = np.asarray(rollout.env.reward[-1]) + config.loss.gamma * expected[-1]
    np.testing.assert_allclose(outcome.returns[-1], last_return, rtol=1e-4, atol=1e-6)
