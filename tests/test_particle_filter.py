"""The particle filter's equations against independent NumPy and SciPy versions, and what resampling promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dvrl_jax import particle_filter as pf

LARGEST_U = np.nextafter(np.float32(1), np.float32(0))  # The largest float32 below 1.
NUM_DRAWS = 20_000

systematic_ancestors = jax.jit(pf.systematic_ancestors)


def softmax(log_weights):
    """Normalised weights in float64."""
    log_weights = np.asarray(log_weights, np.float64)
    weights = np.exp(log_weights - np.max(log_weights, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def uniforms(seed, size):
    return np.random.default_rng(seed).random(size, np.float32)


def ancestors_of(log_weights, u):
    """Ancestors [N, K] of the same log weights [K] under many draws u [N]."""
    log_weights = np.broadcast_to(np.asarray(log_weights, np.float32), (len(u), len(log_weights)))
    return np.asarray(systematic_ancestors(log_weights, np.asarray(u, np.float32)))


def copies_of(ancestors):
    """How many copies [N, K] each particle got."""
    return np.sum(ancestors[:, :, None] == np.arange(ancestors.shape[1]), axis=1)


def random_log_weights(seed, num_particles):
    """Log weights with a large common offset, as the emission of an image has."""
    return (np.random.default_rng(seed).normal(-500.0, 1.5, num_particles)).astype(np.float32)


# --- Systematic resampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [2, 5, 10, 15, 30])
def test_mean_number_of_copies_is_number_of_particles_times_weight(num_particles):
    log_weights = random_log_weights(num_particles, num_particles)
    expected = num_particles * softmax(log_weights)
    copies = copies_of(ancestors_of(log_weights, uniforms(1, NUM_DRAWS)))
    # The copies of particle k are floor(K w_k) plus a coin that shows 1 with the probability of the rest.
    rest = expected - np.floor(expected)
    standard_error = np.sqrt(rest * (1 - rest) / NUM_DRAWS)
    np.testing.assert_array_less(np.abs(copies.mean(axis=0) - expected), 5 * standard_error + 1e-6)


@pytest.mark.parametrize("num_particles", [2, 5, 10, 15, 30])
def test_number_of_copies_differs_from_its_mean_by_less_than_one(num_particles):
    log_weights = random_log_weights(100 + num_particles, num_particles)
    expected = num_particles * softmax(log_weights)
    u = np.concatenate([uniforms(2, NUM_DRAWS), [0.0, LARGEST_U]])
    copies = copies_of(ancestors_of(log_weights, u))
    assert np.all(copies.sum(axis=1) == num_particles)
    assert np.max(np.abs(copies - expected)) < 1


def test_ancestors_equal_a_search_in_the_cumulative_weights():
    rng = np.random.default_rng(3)
    log_weights = rng.normal(0, 2, (500, 12)).astype(np.float32)
    u = uniforms(4, 500)
    cumulative = np.cumsum(softmax(log_weights), axis=-1)
    positions = (u[:, None].astype(np.float64) + np.arange(12)) / 12
    expected = np.stack([np.searchsorted(c, p, side="right") for c, p in zip(cumulative, positions, strict=True)])
    actual = np.asarray(systematic_ancestors(log_weights, u))
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, expected)


def test_environments_are_resampled_each_by_their_own_weights_and_draw():
    log_weights = np.log(np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-30, 1e-30], [0.1, 0.1, 0.1, 0.7]]))
    ancestors = systematic_ancestors(log_weights.astype(np.float32), np.array([0.5, 0.1, 0.9], np.float32))
    np.testing.assert_array_equal(ancestors, [[0, 1, 2, 3], [0, 0, 1, 1], [2, 3, 3, 3]])


@pytest.mark.parametrize("place", [0, 3, 6])
def test_particle_with_all_the_weight_gets_all_copies(place):
    log_weights = np.full(7, -300.0, np.float32)
    log_weights[place] = 0.0
    u = np.concatenate([uniforms(5, 1000), [0.0, 0.999]])
    np.testing.assert_array_equal(ancestors_of(log_weights, u), np.full((1002, 7), place))


def test_particles_of_weight_zero_are_never_ancestors():
    rng = np.random.default_rng(6)
    log_weights = rng.normal(0, 1, (NUM_DRAWS, 9)).astype(np.float32)
    dead = rng.random(log_weights.shape) < 0.5
    dead[np.all(dead, axis=1), 4] = False
    assert np.any(dead[:, 0]) and np.any(dead[:, -1])
    log_weights[dead] = -np.inf
    u = uniforms(7, NUM_DRAWS)
    u[:1000] = 0.0
    ancestors = np.asarray(systematic_ancestors(log_weights, u))
    assert not np.any(np.take_along_axis(dead, ancestors, axis=1))


@pytest.mark.parametrize("num_particles", [2, 7, 15, 30])
def test_last_particle_of_weight_zero_is_no_ancestor_at_the_largest_u(num_particles):
    log_weights = np.zeros(num_particles, np.float32)
    log_weights[-1] = -np.inf
    assert np.max(ancestors_of(log_weights, [LARGEST_U])) <= num_particles - 2


def test_weights_that_are_all_zero_count_as_uniform():
    log_weights = np.full((3, 8), -np.inf, np.float32)
    np.testing.assert_array_equal(pf.normalised_weights(log_weights), np.full((3, 8), 0.125))
    ancestors = systematic_ancestors(log_weights, np.array([0.01, 0.5, 0.99], np.float32))
    np.testing.assert_array_equal(ancestors, np.broadcast_to(np.arange(8), (3, 8)))


def test_a_single_particle_is_its_own_ancestor():
    u = np.array([0.0, 0.3, LARGEST_U], np.float32)
    for log_weight in (0.0, -1e30, 1e30, -np.inf):
        np.testing.assert_array_equal(ancestors_of([log_weight], u), np.zeros((3, 1)))


@pytest.mark.parametrize("num_particles", [1, 2, 3, 4, 5, 7, 8, 10, 15, 16, 30, 31, 64, 100, 257])
def test_ancestors_stay_in_range_at_the_largest_u(num_particles):
    for seed in range(5):
        log_weights = random_log_weights(seed, num_particles)
        ancestors = ancestors_of(log_weights, [LARGEST_U])
        assert np.min(ancestors) >= 0 and np.max(ancestors) <= num_particles - 1
        particles = np.random.default_rng(seed).normal(size=(1, num_particles, 3)).astype(np.float32)
        resampled = np.asarray(pf.resample(jnp.asarray(particles), jnp.asarray(ancestors)))
        np.testing.assert_array_equal(resampled, particles[:, ancestors[0]])


def test_a_last_particle_of_small_weight_is_found_close_to_one():
    """The bound on positions is no looser than rounding: 0.9997 lies in the last 0.0005 of the weights."""
    log_weights = jnp.log(jnp.array([[0.9995, 0.0005]]))
    np.testing.assert_array_equal(pf.systematic_ancestors(log_weights, jnp.array([0.9994])), [[0, 1]])


def test_without_the_bound_the_largest_u_would_give_an_ancestor_out_of_range():
    """Why the index must be bounded: float32 rounds the last position up to 1, past every cumulative weight."""
    out_of_range = []
    for num_particles in (2, 7, 10, 15, 30):
        positions = (LARGEST_U + np.arange(num_particles, dtype=np.float32)) / np.float32(num_particles)
        cumulative = np.cumsum(softmax(np.zeros(num_particles)).astype(np.float32), dtype=np.float32)
        cumulative /= cumulative[-1]
        out_of_range.append(np.searchsorted(cumulative, positions[-1], side="right") == num_particles)
    assert any(out_of_range)


def test_no_gradient_reaches_the_weights_through_the_ancestors():
    log_weights = jnp.array([[0.3, -1.0, 0.2], [0.0, -jnp.inf, -2.0], [-jnp.inf] * 3], jnp.float32)
    u = jnp.array([0.2, 0.7, 0.4])
    particles = jax.random.normal(jax.random.key(0), (3, 3, 4))

    def total(particles, log_weights, u):
        return jnp.sum(jnp.square(pf.resample(particles, pf.systematic_ancestors(log_weights, u))))

    to_particles, to_weights, to_u = jax.grad(total, argnums=(0, 1, 2))(particles, log_weights, u)
    np.testing.assert_array_equal(to_weights, np.zeros((3, 3)))
    np.testing.assert_array_equal(to_u, np.zeros(3))
    # Particles get it as many times as they were copied.
    copies = copies_of(np.asarray(pf.systematic_ancestors(log_weights, u)))
    np.testing.assert_allclose(to_particles, 2 * np.asarray(particles) * copies[:, :, None], rtol=1e-6)


def test_resample_copies_whole_particles_within_their_environment():
    particles = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    ancestors = np.array([[0, 0, 3, 3], [1, 2, 2, 3]], np.int32)
    expected = np.stack([particles[0][[0, 0, 3, 3]], particles[1][[1, 2, 2, 3]]])
    np.testing.assert_array_equal(pf.resample(jnp.asarray(particles), jnp.asarray(ancestors)), expected)


def test_killed_particles_counts_those_without_a_child():
    ancestors = np.random.default_rng(8).integers(0, 10, (200, 10)).astype(np.int32)
    ancestors[0], ancestors[1] = 3, np.arange(10)
    expected = [10 - len(np.unique(row)) for row in ancestors]
    assert expected[:2] == [9, 0]
    np.testing.assert_array_equal(pf.killed_particles(jnp.asarray(ancestors)), expected)


# --- Other schemes ---------------------------------------------------------------------------------------------------

PER_PARTICLE = {
    "stratified": pf.stratified_ancestors,
    "multinomial": pf.multinomial_ancestors,
    "residual": pf.residual_ancestors,
}


@pytest.mark.parametrize("scheme", PER_PARTICLE)
def test_other_schemes_copy_particles_as_often_as_their_weights_say(scheme):
    size, num_particles = NUM_DRAWS, 6
    log_weights = random_log_weights(20, num_particles)
    expected = num_particles * softmax(log_weights)
    u = np.random.default_rng(21).random((size, num_particles), np.float32)
    ancestors = jax.jit(PER_PARTICLE[scheme])(np.broadcast_to(log_weights, u.shape), u)
    assert ancestors.dtype == np.int32 and np.min(ancestors) >= 0 and np.max(ancestors) < num_particles
    copies = copies_of(np.asarray(ancestors))
    standard_error = np.std(copies, axis=0) / np.sqrt(size)
    np.testing.assert_array_less(np.abs(copies.mean(axis=0) - expected), 5 * standard_error + 1e-6)
    # What tells them apart: the variance of the copies, from that of independent draws down.
    independent = expected * (1 - expected / num_particles)
    ratio = np.sum(np.var(copies, axis=0)) / np.sum(independent)
    assert 0.97 < ratio < 1.03 if scheme == "multinomial" else ratio < 0.7
    if scheme == "residual":
        assert np.all(copies >= np.floor(expected))


@pytest.mark.parametrize("scheme", PER_PARTICLE)
@pytest.mark.parametrize("log_weights", [[-np.inf] * 4, [0.0] * 4, [-np.inf, 0.0, -np.inf, -np.inf]])
def test_other_schemes_stay_in_range_at_the_ends(scheme, log_weights):
    for u in (0.0, LARGEST_U):
        found = PER_PARTICLE[scheme](jnp.array([log_weights]), jnp.full((1, 4), u))
        assert np.min(found) >= 0 and np.max(found) <= 3
        if np.isneginf(log_weights[0]) and log_weights[1] == 0.0:
            np.testing.assert_array_equal(found, [[1] * 4])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_soft_resampling_leaves_weighted_means_as_they_are_on_average(alpha):
    log_weights = np.log(np.array([0.62, 0.2, 0.1, 0.05, 0.03])).astype(np.float32) - 400
    values, weights = np.array([1.0, -2.0, 3.0, 10.0, -7.0]), softmax(log_weights)
    every = np.broadcast_to(log_weights, (NUM_DRAWS, 5))
    ancestors = np.asarray(pf.soft_ancestors(every, uniforms(22, NUM_DRAWS), alpha))
    proposal = alpha * weights + (1 - alpha) / 5
    np.testing.assert_allclose(copies_of(ancestors).mean(axis=0), 5 * proposal, atol=0.02)
    corrected = np.exp(np.asarray(pf.soft_log_weights(every, ancestors, alpha), np.float64))
    np.testing.assert_allclose(corrected, (weights / (5 * proposal))[ancestors], rtol=1e-4)
    estimates = np.sum(corrected * values[ancestors], axis=1)
    error = np.std(estimates) / np.sqrt(NUM_DRAWS)
    assert abs(estimates.mean() - np.sum(weights * values)) < 5 * error + 1e-4


def test_soft_resamplings_gradient_passes_through_the_weights():
    """Of log w_a - log(alpha K w_a + 1 - alpha), by finite differences; hard resampling's weights have none."""
    log_weights, ancestors = np.array([[0.3, -1.0, 0.2]], np.float64), np.array([[0, 0, 2]])
    with jax.enable_x64(True):
        total = lambda x, alpha: jnp.sum(jnp.arange(1.0, 4.0) * pf.soft_log_weights(x, ancestors, alpha))
        gradient = jax.grad(total)(jnp.asarray(log_weights), 0.5)
        nudges = 1e-6 * np.eye(3)
        slopes = [float(total(log_weights + n, 0.5) - total(log_weights - n, 0.5)) / 2e-6 for n in nudges]
        np.testing.assert_allclose(gradient[0], slopes, rtol=1e-6)
        assert np.min(np.abs(gradient)) > 0.01
        np.testing.assert_allclose(jax.grad(total)(jnp.asarray(log_weights), 1.0), np.zeros((1, 3)), atol=1e-12)
        dead = jax.grad(total)(jnp.array([[0.3, -np.inf, 0.2]]), 0.5)
        assert np.all(np.isfinite(dead))


