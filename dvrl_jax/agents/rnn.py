"""The baseline: a recurrent network whose state is the belief, trained by the reinforcement learning loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dvrl_jax import networks
from dvrl_jax.agents.base import Agent, Inputs, PredictionStart, Timestep, UpdateInfo
from dvrl_jax.errors import ConfigError

Array = jax.Array


class Belief(NamedTuple):
    """The recurrent state h [B, H]."""

    h: Array

    @property
    def carry(self) -> Array:
        return self.h


class Step(NamedTuple):
    """The recurrent state before and after a step, each [B, H]."""

    h_prev: Array
    h: Array

    @property
    def carry(self) -> Array:
        return self.h


class RNN(Agent):
    """h = GRU([phi_o, phi_a], h_prev); optionally also predicts the observation from [h_prev, phi_a]."""

    name = "rnn"

    def __init__(self, config, observation, action, *, rngs: nnx.Rngs):
        super().__init__(config, observation, action, rngs=rngs)
        self.obs_loss_coef = config.obs_loss_coef
        self.gru = networks.GRUCell(self.input_sizes, config.h_dim, update_bias=config.update_gate_bias, rngs=rngs)
        if self.obs_loss_coef > 0:
            self.add_emission({"h": config.h_dim} | self.action_sizes, config, rngs=rngs)

    def initial(self, num_envs: int) -> Belief:
        return Belief(jnp.zeros((num_envs, self.h_dim)))

    def drive(self, encoded: dict[str, Array]) -> Array:
        """What observation and action add to the GRU's gates, [B, 3H]."""
        return self.gru.product(**encoded)

    def advance(self, h: Array, inputs: Inputs, trace: tuple = ()) -> Step:
        """Advances h [B, H] by the observation and the previous action."""
        del trace
        return Step(h, self.gru(h, inputs.drive))

    def score(self, step: Step, inputs: Inputs, trace: tuple, timestep: Timestep) -> tuple[Belief, UpdateInfo]:
        """The belief is h; the loss [B] is `obs_loss_coef` times that of the observation expected from h before it."""
        loss = jnp.zeros(timestep.obs.shape[0])
        if self.obs_loss_coef > 0:
            loss = self.obs_loss_coef * self.observation_loss(timestep.obs, self.emission_of(step.h_prev, inputs))
        return Belief(step.h), UpdateInfo(trace, {"encoding": loss}, {})

    def summarise(self, belief: Belief) -> Array:
        return belief.h

    def emission_of(self, h_prev: Array, inputs: Inputs):
        """The decoder's output for the observation expected after h_prev [B, H] and the previous action."""
        hidden = self.emission_hidden(h=h_prev)
        if inputs.phi_a is not None:
            hidden += self.emission_hidden.product(action=inputs.phi_a)
        return self.decode(hidden)

    def observation_loss(self, obs: Array, emission) -> Array:
        """Loss [B] per environment: cross-entropy of a one-hot observation, or, averaged over pixels or dimensions, BCE
        with logits (Bernoulli) or squared error (normal).
        """
        target = self.as_float(obs)
        if self.observation.likelihood == "bernoulli":
            losses = optax.sigmoid_binary_cross_entropy(self.decoder.to_images(emission), target)
            return jnp.mean(losses, axis=tuple(range(1, losses.ndim)))
        if self.observation.likelihood == "categorical":
            return optax.softmax_cross_entropy(emission, target)
        target = target.reshape(target.shape[0], -1)
        return jnp.mean(jnp.square(emission[0] - target), axis=-1)

    @classmethod
    def predicts(cls, config) -> bool:
        return config.obs_loss_coef > 0

    def predict(self, start: PredictionStart, times: tuple[int, ...], key: Array) -> dict[int, Array]:
        """Decodes, re-encodes and advances h; nothing can be predicted without the observation loss."""
        del key
        if self.obs_loss_coef == 0:
            return {}
        inputs = Inputs(None, self.encode_action(start.timestep))
        predictions = {}
        if 0 in times:
            predictions[0] = self.emission_mean(self.emission_of(start.carry, inputs))

        def step(agent: RNN, h: Array, dt: Array) -> tuple[Array, Array]:
            del dt
            expected = agent.emission_mean(agent.emission_of(h, inputs))
            return agent.advance(h, agent.encode(start.timestep._replace(obs=expected))).h, expected

        return predictions | self.look_ahead(step, start.belief.h, times)

    @classmethod
    def describe(cls, config) -> str:
        return "an RNN" if config.model.obs_loss_coef else "an RNN without model.obs_loss_coef"

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        coef, has_loss = config.loss.encoding_coef, config.model.obs_loss_coef > 0
        said = f"loss.encoding_coef = {coef}: must be"
        if has_loss and coef == 0:
            raise ConfigError(
                f"{said} greater than 0 for an RNN with model.obs_loss_coef, whose observation loss it multiplies too"
            )
        if coef > 0 and not has_loss:
            raise ConfigError(f"{said} 0 for an RNN without model.obs_loss_coef, which has no encoding loss")
