"""Discriminative Particle Filter Reinforcement Learning: particles that are weighed by how well they suit what is seen.

Ma, Karkus, Hsu, Lee, Ye, *Discriminative Particle Filter Reinforcement Learning for Complex Partial Observations*, ICLR
2020. Nothing is generated: the reinforcement learning loss alone trains the belief, through particles and weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks, notes
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents import particles
from dvrl_jax.agents.base import Inputs, Timestep, UpdateInfo
from dvrl_jax.agents.particles import Carry, ParticleAgent, Resampling, Trace

Array = jax.Array


class Belief(NamedTuple):
    """K weighted particles: states h [B, K, H] and log weights [B, K], not normalised."""

    h: Array
    log_weight: Array

    @property
    def carry(self) -> Carry:
        return Carry(self.h, self.log_weight)


class Drive(NamedTuple):
    """What observation and action add to the gates [B, 3H], the noise's deviation and the score's hidden layer [B, H].

    The score is of the observation alone.
    """

    gru: Array
    deviation: Array
    score: Any


class Step(NamedTuple):
    """The particles after a step."""

    carry: Carry


class DPFRL(ParticleAgent):
    """h = PF-GRU([phi_o, phi_a], h_prev) with learned noise; log w = log w_prev + f(phi_o, h).

    The noise sigma(phi_o, phi_a, h_prev) * eps enters the candidate state, inside its tanh (Ma et al., AAAI 2020).
    """

    name = "dpfrl"
    losses = {}

    def __init__(self, config, observation, action, *, rngs: nnx.Rngs):
        h = config.h_dim
        size = particles.summary_size(config, {"h": h})
        super().__init__(config, observation, action, summary_size=size, rngs=rngs)
        self.num_particles = config.num_particles
        self.resampling = Resampling.of(config)
        self.gru = networks.GRUCell(self.input_sizes, h, update_bias=config.update_gate_bias, rngs=rngs)
        self.deviation = networks.Linear(self.input_sizes | {"h": h}, h, gain=1.0, rngs=rngs)
        self.score_hidden = networks.Linear({"obs": self.encoded_size, "h": h}, h, rngs=rngs)
        self.score_out = networks.Linear({"x": h}, 1, gain=1.0, rngs=rngs)
        self.summary = particles.make_summary(config, {"h": h}, rngs=rngs)

    @property
    def noise_size(self) -> int:
        return self.h_dim

    def initial(self, num_envs: int) -> Belief:
        """K equal particles of zeros for each environment."""
        zeros = lambda *size: jnp.zeros((num_envs, self.num_particles, *size))
        return Belief(zeros(self.h_dim), zeros())

    def drive(self, encoded: dict[str, Array]) -> Drive:
        """What an encoded input [..., F] adds, once per environment."""
        seen = {name: x for name, x in encoded.items() if name == "obs"}
        return Drive(self.gru.product(**encoded), self.deviation.product(**encoded), self.score_hidden.product(**seen))

    def advance(self, carry: Carry, inputs: Inputs, trace: Trace) -> Step:
        """Resamples, advances h [B, K, H] and weighs it by the observation."""
        h = carry.h if trace.ancestors is None else pf.resample(carry.h, trace.ancestors)
        inherited = self.resampling.inherited(carry.log_weight, trace.ancestors, trace.resampled)
        h = self.transition(h, inputs.drive, trace.eps)
        return Step(Carry(h, inherited + self.log_likelihood(h, inputs.drive)))

    def transition(self, h: Array, drive: Drive, eps: Array) -> Array:
        """The next h [B, K, H]."""
        deviation = drive.deviation[:, None] + self.deviation(h=h)
        noise = notes.note(deviation, "deviation", notes.SOFTPLUS) * eps
        to_candidate = jnp.pad(noise, ((0, 0), (0, 0), (2 * self.h_dim, 0)))
        return self.gru(h, drive.gru[:, None] + to_candidate)

    def log_likelihood(self, h: Array, drive: Drive) -> Array:
        """f(phi_o, h) [B, K], which stands for log p(o given h) up to what all particles have in common."""
        hidden = notes.note(drive.score[:, None] + self.score_hidden(h=h), "score_hidden")
        return notes.note(self.score_out(x=jax.nn.relu(hidden)), "score")[..., 0]

    def score(self, step: Step, inputs: Inputs, trace: Trace, timestep: Timestep) -> tuple[Belief, UpdateInfo]:
        """The particles as they are; no loss of their own."""
        del inputs, timestep
        metrics = {} if trace.ancestors is None else {"particles.killed": pf.killed_particles(trace.ancestors)}
        weights = pf.normalised_weights(step.carry.log_weight)
        metrics["particles.effective"] = pf.effective_sample_size(weights)
        return Belief(*step.carry), UpdateInfo(trace, {}, metrics)

    def summarise(self, belief: Belief) -> Array:
        """Particles and their weights as one vector, by the layer that `model.summary` names."""
        return self.summary.of({"h": belief.h}, belief.log_weight)