# --- Densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1e-6, 1e-2, 1.0, 1e2, 1e6])
def test_normal_log_prob_equals_scipy(variance):
    rng = np.random.default_rng(9)
    mean = rng.normal(0, 3, (50, 20)).astype(np.float32)
    var = (variance * rng.uniform(0.5, 2.0, (50, 20))).astype(np.float32)
    distance = rng.uniform(-6, 6, (50, 20))  # In standard deviations.
    x = (mean + distance * np.sqrt(var)).astype(np.float32)
    terms = scipy.stats.norm.logpdf(*(y.astype(np.float64) for y in (x, mean)), np.sqrt(var.astype(np.float64)))
    actual = np.asarray(pf.normal_log_prob(x, mean, var), np.float64)
    assert actual.shape == (50,)
    tolerance = 1e-6 * np.sum(np.abs(terms) + 0.5 * np.abs(np.log(var)), axis=-1)
    np.testing.assert_array_less(np.abs(actual - terms.sum(axis=-1)), tolerance)


def test_normal_log_prob_takes_the_variance_not_the_standard_deviation():
    # By hand: -(6/2)^2 / 2 - log 2 - log(2 pi)/2, with standard deviation 2.
    expected = -4.5 - np.log(2) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(pf.normal_log_prob(jnp.array([7.0]), jnp.array([1.0]), jnp.array([4.0])), expected, 1e-6)


