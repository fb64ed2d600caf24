"""A control: an agent that remembers nothing, whose belief is what the current observation says."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks
from dvrl_jax.agents.base import Agent, Inputs, Timestep, UpdateInfo
from dvrl_jax.errors import ConfigError

Array = jax.Array


class Belief(NamedTuple):
    """Features [B, H] of the last observation and the action before it; nothing is carried to the next step."""

    features: Array
    carry: tuple[()] = ()


class Memoryless(Agent):
    """features = relu(W [phi_o, phi_a] + b): the RNN with this layer in place of its GRU."""

    name = "memoryless"
    losses = {}

    def __init__(self, config, observation, action, *, rngs: nnx.Rngs):
        super().__init__(config, observation, action, rngs=rngs)
        self.hidden = networks.Linear(self.input_sizes, config.h_dim, rngs=rngs)
        self.activation = networks.Activation(config.h_dim, config.batch_norm)

    def initial(self, num_envs: int) -> Belief:
        return Belief(jnp.zeros((num_envs, self.h_dim)))

    def drive(self, encoded: dict[str, Array]) -> Array:
        """What observation and action add to the hidden layer, [B, H]."""
        return self.hidden.product(**encoded)

    def advance(self, carry: tuple[()], inputs: Inputs, trace: tuple = ()) -> Belief:
        """The features of a step."""
        del carry, trace
        return Belief(self.activation(inputs.drive + self.hidden.bias[...]))

    def score(self, step: Belief, inputs: Inputs, trace: tuple, timestep: Timestep) -> tuple[Belief, UpdateInfo]:
        """The belief is the step's; it has no loss of its own."""
        del inputs, timestep
        return step, UpdateInfo(trace, {}, {})

    def summarise(self, belief: Belief) -> Array:
        return belief.features

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        if (coef := config.loss.encoding_coef) > 0:
            raise ConfigError(f"loss.encoding_coef = {coef}: must be 0 for {cls.name}, which has no encoding loss")
