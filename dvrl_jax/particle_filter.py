"""The mathematics of the particle belief, one function per equation and nothing else.

Equations refer to Igl et al., *Deep Variational Reinforcement Learning for POMDPs*, ICML 2018. Shapes: `B`
environments, `K` particles, `D` dimensions. Weights are always kept as logarithms. The functions are pure; the draws
they need are arguments, which makes replay and tests exact.
"""

import math

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def normalised_weights(log_weights: Array) -> Array:
    """Softmax of log_weights [..., K] over the particles; uniform where every weight is zero (all are -inf).

    Returns: weights [..., K], non-negative, summing to 1.
    """
    safe = _not_all_zero(log_weights)
    return jax.nn.softmax(safe, axis=-1)


def normalised_log_weights(log_weights: Array) -> Array:
    """The logarithms of `normalised_weights`, [..., K]."""
    return jax.nn.log_softmax(_not_all_zero(log_weights), axis=-1)


def _not_all_zero(log_weights: Array) -> Array:
    """log_weights [..., K], and 0 where all K are -inf."""
    top = jnp.max(log_weights, axis=-1, keepdims=True)
    return jnp.where(jnp.isneginf(top), 0.0, log_weights)


# --- Resampling ------------------------------------------------------------------------------------------------------
#
# The functions called `..._ancestors` take log_weights [B, K], not necessarily normalised, and uniform numbers in
# [0, 1), and return ancestors [B, K], int32, in 0..K-1. Particle k gets K w_k copies on average. No gradient passes.


def systematic_ancestors(log_weights: Array, u: Array) -> Array:
    """Systematic resampling: one draw per environment decides about all particles.

    Positions (u + k)/K, k = 0..K-1, are looked up in the cumulative normalised weights, so particle k gets
    floor(K w_k) or ceil(K w_k) copies, K w_k on average (Kitagawa, 1996).

    Args:
        log_weights: [B, K], need not be normalised.
        u: [B], uniform in [0, 1).
    Returns:
        ancestors [B, K], int32, in 0..K-1 and non-decreasing. No gradient passes.
    """
    chex.assert_rank([log_weights, u], [2, 1])
    num_particles = log_weights.shape[-1]
    return _owners(log_weights, (u[:, None] + jnp.arange(num_particles)) / num_particles)


def stratified_ancestors(log_weights: Array, u: Array) -> Array:
    """Stratified resampling: position (u_k + k)/K has a draw u [B, K] of its own for each k (Kitagawa, 1996)."""
    chex.assert_equal_shape([log_weights, u])
    num_particles = log_weights.shape[-1]
    return _owners(log_weights, (u + jnp.arange(num_particles)) / num_particles)


def multinomial_ancestors(log_weights: Array, u: Array) -> Array:
    """Multinomial resampling: K independent draws u [B, K] (Gordon, Salmond & Smith, 1993)."""
    chex.assert_equal_shape([log_weights, u])
    return _owners(log_weights, u)


def residual_ancestors(log_weights: Array, u: Array) -> Array:
    """Residual resampling: floor(K w_k) copies of particle k for certain (Liu & Chen, 1998).

    The rest are independent draws, of u [B, K], by the weights K w_k - floor(K w_k) that are left.
    """
    chex.assert_equal_shape([log_weights, u])
    num_particles = log_weights.shape[-1]
    expected = jax.lax.stop_gradient(num_particles * normalised_weights(log_weights))
    certain = jnp.floor(expected)
    ends = jnp.cumsum(certain, axis=-1)
    slots = jnp.arange(num_particles)
    owners = jnp.sum(ends[:, None, :] <= slots[:, None], axis=-1, dtype=jnp.int32)
    return jnp.where(slots < ends[:, -1:], owners, _owners(jnp.log(expected - certain), u))


def soft_ancestors(log_weights: Array, u: Array, alpha: float) -> Array:
    """Soft resampling: systematic, with u [B], by q = alpha w + (1 - alpha)/K (Karkus, Hsu & Lee, 2018).

    Particle k gets K q_k copies on average, whose weights are then `soft_log_weights`.
    """
    proposal = alpha * normalised_weights(log_weights) + (1.0 - alpha) / log_weights.shape[-1]
    return systematic_ancestors(jnp.log(proposal), u)


def soft_log_weights(log_weights: Array, ancestors: Array, alpha: float) -> Array:
    """Log weights [B, K] after soft resampling, w_a / (K q_a) of ancestor a; the gradient passes to log_weights [B, K].

    Their sum is 1 on average, and so sum_k w_a f(x_a) / (K q_a) is sum_k w_k f(x_k) on average.
    """
    num_particles = log_weights.shape[-1]
    chosen = jnp.take_along_axis(normalised_log_weights(log_weights), ancestors, axis=-1)
    return chosen - jnp.log(num_particles * alpha * jnp.exp(chosen) + (1.0 - alpha))