def test_sample_normal_takes_the_variance_not_the_standard_deviation():
    z = pf.sample_normal(jnp.array([1.0, -2.0]), jnp.array([4.0, 9.0]), jnp.array([0.5, -1.0]))
    np.testing.assert_allclose(z, [2.0, -5.0], rtol=1e-6)


def bernoulli_terms(x, logits):
    """x log s(l) + (1 - x) log(1 - s(l)) per pixel, in float64, with logs that do not underflow."""
    x, logits = np.asarray(x, np.float64), np.asarray(logits, np.float64)
    return -x * np.logaddexp(0, -logits) - (1 - x) * np.logaddexp(0, logits)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
def test_bernoulli_log_prob_of_grey_values(scale):
    rng = np.random.default_rng(10)
    logits = (scale * rng.uniform(-1, 1, (6, 4, 8, 8, 2))).astype(np.float32)
    x = (rng.integers(0, 256, (6, 1, 8, 8, 2)) / 255).astype(np.float32)
    terms = bernoulli_terms(x, logits)
    actual = np.asarray(pf.bernoulli_log_prob(x, logits), np.float64)
    assert actual.shape == (6, 4)
    tolerance = 1e-6 * np.sum(np.abs(terms) + np.abs(logits), axis=(2, 3, 4))
    np.testing.assert_array_less(np.abs(actual - terms.sum(axis=(2, 3, 4))), tolerance)


