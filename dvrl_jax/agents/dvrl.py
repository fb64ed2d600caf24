"""Deep Variational Reinforcement Learning: the belief is a set of weighted particles, learned through an ELBO."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks, notes
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents.base import Agent, Inputs, PredictionStart, Timestep, UpdateInfo

Array = jax.Array


class Belief(NamedTuple):
    """K weighted particles for each of B environments.

    Attributes:
        h: [B, K, H] deterministic state. z: [B, K, Z] stochastic state, encoded as phi_z: [B, K, H].
        log_weight: [B, K], not normalised.
    """

    h: Array
    z: Array
    phi_z: Array
    log_weight: Array

    @property
    def carry(self) -> Array:
        return self.h


class Noise(NamedTuple):
    """Randomness of updates: `u` [T, B] uniform, for resampling; `eps` [T, B, K, Z] standard normal, for z."""

    u: Array
    eps: Array


class Trace(NamedTuple):
    """What a step depends on: ancestors [B, K] int32 (None without resampling) and eps [B, K, Z]."""

    ancestors: Array | None
    eps: Array


class Drive(NamedTuple):
    """What observation and action add to the proposal's hidden layer [B, H] and to the GRU's gates [B, 3H]."""

    proposal: Array
    gru: Array


class Step(NamedTuple):
    """The particles of one step, as the paper names them: resampled h, proposal q(z), z, phi_z and the next h."""

    h_prev: Array
    proposal_mean: Array
    proposal_var: Array
    z: Array
    phi_z: Array
    h: Array

    @property
    def carry(self) -> Array:
        return self.h


class DVRL(Agent):
    """Particle-filter belief with learned proposal q(z), prior p(z), emission p(o) and recurrence h."""

    name = "dvrl"

    def __init__(self, config, observation, action, *, rngs: nnx.Rngs):
        super().__init__(config, observation, action, rngs=rngs)
        self.num_particles, self.z_dim = config.num_particles, config.z_dim
        self.resampling = config.resample
        h, z, norm = config.h_dim, config.z_dim, config.batch_norm
        self.proposal_hidden = networks.Linear(self.input_sizes | {"h": h}, h, rngs=rngs)
        self.proposal_activation = networks.Activation(h, norm)
        self.proposal = networks.Normal(h, z, rngs=rngs)
        self.phi_z = networks.Linear({"z": z}, h, rngs=rngs)
        self.gru = networks.GRUCell(self.input_sizes | {"phi_z": h}, h, rngs=rngs)
        self.prior_hidden = networks.Linear({"h": h} | self.action_sizes, h, rngs=rngs)
        self.prior = networks.Normal(h, z, rngs=rngs)
        self.add_emission({"phi_z": h, "h": h} | self.action_sizes, config, rngs=rngs)
        summary_inputs = {"h": h, "phi_z": h, "weight": 1}
        if config.num_particles > 1:
            self.summary = networks.GRUCell(summary_inputs, h, uniform=True, rngs=rngs)
        else:
            self.summary = networks.Linear(summary_inputs, h, rngs=rngs)

    def initial(self, num_envs: int) -> Belief:
        """K equal particles of zeros for each environment."""
        zeros = lambda *size: jnp.zeros((num_envs, self.num_particles, *size))
        return Belief(zeros(self.h_dim), zeros(self.z_dim), zeros(self.h_dim), zeros())

    def drive(self, encoded: dict[str, Array]) -> Drive:
        """What observation and action, [..., F] each, add to the proposal's and the recurrence's products: once per
        environment, not per particle.
        """
        return Drive(self.proposal_hidden.product(**encoded), self.gru.product(**encoded))

    def draw(self, key: Array, steps: int, num_envs: int) -> Noise:
        """For each step u [B], uniform, to resample with, and eps [B, K, Z], normal, to make z of."""
        u_key, eps_key = jax.random.split(key)
        u = jax.random.uniform(u_key, (steps, num_envs))
        return Noise(u, jax.random.normal(eps_key, (steps, num_envs, self.num_particles, self.z_dim)))

    def sample_trace(self, belief: Belief, noise: Noise) -> Trace:
        """Resamples: which particles go on, and the noise of their z. Noise: u [B], eps [B, K, Z]."""
        ancestors = pf.systematic_ancestors(belief.log_weight, noise.u) if self.resampling else None
        return Trace(ancestors, noise.eps)

    def advance(self, h: Array, inputs: Inputs, trace: Trace) -> Step:
        """Copies h [B, K, H] of the chosen ancestors, draws z from the proposal, and advances h."""
        if trace.ancestors is not None:
            h = pf.resample(h, trace.ancestors)
        return self.propagate(h, inputs, trace)

    def propagate(self, h: Array, inputs: Inputs, trace: Trace) -> Step:
        """Draws z from the proposal and advances the inherited h [B, K, H]."""
        hidden = self.proposal_activation(inputs.drive.proposal[:, None] + self.proposal_hidden(h=h))
        mean, var = self.proposal(hidden)
        z = pf.sample_normal(mean, var, trace.eps)
        phi_z = jax.nn.relu(notes.note(self.phi_z(z=z), "phi_z"))
        return Step(h, mean, var, z, phi_z, self.recur(h, phi_z, inputs.drive))

    def score(self, step: Step, inputs: Inputs, trace: Trace, timestep: Timestep) -> tuple[Belief, UpdateInfo]:
        """Weighs the particles by prior, proposal and emission; the loss is the negative ELBO."""
        proposal_log_prob = pf.normal_log_prob(step.z, step.proposal_mean, step.proposal_var)
        prior_log_prob = pf.normal_log_prob(step.z, *self.prior_of(step.h_prev, inputs))
        emission = self.emission_of(step.phi_z, step.h_prev, inputs)
        emission_log_prob = notes.note(self.emission_log_prob(timestep.obs, emission), "emission_log_prob")
        log_weight = pf.log_weight(prior_log_prob, proposal_log_prob, emission_log_prob)
        elbo = pf.elbo(log_weight)
        metrics = {} if trace.ancestors is None else {"particles.killed": pf.killed_particles(trace.ancestors)}
        metrics |= _spread("loss.prior", proposal_log_prob - prior_log_prob)
        metrics |= _spread("loss.emission", -emission_log_prob)
        return Belief(step.h, step.z, step.phi_z, log_weight), UpdateInfo(trace, {"encoding": -elbo}, metrics)

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
        """A GRU over the particles in order, reading [h, phi_z, weight]; its last state. K = 1: one linear map."""
        weight = pf.normalised_weights(belief.log_weight)[..., None]
        inputs = {"h": belief.h, "phi_z": belief.phi_z, "weight": weight}
        if self.num_particles == 1:
            return self.summary(**inputs)[..., 0, :]
        gates = self.summary.product(**inputs)
        state = jnp.zeros_like(belief.h[..., 0, :])

        def read(state, gates):
            return self.summary(state, gates), None

        return notes.scan("summary", read, state, jnp.moveaxis(gates, -2, 0))[0]

    def predict(self, start: PredictionStart, times: tuple[int, ...], key: Array) -> dict[int, Array]:
        """Rolls the prior forward, feeding the weight-averaged predicted observation back through the encoder."""
        belief, inputs = start.belief, Inputs(None, self.encode_action(start.timestep.prev_action))
        predictions = {}
        if 0 in times:
            ancestors = start.trace.ancestors
            h_prev = start.carry if ancestors is None else pf.resample(start.carry, ancestors)
            predictions[0] = self.expected_observation(belief.phi_z, h_prev, inputs, belief.log_weight)

        def step(agent: DVRL, h: Array, dt: Array) -> tuple[Array, Array]:
            mean, var = agent.prior_of(h, inputs)
            noise = jax.random.normal(jax.random.fold_in(key, dt), mean.shape)
            phi_z = jax.nn.relu(agent.phi_z(z=pf.sample_normal(mean, var, noise)))
            expected = agent.expected_observation(phi_z, h, inputs, belief.log_weight)
            return agent.recur(h, phi_z, agent.encode(start.timestep._replace(obs=expected)).drive), expected

        return predictions | self.look_ahead(step, belief.h, times)

    @classmethod
    def rows_per_env(cls, config) -> int:
        return config.num_particles

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
