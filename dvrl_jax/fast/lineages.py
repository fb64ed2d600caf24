"""Lineages: going back in time only through particles that have descendants.

Resampling lets some particles go on several times and others not at all. Of an earlier segment's particles the loss
knows those only that have descendants in the newest, and the further back, the fewer they are. The gradient that
arrives at all others is 0 and, as long as no particle knows of another (which batch normalisation would change), so is
all that comes of it. So a step is gone back through in passes over the particles whose gradient is not 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

ROWS = 80  # Particles per pass. Products of fewer are slow; with more, rows are left over.


class Moves(NamedTuple):
    """How the particles moved, in S segments of T steps.

    Attributes:
        h: [S, T, B, K, H] before each step. fresh: [S, T, B] the steps that began an episode, with h = 0.
        trace: pytree of [S, T, B, K, ...]; its `ancestors` are the particles whose h each one inherited.
        notes: pytree of [S, T, B, K, ...], what the layers computed in the steps (see `tape.py`).
    """

    h: Array
    fresh: Array
    trace: Any
    notes: Any


class Back(NamedTuple):
    """Where the gradient of a step has gone: to the weights, to h [B, K, H] before it and to its inputs [B, ...]."""

    weights: Any
    h: Array
    inputs: Any


def go_back(
    advance: Callable[..., Array],
    weights: Any,
    moves: Moves,
    at: tuple[Array, Array],
    inputs: Any,
    weights_grad: Any,
    h_grad: Array,
) -> Back:
    """Takes the gradient of a loss from the h after a step to all that this came of, under the weights of now.

    Args:
        advance: of (weights, inherited h [R, 1, H], inputs [R, ...], fresh [R], trace [R, 1, ...], notes [R, 1, ...]),
        returns the next h: the step of any R particles, each alone in an environment of its own.
        weights: any pytree. at: (segment, step) among the moves. inputs: those of the step, pytree of [B, ...].
        weights_grad: what has come to the weights before; what this step brings is added. h_grad: [B, K, H].
    """
    envs, particles = h_grad.shape[:2]
    size = envs * particles
    room = min(size, ROWS)
    (live,) = jnp.nonzero(jnp.any(h_grad != 0.0, axis=-1).reshape(size), size=size + room, fill_value=size)
    last = jnp.sum(live < size)

    def look(carry: tuple[Array, Back]) -> tuple[Array, Back]:
        begin, back = carry
        row = jax.lax.dynamic_slice(live, (begin,), (room,))
        used = row < size
        row = jnp.where(used, row, row[0])  # A row that is left over repeats the first, and counts nothing.
        env, particle = row // particles, row % particles
        pick = lambda x, particle: x[(*at, env, particle)][:, None]
        trace, notes = jax.tree.map(lambda x: pick(x, particle), (moves.trace, moves.notes))
        parent = trace.ancestors[:, 0]
        of_env, fresh = jax.tree.map(lambda x: x[env], (inputs, moves.fresh[at]))
        still = (fresh, trace, notes)
        _, vjp = jax.vjp(lambda *changing: advance(*changing, *still), weights, pick(moves.h, parent), of_env)
        row_grad = jnp.where(used[:, None], h_grad[env, particle], 0.0)
        of_weights, of_h, of_inputs = vjp(row_grad[:, None])
        return begin + room, Back(
            jax.tree.map(jnp.add, back.weights, of_weights),
            back.h.at[env, parent].add(of_h[:, 0]),
            jax.tree.map(lambda all, x: all.at[env].add(x), back.inputs, of_inputs),
        )

    start = Back(weights_grad, *jax.tree.map(jnp.zeros_like, (h_grad, inputs)))
    return jax.lax.while_loop(lambda carry: carry[0] < last, look, (jnp.zeros_like(last), start))[1]
