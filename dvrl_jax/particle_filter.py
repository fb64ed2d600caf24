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
    top = jnp.max(log_weights, axis=-1, keepdims=True)
    safe = jnp.where(jnp.isneginf(top), 0.0, log_weights)
    return jax.nn.softmax(safe, axis=-1)


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
    cumulative = jnp.cumsum(normalised_weights(jax.lax.stop_gradient(log_weights)), axis=-1)
    cumulative = cumulative / cumulative[:, -1:]  # The last entry is exactly 1 whatever the rounding.
    positions = (u[:, None] + jnp.arange(num_particles)) / num_particles
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


def elbo(log_weights: Array) -> Array:
    """One step's evidence lower bound, log 1/K sum_k w_k, from log_weights [B, K]; returns [B]."""
    return jax.nn.logsumexp(log_weights, axis=-1) - math.log(log_weights.shape[-1])


def effective_sample_size(weights: Array) -> Array:
    """1 / sum_k w_k^2 of normalised weights [..., K]: between 1 (one particle has it all) and K; returns [...]."""
    return 1.0 / jnp.sum(jnp.square(weights), axis=-1)


def weighted_mean(values: Array, log_weights: Array) -> Array:
    """Average of values [B, K, ...] over the particles under the normalised weights [B, K]; returns [B, ...]."""
    return jnp.einsum("bk,bk...->b...", normalised_weights(log_weights), values)
