"""A belief model that uses all of an agent's freedom, for tests: see `Toy`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks, notes
from dvrl_jax.agents.base import Agent, UpdateInfo

KEYS, VALUES = 4, 3


class Carry(NamedTuple):
    """A vector h [B, H] and a memory [B, KEYS, VALUES]."""

    h: jax.Array
    memory: jax.Array


class Belief(NamedTuple):
    carry: Carry
    surprise: jax.Array


class Step(NamedTuple):
    carry: Carry
    before: Carry


class Toy(Agent):
    """Two recurrent arrays, one of them a matrix; a learned initial state; noise; two losses; a summary larger than h.

    It writes values under soft keys, and reads the previous reward besides.
    """

    name = "toy"
    losses = {"recall": 0.3, "calm": 0.01}

    def __init__(self, config, observation, action, *, rngs):
        super().__init__(config, observation, action, summary_size=config.h_dim + 2, rngs=rngs)
        h = config.h_dim
        self.inflow = networks.Linear(self.input_sizes | {"h": h, "memory": KEYS * VALUES}, h, rngs=rngs)
        self.reward = networks.Linear({"reward": 1}, h, rngs=rngs)
        self.key = networks.Linear({"h": h}, KEYS, rngs=rngs)
        self.written = networks.Linear({"h": h}, VALUES, rngs=rngs)
        self.out = networks.Linear({"h": h, "memory": KEYS * VALUES}, self.summary_size, rngs=rngs)
        self.recalled = networks.Linear({"h": h}, observation.shape[0], rngs=rngs)
        self.first_h = nnx.Param(0.5 * jax.random.normal(rngs.params(), (h,)))
        self.first_memory = nnx.Param(0.5 * jax.random.normal(rngs.params(), (KEYS, VALUES)))

    def initial(self, num_envs):
        every = lambda x: jnp.broadcast_to(x[...], (num_envs, *x[...].shape))
        return Belief(Carry(every(self.first_h), every(self.first_memory)), jnp.zeros(num_envs))

    def drive(self, encoded):
        return self.inflow.product(**encoded)

    def add_context(self, seen, timestep):
        inputs = super().add_context(seen, timestep)
        return inputs._replace(drive=inputs.drive + self.reward(reward=timestep.prev_reward[..., None]))

    def draw(self, key, steps, num_envs):
        return 0.1 * jax.random.normal(key, (steps, num_envs, self.h_dim))

    def sample_trace(self, belief, noise):
        return noise

    def advance(self, carry, inputs, trace):
        flat = carry.memory.reshape(carry.memory.shape[0], -1)
        hidden = self.inflow(h=carry.h, memory=flat) + inputs.drive + trace
        h = notes.note(hidden, "hidden", notes.TANH)
        key = jax.nn.softmax(notes.note(self.key(h=h), "key"))
        with notes.scope("new"):
            value = jnp.tanh(notes.note(self.written(h=h), "value"))
        with notes.scope("old"):  # The same layer a second time.
            value -= 0.1 * jnp.tanh(notes.note(self.written(h=carry.h), "value"))
        memory = 0.9 * carry.memory + key[..., :, None] * value[..., None, :]
        return Step(Carry(h, memory), carry)

    def score(self, step, inputs, trace, timestep):
        expected = notes.note(self.recalled(h=step.before.h), "expected")
        recall = jnp.mean(jnp.square(expected - timestep.obs), axis=-1)
        calm = jnp.mean(jnp.square(step.carry.memory), axis=(-2, -1))
        info = UpdateInfo(trace, {"recall": recall, "calm": calm}, {"toy.recall": recall})
        return Belief(step.carry, recall), info

    def summarise(self, belief):
        memory = belief.carry.memory
        return jnp.tanh(self.out(h=belief.carry.h, memory=memory.reshape(*memory.shape[:-2], -1)))
