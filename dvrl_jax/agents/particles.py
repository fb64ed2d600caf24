"""What beliefs of weighted particles share: resampling, weights that cross steps, summaries for actor and critic."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks, notes
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents.base import Agent
from dvrl_jax.errors import ConfigError

Array = jax.Array

ANCESTORS = {
    "systematic": pf.systematic_ancestors,
    "stratified": pf.stratified_ancestors,
    "multinomial": pf.multinomial_ancestors,
    "residual": pf.residual_ancestors,
}
SCHEMES = (*ANCESTORS, "soft", "none")  # What `model.resampling` can be.
ONE_DRAW = ("systematic", "soft", "none")  # Those that take one uniform number for all particles.

MOST_HEADS = 4  # Of the attention that summarises particles.


class Carry(NamedTuple):
    """Particles [B, K, H] and their log weights [B, K], not normalised: both cross steps."""

    h: Array
    log_weight: Array


# --- Resampling ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How particles are resampled.

    Attributes:
        scheme: one of `SCHEMES`; None if they are not, and each step's weights count for that step alone.
        below: share of the particles in effective sample size below which it is done; 1: always.
        alpha: for soft resampling, the share of the weights in what it is done by.
    """

    scheme: str | None
    below: float = 1.0
    alpha: float = 0.5

    @classmethod
    def of(cls, config) -> "Resampling":
        """What the `model` group of a configuration says."""
        return cls(config.resampling, config.resample_below, config.soft_alpha)

    @property
    def keeps_weights(self) -> bool:
        """Whether particles may have unequal weights after it."""
        return self.scheme in ("soft", "none") or (self.scheme is not None and self.below < 1.0)

    def draw(self, key: Array, steps: int, num_envs: int, num_particles: int) -> Array:
        """Uniform numbers for some steps: [steps, B], or [steps, B, K], as the scheme needs."""
        one = self.scheme is None or self.scheme in ONE_DRAW
        return jax.random.uniform(key, (steps, num_envs) if one else (steps, num_envs, num_particles))

    def sample(self, log_weights: Array, u: Array) -> tuple[Array | None, Array | None]:
        """Ancestors [B, K] by log_weights [B, K], and where resampling was done [B].

        The first is None if it never is, the second if it always is. No gradient passes.
        """
        if self.scheme in (None, "none"):
            return None, None
        if self.scheme == "soft":
            ancestors = pf.soft_ancestors(log_weights, u, self.alpha)
        else:
            ancestors = ANCESTORS[self.scheme](log_weights, u)
        if self.below >= 1.0:
            return ancestors, None
        num_particles = log_weights.shape[-1]
        done = pf.effective_sample_size(pf.normalised_weights(log_weights)) < self.below * num_particles
        return jnp.where(done[:, None], ancestors, jnp.arange(num_particles)), done

    def inherited(self, log_weights: Array, ancestors: Array | None, done: Array | None) -> Array:
        """Log weights [B, K] after it, of those before it [B, K] and of what `sample` returned.

        Normalised where it was not done, equal (1/K) where it was, and `soft_log_weights` where it was soft.
        """
        kept = pf.normalised_log_weights(log_weights)
        if ancestors is None:
            return kept
        if self.scheme == "soft":
            after = pf.soft_log_weights(log_weights, ancestors, self.alpha)
        else:
            after = jnp.full_like(kept, -math.log(kept.shape[-1]))
        return after if done is None else jnp.where(done[:, None], after, kept)


def check(config) -> None:
    """Raises ConfigError if a configuration's fields about particles have impossible values."""
    m = config.model
    for field, value, known in (("resampling", m.resampling, SCHEMES), ("summary", m.summary, SUMMARIES)):
        if value not in known:
            raise ConfigError(f"model.{field} = {value!r}: must be one of {', '.join(known)}")
    for field, value in (("resample_below", m.resample_below), ("soft_alpha", m.soft_alpha)):
        if not 0 <= value <= 1:
            raise ConfigError(f"model.{field} = {value}: must be between 0 and 1")


# --- Agents ----------------------------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """Randomness of updates: `u` [T, B] or [T, B, K] uniform, for resampling; `eps` [T, B, K, D] standard normal."""

    u: Array
    eps: Array


class Trace(NamedTuple):
    """What a step depends on: ancestors [B, K] int32 (None without resampling), eps [B, K, D], and where resampling was
    done [B] (None if everywhere or nowhere).
    """

    ancestors: Array | None
    eps: Array
    resampled: Array | None = None


class ParticleAgent(Agent):
    """An agent whose belief is K weighted particles with a `log_weight` [B, K].

    Attributes:
        num_particles: K. resampling: how they are resampled. noise_size: D, of each particle's noise in a step.
    """

    num_particles: int
    resampling: Resampling

    @property
    @abc.abstractmethod
    def noise_size(self) -> int: ...

    def draw(self, key: Array, steps: int, num_envs: int) -> Noise:
        """For each step u, uniform, to resample with, and eps [B, K, D], normal."""
        u_key, eps_key = jax.random.split(key)
        u = self.resampling.draw(u_key, steps, num_envs, self.num_particles)
        return Noise(u, jax.random.normal(eps_key, (steps, num_envs, self.num_particles, self.noise_size)))

    def sample_trace(self, belief: Any, noise: Noise) -> Trace:
        """Resamples: which particles go on, and the noise of each."""
        ancestors, resampled = self.resampling.sample(belief.log_weight, noise.u)
        return Trace(ancestors, noise.eps, resampled)

    @classmethod
    def rows_per_env(cls, config) -> int:
        return config.num_particles

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        check(config)


