"""Lineages: going back in time only through particles that have descendants. DVRL, on a CPU.

Resampling lets some particles continue several times and others not at all. Only particles with descendants in the
newest segment receive a gradient; the further back, the fewer they are. As long as no particle knows of another (which
batch normalisation would change), nothing comes of the others. So a step is gone back through in passes over the
particles whose gradient is not 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax.agents import DVRL, Agent
from dvrl_jax.bptt import Backpropagation, Segment, at
from dvrl_jax.notes import Notes, replayed

Array = jax.Array

ROWS = 80  # Particles per pass. Products of fewer are slow; with more, rows are left over.


def apply_to(agent: Agent) -> bool:
    """Whether an agent's particles have lineages and know nothing of each other."""
    if type(agent) is not DVRL or agent.num_particles == 1:
        return False
    if agent.resampling.scheme is None or agent.resampling.keeps_weights:
        return False  # Weights that cross steps are normalised over all particles.
    return agent.proposal_activation.norm is None


def through_recurrence(
    way: Backpropagation, params: nnx.State, segments: Segment, place: Array, grads: nnx.State, h_grad: Array
) -> tuple[nnx.State, Array, Any]:
    """What `bptt` computes of a segment's recurrence, step by step, through the particles with descendants only."""
    segment = at(segments, place)
    seen = way.encode(params, segment)
    # From notes the steps cost next to nothing, and h need not be stored for each.
    _, _, steps = way.recur(params, segment.carry, seen, segment)
    h = jnp.concatenate([segment.carry[None], steps.h[:-1]])

    def advance(params, h, inputs, is_first, trace, notes):
        h = jnp.where(is_first[:, None, None], 0.0, h)
        return replayed(way.agent_of(params).propagate, notes)(h, inputs, trace).h

    def step_back(carry, x):
        t, inputs, h = x
        moves = Moves(h, segments.timesteps.is_first, segments.trace, segments.notes.advance)
        back = go_back(advance, params, moves, (place, t), inputs, *carry)
        return (back.weights, back.h), back.inputs

    inputs, add_context_vjp = jax.vjp(lambda *changing: way.add_context(*changing, segment), params, seen)
    xs = (jnp.arange(len(h)), inputs, h)
    (grads, h_grad), inputs_grad = jax.lax.scan(step_back, (grads, h_grad), xs, reverse=True)
    more, seen_grad = add_context_vjp(inputs_grad)
    return jax.tree.map(jnp.add, grads, more), h_grad, seen_grad


class Moves(NamedTuple):
    """How the particles moved in a step, and in S segments of T steps.

    Attributes:
        h: [B, K, H] before the step. is_first: [S, T, B] the steps that began an episode, with h = 0.
        trace: pytree of [S, T, B, K, ...]; its `ancestors` are the particles whose h each one inherited.
        notes: pytree of [S, T, B, K, ...], what the layers noted in the steps.
    """

    h: Array
    is_first: Array
    trace: Any
    notes: Notes


class Back(NamedTuple):
    """Where the gradient of a step has gone: to the weights, to h [B, K, H] before it and to its inputs [B, ...]."""

    weights: Any
    h: Array
    inputs: Any


def go_back(
    advance: Callable[..., Array],
    weights: Any,
    moves: Moves,
    step: tuple[Array, Array],
    inputs: Any,
    weights_grad: Any,
    h_grad: Array,
) -> Back:
    """Takes the gradient of a loss from the h after a step to all that this came of, under the weights of now.

    Args:
        advance: of (weights, inherited h [R, 1, H], inputs [R, ...], is_first [R], trace [R, 1, ...], notes
        [R, 1, ...]), returns the next h: the step of any R particles, each alone in an environment of its own.
        weights: any pytree. step: (segment, step) among the moves. inputs: those of the step, pytree of [B, ...].
        weights_grad: what has come to the weights before; what this step brings is added. h_grad: [B, K, H].
    """
    envs, particles = h_grad.shape[:2]
    size = envs * particles
    room = min(size, ROWS)
    (live,) = jnp.nonzero(jnp.any(h_grad != 0.0, axis=-1).reshape(size), size=size + room, fill_value=size)
    last = jnp.sum(live < size)

    def one_pass(carry: tuple[Array, Back]) -> tuple[Array, Back]:
        begin, back = carry
        row = jax.lax.dynamic_slice(live, (begin,), (room,))
        used = row < size
        row = jnp.where(used, row, row[0])  # A row that is left over repeats the first, and counts nothing.
        env, particle = row // particles, row % particles
        trace, notes = jax.tree.map(lambda x: x[(*step, env, particle)][:, None], (moves.trace, moves.notes))
        parent = trace.ancestors[:, 0]
        of_env, is_first = jax.tree.map(lambda x: x[env], (inputs, moves.is_first[step]))
        still = (is_first, trace, notes)
        h = moves.h[env, parent][:, None]
        _, vjp = jax.vjp(lambda *changing: advance(*changing, *still), weights, h, of_env)
        row_grad = jnp.where(used[:, None], h_grad[env, particle], 0.0)
        of_weights, of_h, of_inputs = vjp(row_grad[:, None])
        return begin + room, Back(
            jax.tree.map(jnp.add, back.weights, of_weights),
            back.h.at[env, parent].add(of_h[:, 0]),
            jax.tree.map(lambda all, x: all.at[env].add(x), back.inputs, of_inputs),
        )

    start = Back(weights_grad, *jax.tree.map(jnp.zeros_like, (h_grad, inputs)))
    return jax.lax.while_loop(lambda carry: carry[0] < last, one_pass, (jnp.zeros_like(last), start))[1]
