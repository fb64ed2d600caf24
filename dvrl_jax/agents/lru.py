"""A linear recurrence: complex, diagonal and stable, with the nonlinearity after it (Orvieto et al., ICML 2023)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks, notes
from dvrl_jax.agents.base import Agent, Inputs, Timestep, UpdateInfo

Array = jax.Array

RADII = (0.4, 0.99)  # Initial moduli of the eigenvalues: they forget by half in 1 to 70 steps.
LARGEST_PHASE = math.pi / 10  # Initial phases: from 0 to this, half a turn in 10 steps.


class State(NamedTuple):
    """Real and imaginary part of x, [B, H] each."""

    re: Array
    im: Array


class Belief(NamedTuple):
    """The state after the last observation."""

    carry: State

    @property
    def h(self) -> Array:
        """Both parts, [B, 2H]."""
        return jnp.concatenate(self.carry, axis=-1)


class LRU(Agent):
    """x = lambda * x_prev + gamma * (B [phi_o, phi_a] + b), complex and diagonal.

    Actor and critic see tanh(C x + c).

    lambda = exp(-exp(nu) + i exp(theta)), so |lambda| < 1; gamma = sqrt(1 - |lambda|^2) keeps the state's size.
    """

    name = "lru"
    losses = {}

    def __init__(self, config, observation, action, *, rngs: nnx.Rngs):
        super().__init__(config, observation, action, rngs=rngs)
        h = config.h_dim
        self.inflow = networks.Linear(self.input_sizes, 2 * h, gain=1.0, rngs=rngs)
        # Uniform in the ring between the two radii.
        square = jax.random.uniform(rngs.params(), (h,), minval=RADII[0] ** 2, maxval=RADII[1] ** 2)
        phase = jax.random.uniform(rngs.params(), (h,), minval=1e-3, maxval=LARGEST_PHASE)
        self.nu, self.theta = nnx.Param(jnp.log(-0.5 * jnp.log(square))), nnx.Param(jnp.log(phase))
        self.out = networks.Linear({"re": h, "im": h}, h, rngs=rngs)

    def initial(self, num_envs: int) -> Belief:
        zeros = jnp.zeros((num_envs, self.h_dim))
        return Belief(State(zeros, zeros))

    def drive(self, encoded: dict[str, Array]) -> Array:
        """B phi [..., 2H] of an encoded input: real, then imaginary part."""
        return self.inflow.product(**encoded)

    def advance(self, carry: State, inputs: Inputs, trace: tuple = ()) -> Belief:
        """The next state."""
        del trace
        rate, phase = -jnp.exp(self.nu[...]), jnp.exp(self.theta[...])
        radius, gamma = jnp.exp(rate), jnp.sqrt(-jnp.expm1(2.0 * rate))
        a, b = radius * jnp.cos(phase), radius * jnp.sin(phase)
        u, v = jnp.split(inputs.drive + self.inflow.bias[...], 2, axis=-1)
        re = notes.note(a * carry.re - b * carry.im + gamma * u, "re")
        im = notes.note(a * carry.im + b * carry.re + gamma * v, "im")
        return Belief(State(re, im))

    def score(self, step: Belief, inputs: Inputs, trace: tuple, timestep: Timestep) -> tuple[Belief, UpdateInfo]:
        """The state as it is; no loss of its own."""
        del inputs, timestep
        return step, UpdateInfo(trace, {}, {})

    def summarise(self, belief: Belief) -> Array:
        """tanh(C x + c), [B, H]: bounded, since x is not, and the previous action is in x."""
        return notes.note(self.out(re=belief.carry.re, im=belief.carry.im), "out", notes.TANH)