# --- Summaries -------------------------------------------------------------------------------------------------------
#
# Layers whose `of(particles, log_weights)` makes one vector [..., S] of particles, arrays [..., K, D] by name, and
# log_weights [..., K], not necessarily normalised.


class LinearSummary(networks.Linear):
    """Of one particle: a linear map of it and its weight (1)."""

    def __init__(self, sizes: Mapping[str, int], features: int, *, rngs: nnx.Rngs):
        super().__init__({**sizes, "weight": 1}, features, rngs=rngs)

    def of(self, particles: Mapping[str, Array], log_weights: Array) -> Array:
        return self(**particles, weight=pf.normalised_weights(log_weights)[..., None])[..., 0, :]


class GRUSummary(networks.GRUCell):
    """A GRU reads particles and weights in order; its last state (Igl et al., 2018)."""

    def __init__(self, sizes: Mapping[str, int], features: int, *, rngs: nnx.Rngs):
        super().__init__({**sizes, "weight": 1}, features, uniform=True, rngs=rngs)

    def of(self, particles: Mapping[str, Array], log_weights: Array) -> Array:
        gates = self.product(**particles, weight=pf.normalised_weights(log_weights)[..., None])
        state = jnp.zeros_like(gates[..., 0, : gates.shape[-1] // 3])

        def read(state, gates):
            return self(state, gates), None

        return notes.scan("summary", read, state, jnp.moveaxis(gates, -2, 0))[0]


def _bounded(particles: Mapping[str, Array]) -> Array:
    """[h, tanh(phi_z)] of particles, [..., K, D].

    A summary that grows with phi_z lets actions, which the belief reads, and the belief drive each other to infinity.
    """
    return jnp.concatenate([x if name == "h" else jnp.tanh(x) for name, x in particles.items()], axis=-1)


class MeanSummary(networks.Layer):
    """The weighted mean of [h, tanh(phi_z)]; nothing is learned."""

    def __init__(self, sizes: Mapping[str, int], features: int, *, rngs: nnx.Rngs):
        del sizes, features, rngs

    def of(self, particles: Mapping[str, Array], log_weights: Array) -> Array:
        every = _bounded(particles)
        return jnp.einsum("...k,...kd->...d", pf.normalised_weights(log_weights), every)


class MGFSummary(MeanSummary):
    """The weighted mean and as many moment-generating features of h as `features`, with learned directions v."""

    def __init__(self, sizes: Mapping[str, int], features: int, *, rngs: nnx.Rngs):
        self.directions = nnx.Param(networks.orthogonal(rngs.params(), sizes["h"], features, 1.0))

    def of(self, particles: Mapping[str, Array], log_weights: Array) -> Array:
        exponents = notes.note(networks.matmul(particles["h"], self.directions[...]), self.named("exponents"))
        moments = pf.moment_generating_features(exponents, log_weights)
        return jnp.concatenate([super().of(particles, log_weights), moments], axis=-1)


class AttentionSummary(networks.Layer):
    """Learned queries attend to the particles, whose weights are a prior (pooling as in Lee et al., ICML 2019).

    a_k = softmax_k(q . K x_k / sqrt(d) + log w_k)      sum_k a_k V x_k, for each head
    """

    def __init__(self, sizes: Mapping[str, int], features: int, *, rngs: nnx.Rngs):
        heads = math.gcd(MOST_HEADS, features)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (heads, features // heads)))
        # Without a bias, which would cancel in the softmax.
        self.keys = nnx.Param(networks.orthogonal(rngs.params(), sum(sizes.values()), features, 1.0))
        self.values = networks.Linear({"x": sum(sizes.values())}, features, gain=1.0, rngs=rngs)

    def of(self, particles: Mapping[str, Array], log_weights: Array) -> Array:
        queries, every = self.queries[...], _bounded(particles)
        by_head = lambda x: x.reshape(*x.shape[:-1], *queries.shape)
        keys = by_head(notes.note(networks.matmul(every, self.keys[...]), self.named("keys")))
        values = by_head(notes.note(self.values(x=every), self.named("values")))
        scores = jnp.einsum("...khd,hd->...kh", keys, queries) / math.sqrt(queries.shape[-1])
        attention = jax.nn.softmax(scores + pf.normalised_log_weights(log_weights)[..., None], axis=-2)
        read = jnp.einsum("...kh,...khd->...hd", attention, values)
        return read.reshape(*read.shape[:-2], -1)


SUMMARIES = {"gru": GRUSummary, "mean": MeanSummary, "mgf": MGFSummary, "attention": AttentionSummary}


def make_summary(config, sizes: Mapping[str, int], *, rngs: nnx.Rngs):
    """The layer that `model.summary` names, for particles of these sizes; for a single one the linear map."""
    kind = LinearSummary if config.num_particles == 1 else SUMMARIES[config.summary]
    return kind(sizes, config.h_dim, rngs=rngs)


def summary_size(config, sizes: Mapping[str, int]) -> int:
    """Size of what that layer returns."""
    extra = {"mean": 0, "mgf": config.h_dim}.get(config.summary)
    return config.h_dim if config.num_particles == 1 or extra is None else sum(sizes.values()) + extra
