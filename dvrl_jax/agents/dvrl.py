"""Deep Variational Reinforcement Learning: the belief is a set of weighted particles, learned through an ELBO."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks, notes
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents import particles
from dvrl_jax.agents.base import Inputs, PredictionStart, Timestep, UpdateInfo
from dvrl_jax.agents.particles import Carry, ParticleAgent, Resampling, Trace
from dvrl_jax.errors import ConfigError

Array = jax.Array


class Belief(NamedTuple):
    """K weighted particles for each of B environments.

    Attributes:
        h: [B, K, H] deterministic state. z: [B, K, Z] stochastic state, encoded as phi_z: [B, K, H].
        log_weight: [B, K], not normalised.
        inherited: [B, K], the log weights before the update; None where each step's weights count for that step alone.
    """

    h: Array
    z: Array
    phi_z: Array
    log_weight: Array
    inherited: Array | None = None

    @property
    def carry(self) -> Array | Carry:
        return self.h if self.inherited is None else Carry(self.h, self.log_weight)


class InputsWithTarget(NamedTuple):
    """`Inputs`, and the observation [B, ...] that weights which cross steps depend on."""

    drive: Any
    phi_a: Array | None
    obs: Array


class LogProbs(NamedTuple):
    """log p(z), log q(z) and log p(o), each [B, K]."""

    prior: Array
    proposal: Array
    emission: Array


class Drive(NamedTuple):
    """What observation and action add to the proposal's hidden layer [B, H] and to the GRU's gates [B, 3H]."""

    proposal: Array
    gru: Array


class Step(NamedTuple):
    """The particles of one step, as the paper names them: resampled h, proposal q(z), z, phi_z and the next h.

    Where weights cross steps, also log weights [B, K] before and after the step, and what they differ by.
    """

    h_prev: Array
    proposal_mean: Array
    proposal_var: Array
    z: Array
    phi_z: Array
    h: Array
    log_probs: LogProbs | None = None
    inherited: Array | None = None
    log_weight: Array | None = None

    @property
    def carry(self) -> Array | Carry:
        return self.h if self.inherited is None else Carry(self.h, self.log_weight)


class DVRL(ParticleAgent):
    """Particle-filter belief with learned proposal q(z), prior p(z), emission p(o) and recurrence h."""

    name = "dvrl"

    def __init__(self, config, observation, action, *, rngs: nnx.Rngs):
        h, z, norm = config.h_dim, config.z_dim, config.batch_norm
        size = particles.summary_size(config, {"h": h, "phi_z": h})
        super().__init__(config, observation, action, summary_size=size, rngs=rngs)
        self.num_particles, self.z_dim = config.num_particles, config.z_dim
        self.resampling = Resampling.of(config) if config.resample else Resampling(None)
        self.proposal_hidden = networks.Linear(self.input_sizes | {"h": h}, h, rngs=rngs)
        self.proposal_activation = networks.Activation(h, norm)
        self.proposal = networks.Normal(h, z, rngs=rngs)
        self.phi_z = networks.Linear({"z": z}, h, rngs=rngs)
        self.gru = networks.GRUCell(self.input_sizes | {"phi_z": h}, h, update_bias=config.update_gate_bias, rngs=rngs)
        self.prior_hidden = networks.Linear({"h": h} | self.action_sizes, h, rngs=rngs)
        self.prior = networks.Normal(h, z, rngs=rngs)
        self.add_emission({"phi_z": h, "h": h} | self.action_sizes, config, rngs=rngs)
        self.summary = particles.make_summary(config, {"h": h, "phi_z": h}, rngs=rngs)

    @property
    def noise_size(self) -> int:
        return self.z_dim

    def initial(self, num_envs: int) -> Belief:
        """K equal particles of zeros for each environment."""
        zeros = lambda *size: jnp.zeros((num_envs, self.num_particles, *size))
        inherited = zeros() if self.resampling.keeps_weights else None
        return Belief(zeros(self.h_dim), zeros(self.z_dim), zeros(self.h_dim), zeros(), inherited)

    def drive(self, encoded: dict[str, Array]) -> Drive:
        """What observation and action, [..., F] each, add to the proposal's and the recurrence's products: once per
        environment, not per particle.
        """
        return Drive(self.proposal_hidden.product(**encoded), self.gru.product(**encoded))

    def add_context(self, seen: Drive, timestep: Timestep) -> Inputs | InputsWithTarget:
        """Where weights cross steps, so that the recurrence scores particles, the inputs hold the observation too."""
        inputs = super().add_context(seen, timestep)
        return InputsWithTarget(*inputs, timestep.obs) if self.resampling.keeps_weights else inputs

    def advance(self, carry: Array | Carry, inputs: Inputs | InputsWithTarget, trace: Trace) -> Step:
        """Copies h [B, K, H] of the chosen ancestors, draws z from the proposal, and advances h and carried weights."""
        step = self.propagate(self.inherited_h(carry, trace), inputs, trace)
        if not self.resampling.keeps_weights:
            return step
        inherited = self.resampling.inherited(carry.log_weight, trace.ancestors, trace.resampled)
        log_probs = self.log_probs(step, inputs, inputs.obs)
        return step._replace(log_probs=log_probs, inherited=inherited, log_weight=inherited + pf.log_weight(*log_probs))

    @staticmethod
    def inherited_h(carry: Array | Carry, trace: Trace) -> Array:
        """h [B, K, H] of the ancestors of a step."""
        h = carry.h if isinstance(carry, Carry) else carry
        return h if trace.ancestors is None else pf.resample(h, trace.ancestors)

    def propagate(self, h: Array, inputs: Inputs, trace: Trace) -> Step:
        """Draws z from the proposal and advances the inherited h [B, K, H]."""
        hidden = self.proposal_activation(inputs.drive.proposal[:, None] + self.proposal_hidden(h=h))
        mean, var = self.proposal(hidden)
        z = pf.sample_normal(mean, var, trace.eps)
        phi_z = jax.nn.relu(notes.note(self.phi_z(z=z), "phi_z"))
        return Step(h, mean, var, z, phi_z, self.recur(h, phi_z, inputs.drive))

    def score(self, step: Step, inputs: Inputs, trace: Trace, timestep: Timestep) -> tuple[Belief, UpdateInfo]:
        """Weighs the particles by prior, proposal and emission; the loss is the negative ELBO."""
        log_probs = self.log_probs(step, inputs, timestep.obs) if step.log_probs is None else step.log_probs
        log_weight = pf.log_weight(*log_probs)
        elbo = pf.elbo(log_weight, step.inherited)
        metrics = {} if trace.ancestors is None else {"particles.killed": pf.killed_particles(trace.ancestors)}
        metrics |= _spread("loss.prior", log_probs.proposal - log_probs.prior)
        metrics |= _spread("loss.emission", -log_probs.emission)
        if step.inherited is not None:
            log_weight = step.log_weight
            metrics["particles.effective"] = pf.effective_sample_size(pf.normalised_weights(log_weight))
        belief = Belief(step.h, step.z, step.phi_z, log_weight, step.inherited)
        return belief, UpdateInfo(trace, {"encoding": -elbo}, metrics)

    def log_probs(self, step: Step, inputs: Inputs | InputsWithTarget, obs: Array) -> LogProbs:
        """What prior, proposal and emission say of a step's particles and of obs [B, ...]."""
        proposal = pf.normal_log_prob(step.z, step.proposal_mean, step.proposal_var)
        prior = pf.normal_log_prob(step.z, *self.prior_of(step.h_prev, inputs))
        emission = self.emission_of(step.phi_z, step.h_prev, inputs)
        return LogProbs(prior, proposal, notes.note(self.emission_log_prob(obs, emission), "emission_log_prob"))

    def recur(self, h: Array, phi_z: Array, drive: Drive) -> Array:
        """The next h [B, K, H] from the previous one, phi_z [B, K, H] and the observation and action."""
        return self.gru(h, drive.gru[:, None] + self.gru.product(phi_z=phi_z))

    def prior_of(self, h_prev: Array, inputs: Inputs) -> tuple[Array, Array]:
        """p(z): mean and variance [B, K, Z] from the resampled previous h [B, K, H] and the action."""
        hidden = self.prior_hidden(h=h_prev)
        if inputs.phi_a is not None:
            hidden += self.prior_hidden.product(action=inputs.phi_a)[:, None]
        return self.prior(jax.nn.relu(notes.note(hidden, "prior_hidden")))

    def emission_of(self, phi_z: Array, h_prev: Array, inputs: Inputs) -> Any:
        """p(o): the decoder's output for all B*K particles on one axis."""
        hidden = self.emission_hidden(phi_z=phi_z, h=h_prev)
        if inputs.phi_a is not None:
            hidden += self.emission_hidden.product(action=inputs.phi_a)[:, None]
        return self.decode(hidden)

    def emission_log_prob(self, obs: Array, emission: Any) -> Array:
        """log p(o) [B, K] of obs [B, ...] under the decoder's output."""
        target = self.as_float(obs)
        if self.observation.likelihood == "bernoulli":
            blocks, mask = self.decoder.to_blocks(target)
            return pf.bernoulli_log_prob(blocks[:, None], self.by_particle(emission), mask)
        if self.observation.likelihood == "categorical":
            return pf.categorical_log_prob(target[:, None], self.by_particle(emission))
        mean, var = emission
        target = target.reshape(target.shape[0], 1, -1)
        return pf.normal_log_prob(target, self.by_particle(mean), self.by_particle(var))

    def by_particle(self, x: Array) -> Array:
        """[B, K, ...] of [B*K, ...]."""
        return x.reshape(-1, self.num_particles, *x.shape[1:])

    def summarise(self, belief: Belief) -> Array:
        """Particles [h, phi_z] and their weights as one vector, by the layer that `model.summary` names."""
        return self.summary.of({"h": belief.h, "phi_z": belief.phi_z}, belief.log_weight)

    def predict(self, start: PredictionStart, times: tuple[int, ...], key: Array) -> dict[int, Array]:
        """Rolls the prior forward, feeding the weight-averaged predicted observation back through the encoder."""
        belief, inputs = start.belief, Inputs(None, self.encode_action(start.timestep))
        predictions = {}
        if 0 in times:
            h_prev = self.inherited_h(start.carry, start.trace)
            predictions[0] = self.expected_observation(belief.phi_z, h_prev, inputs, belief.log_weight)

        def step(agent: DVRL, h: Array, dt: Array) -> tuple[Array, Array]:
            mean, var = agent.prior_of(h, inputs)
            noise = jax.random.normal(jax.random.fold_in(key, dt), mean.shape)
            phi_z = jax.nn.relu(agent.phi_z(z=pf.sample_normal(mean, var, noise)))
            expected = agent.expected_observation(phi_z, h, inputs, belief.log_weight)
            return agent.recur(h, phi_z, agent.encode(start.timestep._replace(obs=expected)).drive), expected

        return predictions | self.look_ahead(step, belief.h, times)

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        model = config.model
        if model.resampling != "systematic" and not (model.resample and config.loss.encoding_coef):
            raise ConfigError(
                f"model.resampling = {model.resampling!r}: must be 'systematic' where particles are not resampled, "
                "since model.resample is False or loss.encoding_coef is 0"
            )

    def expected_observation(self, phi_z: Array, h_prev: Array, inputs: Inputs, log_weight: Array) -> Array:
        """The emission's mean, averaged over the particles by their weights: [B, ...]."""
        mean = self.emission_mean(self.emission_of(phi_z, h_prev, inputs))
        return pf.weighted_mean(self.by_particle(mean), log_weight)


def _spread(name: str, loss: Array) -> dict[str, Array]:
    """Mean, -logsumexp(-loss) and standard deviation over the particles of loss [B, K], each [B]; K = 1: the mean."""
    metrics = {f"{name}.mean": jnp.mean(loss, -1)}
    if loss.shape[-1] > 1:
        metrics[f"{name}.logsumexp"] = -jax.nn.logsumexp(-loss, -1)
        metrics[f"{name}.std"] = jnp.std(loss, -1, ddof=1)
    return metrics