@pytest.mark.parametrize("logit", [-100.0, 100.0])
@pytest.mark.parametrize("grey", [0.0, 0.25, 1.0])
def test_bernoulli_log_prob_and_its_gradient_at_extreme_logits(logit, grey):
    x = jnp.full((1, 1, 1), grey)
    value, gradient = jax.value_and_grad(pf.bernoulli_log_prob, argnums=1)(x, jnp.full((1, 1, 1), logit))
    # Certain and wrong costs 100 per unit of grey value, certain and right nothing.
    expected = -100.0 * (1 - grey if logit > 0 else grey)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient.item(), grey - (logit > 0), atol=1e-6)


def test_bernoulli_log_prob_counts_only_masked_pixels():
    rng = np.random.default_rng(11)
    logits, x = rng.normal(size=(5, 4, 4, 1)), rng.random((5, 4, 4, 1))
    mask = np.zeros((1, 4, 4, 1))
    mask[:, 1:3, 1:] = 1
    expected = np.sum(bernoulli_terms(x, logits)[:, 1:3, 1:], axis=(1, 2, 3))
    np.testing.assert_allclose(pf.bernoulli_log_prob(x, logits, mask), expected, rtol=1e-5)


# --- Weights ---------------------------------------------------------------------------------------------------------


def test_log_weight_is_prior_over_proposal_times_emission():
    np.testing.assert_array_equal(pf.log_weight(jnp.array(1.0), jnp.array(2.0), jnp.array(5.0)), 4.0)


