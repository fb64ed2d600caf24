"""Choices within beliefs: summaries, weights that cross steps, DPFRL and the linear recurrence, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvrl_jax import acting
from dvrl_jax.agents import Inputs, Timestep, particles
from dvrl_jax.agents.particles import Carry, Resampling
from dvrl_jax.choices import Choices
from dvrl_jax.fast import lineages
from dvrl_jax.learner import make_learner
from tests.test_agents import recording
from tests.tiny import normals, tiny_config

ENVS, PARTICLES, SIZE = 3, 4, 6
LOG_WEIGHTS = np.array([[-1.0, 0.5, -np.inf, 2.0], [0.0] * 4, [-np.inf] * 4], np.float32)


def made(algorithm, **fields):
    return acting.make_agent(tiny_config(algorithm, **fields), recording("vector", False), jax.random.key(0))


def softmax(x):
    """In float64, of rows of which not all are -inf."""
    weights = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# --- Summaries -------------------------------------------------------------------------------------------------------


def summary_of(kind, log_weights, order, seed=0):
    """Of random particles in some order."""
    config = tiny_config("dvrl", model__summary=kind, model__h_dim=SIZE, model__num_particles=PARTICLES).model
    sizes = {"h": SIZE, "phi_z": SIZE}
    layer = particles.make_summary(config, sizes, rngs=nnx.Rngs(seed))
    values = [normals(n, ENVS, PARTICLES, SIZE).astype(np.float32)[:, order] for n in (1, 2)]
    found = layer.of(dict(zip(sizes, values, strict=True)), log_weights[:, order])
    assert found.shape == (ENVS, particles.summary_size(config, sizes))
    return layer, values, np.asarray(found)


@pytest.mark.parametrize("kind", particles.SUMMARIES)
def test_only_a_grus_summary_depends_on_the_order_of_the_particles(kind):
    first = summary_of(kind, LOG_WEIGHTS, np.arange(PARTICLES))[-1]
    for order in ([3, 2, 1, 0], [1, 2, 0, 3]):
        other = summary_of(kind, LOG_WEIGHTS, order)[-1]
        assert np.allclose(first, other, rtol=1e-5, atol=1e-6) == (kind != "gru")
    assert np.all(np.isfinite(first))
    # Weights count, and by environment.
    equal = summary_of(kind, np.zeros_like(LOG_WEIGHTS), np.arange(PARTICLES))[-1]
    np.testing.assert_array_equal(np.any(np.abs(equal - first) > 1e-3, axis=-1), [True, False, False])


def test_summaries_are_those_of_their_equations():
    weights = np.stack([softmax(LOG_WEIGHTS[0]), np.full(4, 0.25), np.full(4, 0.25)])
    order = np.arange(PARTICLES)
    layer, (h, phi_z), mgf = summary_of("mgf", LOG_WEIGHTS, order)
    mean = np.einsum("bk,bkd->bd", weights, np.concatenate([h, np.tanh(phi_z)], axis=-1))
    np.testing.assert_allclose(summary_of("mean", LOG_WEIGHTS, order)[-1], mean, rtol=1e-5, atol=1e-6)
    moments = np.einsum("bk,bkm->bm", weights, np.exp(h @ np.asarray(layer.directions[...])))
    np.testing.assert_allclose(mgf, np.concatenate([mean, moments], axis=-1), rtol=1e-5, atol=1e-6)
    layer, (h, phi_z), read = summary_of("attention", LOG_WEIGHTS, order)
    every, queries = np.concatenate([h, np.tanh(phi_z)], axis=-1), np.asarray(layer.queries[...])
    heads, size = queries.shape
    assert heads == 2
    for b in range(ENVS):
        for j in range(heads):
            part = slice(j * size, (j + 1) * size)
            scores = every[b] @ np.asarray(layer.keys[...])[:, part] @ queries[j] / np.sqrt(size)
            attention = weights[b] * np.exp(scores)
            values = every[b] @ np.asarray(layer.values.kernel["x"][...])[:, part]
            expected = attention / attention.sum() @ values
            np.testing.assert_allclose(read[b, part], expected, rtol=1e-4, atol=1e-5)


def test_one_particle_has_a_linear_summary_whatever_is_chosen():
    for kind in particles.SUMMARIES:
        agent = made("dvrl", model__summary=kind, model__num_particles=1)
        assert type(agent.summary) is particles.LinearSummary and agent.summary_size == agent.h_dim


# --- Weights that cross steps ----------------------------------------------------------------------------------------


def test_particles_are_resampled_where_too_few_are_effective_and_keep_their_weights_elsewhere():
    half = Resampling("systematic", below=0.5)
    log_weights = jnp.log(jnp.array([[0.97, 0.01, 0.01, 0.01], [0.3, 0.3, 0.3, 0.1]]))
    ancestors, done = half.sample(log_weights + 7.0, jnp.array([0.3, 0.3]))
    np.testing.assert_array_equal(done, [True, False])
    np.testing.assert_array_equal(ancestors, [[0, 0, 0, 0], [0, 1, 2, 3]])
    after = half.inherited(log_weights + 7.0, ancestors, done)
    np.testing.assert_allclose(np.exp(after), [[0.25] * 4, [0.3, 0.3, 0.3, 0.1]], rtol=1e-5)
    always = Resampling("systematic").sample(log_weights, jnp.array([0.3, 0.3]))
    assert always[1] is None and np.any(always[0][1] != np.arange(4))
    nothing = Resampling("none")
    np.testing.assert_allclose(
        nothing.inherited(log_weights + 7.0, *nothing.sample(log_weights, None)), log_weights, 1e-5
    )


def steps_of(agent, count):
    """Takes in some observations; returns beliefs, losses and traces."""
    env, belief = recording("vector", False), agent.initial(ENVS)
    noise = agent.draw(jax.random.key(1), count, ENVS)
    none, found = jnp.zeros(ENVS), []
    for t in range(count):
        timestep = Timestep(env.obs[t], agent.initial_action(ENVS), none, none > 0)
        belief, info = agent.update(belief, timestep, jax.tree.map(lambda x, t=t: x[t], noise))
        found.append((belief, info))
    return found


def test_without_resampling_dvrls_weights_accumulate():
    """The ELBOs of all steps add up to the log of the mean over particles of the product of a particle's weights."""
    found = steps_of(made("dvrl", model__resampling="none", loss__encoding_coef=0.1), 3)
    single = [np.asarray(b.log_weight, np.float64) - np.asarray(b.inherited, np.float64) for b, _ in found]
    total = np.sum(single, axis=0)
    peak = total.max(axis=1)
    expected = peak + np.log(np.mean(np.exp(total - peak[:, None]), axis=1))
    np.testing.assert_allclose(-sum(np.asarray(info.losses["encoding"]) for _, info in found), expected, rtol=1e-4)
    np.testing.assert_allclose(softmax(found[-1][0].log_weight), softmax(total), rtol=1e-3, atol=1e-6)
    assert found[-1][1].trace.ancestors is None
    # With `model.resample` off a step's weights count for that step alone.
    alone = steps_of(made("dvrl", model__resample=False), 3)
    assert alone[-1][0].inherited is None
    np.testing.assert_allclose(alone[-1][0].log_weight, single[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", ["stratified", "soft", "none"])
def test_lineages_are_for_weights_that_do_not_cross_steps(scheme):
    agent = made("dvrl", model__resampling=scheme)
    assert lineages.apply_to(agent) == (scheme == "stratified")
    assert not lineages.apply_to(made("dvrl", model__resample_below=0.5))
    assert not lineages.apply_to(made("dpfrl"))


# --- DPFRL -----------------------------------------------------------------------------------------------------------


def test_a_step_of_dpfrl_is_that_of_its_equations():
    agent = made("dpfrl", model__resampling="soft", model__soft_alpha=0.5, model__num_particles=PARTICLES)
    h_dim = agent.h_dim
    f8 = lambda x: np.asarray(x, np.float64)
    h, log_weight, eps = (
        normals(1, ENVS, PARTICLES, h_dim),
        normals(2, ENVS, PARTICLES),
        normals(3, ENVS, PARTICLES, h_dim),
    )
    phi = {"obs": normals(4, ENVS, agent.encoded_size), "action": normals(5, ENVS, 4)}
    single = lambda x: jnp.asarray(x, jnp.float32)
    drive = jax.tree.map(jnp.add, *(agent.drive({name: single(x)}) for name, x in phi.items()))
    ancestors = np.array([[0, 0, 1, 3], [1, 2, 2, 3], [0, 1, 2, 3]], np.int32)
    belief = agent.initial(ENVS)._replace(h=single(h), log_weight=single(log_weight))
    trace = agent.sample_trace(belief, jax.tree.map(lambda x: x[0], agent.draw(jax.random.key(0), 1, ENVS)))
    step = agent.advance(belief.carry, Inputs(drive, None), trace._replace(ancestors=ancestors, eps=single(eps)))

    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    linear = lambda layer, **x: sum(v @ f8(layer.kernel[name][...]) for name, v in x.items()) + f8(layer.bias[...])
    w = softmax(log_weight)
    for b in range(ENVS):
        of_env = {name: x[b] for name, x in phi.items()}
        for k in range(PARTICLES):
            a = ancestors[b, k]
            before = h[b, a]
            into = sum(x @ f8(agent.gru.kernel_i[name][...]) for name, x in of_env.items()) + f8(agent.gru.bias_i[...])
            back = before @ f8(agent.gru.kernel_h[...]) + f8(agent.gru.bias_h[...])
            sigma = np.logaddexp(0, linear(agent.deviation, h=before, **of_env))
            (r_i, z_i, n_i), (r_h, z_h, n_h) = np.split(into, 3), np.split(back, 3)
            z = sigmoid(z_i + z_h)
            candidate = np.tanh(n_i + sigmoid(r_i + r_h) * n_h + sigma * eps[b, k])
            after = (1 - z) * candidate + z * before
            np.testing.assert_allclose(step.carry.h[b, k], after, rtol=1e-4, atol=1e-5)
            hidden = linear(agent.score_hidden, obs=of_env["obs"], h=after)
            score = linear(agent.score_out, x=np.maximum(hidden, 0))[0]
            inherited = w[b, a] / (PARTICLES * (0.5 * w[b, a] + 0.5 / PARTICLES))
            np.testing.assert_allclose(step.carry.log_weight[b, k], np.log(inherited) + score, rtol=1e-4, atol=1e-4)


# --- The linear recurrence -------------------------------------------------------------------------------------------


def test_the_linear_recurrence_is_a_complex_one():
    agent = made("lru")
    inputs = normals(1, 5, ENVS, 2 * agent.h_dim).astype(np.float32)
    carry, found = agent.initial(ENVS).carry, []
    for x in inputs:
        carry = agent.advance(carry, Inputs(jnp.asarray(x), None)).carry
        found.append(np.asarray(carry.re) + 1j * np.asarray(carry.im))
    rate = np.exp(-np.exp(np.asarray(agent.nu[...], float)) + 1j * np.exp(np.asarray(agent.theta[...], float)))
    assert np.all((np.abs(rate) > 0.399) & (np.abs(rate) < 0.991)) and np.all(np.angle(rate) > 0)
    u = np.sqrt(1 - np.abs(rate) ** 2) * (inputs[..., : agent.h_dim] + 1j * inputs[..., agent.h_dim :])
    for t in range(5):
        expected = sum(rate ** (t - s) * u[s] for s in range(t + 1))
        np.testing.assert_allclose(found[t], expected, rtol=1e-4, atol=1e-5)


# --- All of them -----------------------------------------------------------------------------------------------------

SHAPES = [
    (
        "cpu",
        "dpfrl",
        "32",
        {"model__summary": "attention", "model__resample_below": 0.5, "model__policy_batch_norm": True},
    ),
    ("gpu", "dvrl", "32", {"model__resampling": "soft", "model__summary": "mgf", "model__batch_norm": True}),
    (
        "cpu",
        "dvrl",
        "vector",
        {"model__resampling": "none", "model__num_particles": 1, "loss__lambda_discrepancy_coef": 0.1},
    ),
    ("gpu", "lru", "16", {"model__action_encoding": 0, "bptt_segments": 1}),
]


@pytest.mark.parametrize(("platform", "algorithm", "kind", "fields"), SHAPES)
def test_every_choice_can_be_traced_and_keeps_its_shapes(platform, algorithm, kind, fields):
    config = tiny_config(algorithm, **fields)
    config.model.channels = (4, 3) if kind == "vector" else (2, 3, 4)
    learner = make_learner(config, recording(kind, True), Choices.of(platform))
    before = jax.eval_shape(learner.init, jax.random.key(0))
    after = jax.eval_shape(learner.run, before, jnp.int32(3))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert [x.shape for x in jax.tree.leaves(before)] == [x.shape for x in jax.tree.leaves(after)]
    has_carry = isinstance(before.window.segments.carry, Carry)
    assert has_carry == (algorithm == "dpfrl" or (algorithm == "dvrl" and "model__resampling" in fields))
    assert ("particles.effective" in before.metrics.sums) == has_carry