def _owners(log_weights: Array, positions: Array) -> Array:
    """The particles [B, K] that own positions [B, K] in [0, 1] of the cumulative normalised weights, int32."""
    cumulative = jnp.cumsum(normalised_weights(jax.lax.stop_gradient(log_weights)), axis=-1)
    cumulative = cumulative / cumulative[:, -1:]  # The last entry is exactly 1 whatever the rounding.
    # (u + K - 1)/K can round up to 1.0, where the look-up would end past the last particle of any weight.
    positions = jnp.minimum(positions, 1.0 - jnp.finfo(positions.dtype).epsneg)
    # The number of entries at or below a position is the index of the particle that owns it.
    return jnp.sum(cumulative[:, None, :] <= positions[:, :, None], axis=-1, dtype=jnp.int32)


def resample(particles: Array, ancestors: Array) -> Array:
    """Copies particles [B, K, D] of the given ancestors [B, K]: returns particles[b, ancestors[b, k]]."""
    chex.assert_rank([particles, ancestors], [3, 2])
    return jnp.take_along_axis(particles, ancestors[:, :, None], axis=1, mode="promise_in_bounds")


def killed_particles(ancestors: Array) -> Array:
    """Number of particles [B] (float) that got no child among ancestors [B, K]."""
    num_particles = ancestors.shape[-1]
    has_child = jnp.any(ancestors[:, :, None] == jnp.arange(num_particles), axis=1)
    return num_particles - jnp.sum(has_child, axis=-1, dtype=jnp.float32)


def sample_normal(mean: Array, var: Array, noise: Array) -> Array:
    """Reparameterised draw z = mean + sqrt(var) * noise, all [..., D], noise standard normal."""
    return mean + jnp.sqrt(var) * noise


def normal_log_prob(x: Array, mean: Array, var: Array) -> Array:
    """Log density [...] of a diagonal normal at x [..., D], summed over the last axis; `var` is the variance."""
    quadratic = jnp.sum(jnp.square(x - mean) / var + jnp.log(var), axis=-1)
    return -0.5 * (quadratic + x.shape[-1] * math.log(2.0 * math.pi))


@jax.custom_jvp
def softplus(x: Array) -> Array:
    """log(1 + e^x), with an absolute error of one rounding: exact enough for sums, and cheap."""
    return jnp.maximum(x, 0.0) + jnp.log(1.0 + jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    return softplus(*primals), jax.nn.sigmoid(*primals) * tangents[0]


@jax.checkpoint  # The gradient needs x - s(l), which is cheaper to compute from the logits than to keep.
def bernoulli_log_prob(x: Array, logits: Array, mask: Array | None = None) -> Array:
    """Log probability [...] of grey values x in [0, 1] under independent Bernoulli pixels, summed over 3 axes.

    sum_i x_i log s(l_i) + (1 - x_i) log(1 - s(l_i)) = sum_i x_i l_i - softplus(l_i), with s the logistic function.

    Args:
        x: [..., h, w, c]. logits: [..., h, w, c]; both broadcast. mask: which pixels count, all if None.
    """
    per_pixel = x * logits - softplus(logits)
    if mask is not None:
        per_pixel = per_pixel * mask
    return jnp.sum(per_pixel, axis=(-3, -2, -1))


def categorical_log_prob(x: Array, logits: Array) -> Array:
    """Log probability [...] of one-hot vectors x [..., D] under logits [..., D]; 0 for a blank one, all zeros."""
    return jnp.sum(x * jax.nn.log_softmax(logits), axis=-1)


def log_weight(prior_log_prob: Array, proposal_log_prob: Array, emission_log_prob: Array) -> Array:
    """Importance weight of a particle, log w = log p(z) + log p(o) - log q(z), each [B, K]."""
    return prior_log_prob - proposal_log_prob + emission_log_prob


def elbo(log_weights: Array, inherited: Array | None = None) -> Array:
    """One step's evidence lower bound, log sum_k v_k w_k, from log_weights [B, K]; returns [B].

    The particles' logarithmic weights log v_k before the step are `inherited` [B, K]; without them v_k = 1/K.
    """
    if inherited is not None:
        return jax.nn.logsumexp(inherited + log_weights, axis=-1)
    return jax.nn.logsumexp(log_weights, axis=-1) - math.log(log_weights.shape[-1])


def effective_sample_size(weights: Array) -> Array:
    """1 / sum_k w_k^2 of normalised weights [..., K]: between 1 (one particle has it all) and K; returns [...]."""
    return 1.0 / jnp.sum(jnp.square(weights), axis=-1)


def weighted_mean(values: Array, log_weights: Array) -> Array:
    """Average of values [B, K, ...] over the particles under the normalised weights [B, K]; returns [B, ...]."""
    return jnp.einsum("bk,bk...->b...", normalised_weights(log_weights), values)


def moment_generating_features(exponents: Array, log_weights: Array) -> Array:
    """M_j = sum_k w_k exp(v_j . h_k) (Ma et al., ICLR 2020), from exponents v_j . h_k [..., K, M]; returns [..., M]."""
    return jnp.einsum("...k,...km->...m", normalised_weights(log_weights), jnp.exp(exponents))