@pytest.mark.parametrize("offset", [0.0, -3000.0, 3000.0])
def test_elbo_is_the_log_of_the_mean_weight(offset):
    # Mean weights: (1 + 2 + 3 + 6) / 4 = 3 and (4 + 0 + 0 + 0) / 4 = 1.
    log_weights = np.array([np.log([1, 2, 3, 6]), [np.log(4), *[-np.inf] * 3]], np.float32) + np.float32(offset)
    np.testing.assert_allclose(pf.elbo(log_weights), offset + np.log([3, 1]), rtol=1e-6, atol=1e-6)


def test_elbo_of_inherited_weights_is_the_log_of_their_weighted_mean():
    log_weights, inherited = np.log([[1.0, 2.0, 5.0]]), np.log([[0.5, 0.25, 0.25]])
    np.testing.assert_allclose(pf.elbo(log_weights, inherited), np.log([2.25]), rtol=1e-6)
    equal = np.full((1, 3), -np.log(3))
    np.testing.assert_allclose(pf.elbo(log_weights, equal), pf.elbo(log_weights), rtol=1e-6)


def test_moment_generating_features_are_those_of_the_weighted_sum():
    rng = np.random.default_rng(23)
    exponents, log_weights = rng.normal(size=(2, 3, 4, 5)), rng.normal(-500, 2, size=(2, 3, 4))
    expected = np.zeros((2, 3, 5))
    for k in range(4):
        expected += softmax(log_weights)[..., k, None] * np.exp(exponents[..., k, :])
    actual = pf.moment_generating_features(exponents.astype(np.float32), log_weights.astype(np.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


def test_elbo_of_one_particle_is_its_log_weight():
    np.testing.assert_allclose(pf.elbo(jnp.array([[-7.5], [2.0]])), [-7.5, 2.0], rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, -3000.0, 3000.0])
def test_normalised_weights_of_unnormalised_logs(offset):
    log_weights = np.array([*np.log([1, 2, 5]), -np.inf], np.float32) + np.float32(offset)
    tolerance = 1e-6 if offset == 0 else 5e-4  # Logs near 3000 are stored to 2.4e-4.
    np.testing.assert_allclose(pf.normalised_weights(log_weights), [0.125, 0.25, 0.625, 0], rtol=tolerance)


def test_effective_sample_size():
    log_weights = np.array([np.log([2, 1, 1]), [0.7] * 3, [0.0, -np.inf, -np.inf]], np.float32)
    # 1 / (1/4 + 1/16 + 1/16) = 8/3; all equal: K; all in one: 1.
    sizes = pf.effective_sample_size(pf.normalised_weights(log_weights))
    np.testing.assert_allclose(sizes, [8 / 3, 3, 1], rtol=1e-6)


def test_weighted_mean_uses_each_environments_own_weights():
    log_weights = np.array([np.log([1, 3]), [-np.inf, 5.0]], np.float32)
    values = np.array([[[4.0, 0.0], [8.0, -4.0]], [[100.0, 100.0], [1.0, 2.0]]], np.float32)
    np.testing.assert_allclose(pf.weighted_mean(values, log_weights), [[7.0, -3.0], [1.0, 2.0]], rtol=1e-6)
    scalars = pf.weighted_mean(values[..., 0], log_weights)
    np.testing.assert_allclose(scalars, [7.0, 1.0], rtol=1e-6)


def test_categorical_log_prob_of_a_blank_is_0():
    logits = np.log([[1.0, 2.0, 5.0]]).astype(np.float32) + 3
    one_hot = np.array([[0, 0, 1], [1, 0, 0], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(pf.categorical_log_prob(one_hot, logits), [np.log(5 / 8), np.log(1 / 8), 0], atol=1e-6)
