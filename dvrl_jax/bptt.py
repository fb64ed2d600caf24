"""Truncated backpropagation through time: the window of past segments, and the way back through it.

A *segment* is `num_steps` environment steps followed by one update of the weights. A *window* is `bptt_segments`
segments. The i-th update of a window sends its gradient back through its own segment and then through the i earlier
segments of the window, under the current weights. The recurrent state is detached where a window starts.

What crosses segments is the recurrent state h alone. So the gradient goes back in time through the recurrence of one
segment after the other, and last, for all of them, through the encoder, where no step depends on another. `Replay`
takes a segment's steps again for that, with what their layers computed when they were acted (see `tape.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax.agents import Agent, Inputs
from dvrl_jax.fast import lineages
from dvrl_jax.fast.distinct import Distinct
from dvrl_jax.tape import Player, RowPlayer

Array = jax.Array

# Loops over the steps of a segment are unrolled up to this length. What a step leaves for learning then stays where it
# was computed, instead of being copied into arrays over all steps and back.
MOST_UNROLLED = 8


def over_steps(step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan` over the steps of a segment: step(carry, x) -> (carry, y), xs [T, ...]; returns (carry, ys)."""
    return jax.lax.scan(step, init, xs, unroll=min(len(jax.tree.leaves(xs)[0]), MOST_UNROLLED))


class Notes(NamedTuple):
    """What the layers computed in T steps, by tape (see `agents.Tapes`): tuples of arrays [T, ...]."""

    see: tuple
    add_action: tuple
    transition: tuple
    weigh: tuple
    summarise: tuple


class Segment(NamedTuple):
    """What unrolling a segment's recurrence again takes.

    Attributes:
        h: [T, B, ...] recurrent state before each step.
        obs: [T, B, ...]. blank: [T, B], which are all zeros. prev_action: [T, B, A]. fresh: [T, B]. trace: pytree of
        [T, B, ...].
        notes: what encoder and recurrence computed; the others are empty.
    """

    h: Array
    obs: Array
    blank: Array
    prev_action: Array
    fresh: Array
    trace: Any
    notes: Notes


class Window(NamedTuple):
    """The segments of the window, on a leading axis of `capacity`; the first `length` are filled."""

    segments: Segment
    length: Array

    @classmethod
    def empty(cls, segment: Segment, capacity: int) -> "Window":
        """A window for as many segments like this one, whose arrays may be abstract."""
        segments = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), segment)
        return cls(segments, jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.segments.fresh.shape[0]

    def put(self, segment: Segment) -> "Window":
        """With a segment behind those that it is filled with, not yet counted."""
        write = lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, self.length, 0)
        return self._replace(segments=jax.tree.map(write, self.segments, segment))

    def counted(self) -> "Window":
        """With the segment that was `put` there counted; the last one of a window empties it, and the next begins."""
        return self._replace(length=jnp.where(self.length + 1 == self.capacity, 0, self.length + 1))

    def push(self, segment: Segment) -> "Window":
        """With one more segment."""
        return self.put(segment).counted()


@dataclasses.dataclass(frozen=True)
class Replay:
    """The steps of segments once more, as functions of the weights of now.

    Attributes:
        agent_of: the agent with these weights, to be asked for inside each transformation (see `agents.bind`).
        by_lineages: go back through the particles with descendants alone (see `lineages.py`).
    """

    agent_of: Callable[[nnx.State], Agent]
    by_lineages: bool

    def see(self, params: nnx.State, segment: Segment) -> Any:
        """What was seen in a segment's steps: a pytree of [T, B, ...], see `Agent.see`."""
        return self.agent_of(params).see(segment.obs, Player(segment.notes.see, steps=1))

    def add_action(self, params: nnx.State, seen: Any, segment: Segment) -> Inputs:
        """The inputs of a segment's steps, from what was `seen` in them."""
        tape = Player(segment.notes.add_action, steps=1)
        return self.agent_of(params).add_action(seen, segment.prev_action, tape)

    def recur(self, params: nnx.State, h: Array, seen: Any, segment: Segment) -> tuple[Inputs, Any]:
        """The recurrence of a segment, from recurrent state h [B, ...] and what was `seen`.

        Returns the inputs and the steps of the recurrence, each with leading axis T.
        """

        def transition(h, x):
            fresh, inputs, trace, notes = x
            agent = self.agent_of(params)
            step = agent.transition(agent.restart(h, fresh), inputs, trace, Player(notes))
            return step.h, step

        inputs = self.add_action(params, seen, segment)
        xs = (segment.fresh, inputs, segment.trace, segment.notes.transition)
        _, steps = over_steps(transition, h, xs)
        return inputs, steps

    def go_back(self, params: nnx.State, window: Window, grads: nnx.State, h_grad: Array, seen_grad: Any) -> nnx.State:
        """The gradient of the newest segment's loss through the whole window.

        Args:
            params: the weights of now. window: with the newest segment in place `length`, behind the earlier ones.
            grads, h_grad, seen_grad: the loss's gradients for the weights, for the recurrent state before the newest
            segment [B, ...] and for what was seen in it.
        Returns:
            the gradient for the weights: `grads` and what comes to them through all segments.
        """
        newest, segments = window.length, window.segments
        seen_grads = jax.tree.map(
            lambda g: jnp.zeros((window.capacity, *g.shape), g.dtype).at[newest].set(g), seen_grad
        )

        def through_earlier(i, carry):
            grads, h_grad, seen_grads = carry
            place = newest - 1 - i
            through = self._along_lineages if self.by_lineages else self._through_recurrence
            grads, h_grad, seen_grad = through(params, segments, place, grads, h_grad)
            return grads, h_grad, jax.tree.map(lambda all, g: all.at[place].set(g), seen_grads, seen_grad)

        if window.capacity > 1:
            grads, _, seen_grads = jax.lax.fori_loop(0, newest, through_earlier, (grads, h_grad, seen_grads))
        return self._through_encoder(params, segments, newest + 1, grads, seen_grads)

    def _through_recurrence(self, params, segments: Segment, place: Array, grads, h_grad: Array):
        """The gradient through the recurrence of the segment in that `place`, from that of its last h.

        Returns `grads` with what comes to the weights, and the gradients of the first h and of what was seen.
        """
        segment = jax.tree.map(lambda x: x[place], segments)
        last_h = lambda *inputs: self.recur(*inputs, segment)[1].h[-1]
        _, vjp = jax.vjp(last_h, params, segment.h[0], self.see(params, segment))
        more, h_grad, seen_grad = vjp(h_grad)
        return jax.tree.map(jnp.add, grads, more), h_grad, seen_grad

    def _along_lineages(self, params, segments: Segment, place: Array, grads, h_grad: Array):
        """The same, but step by step, and through the particles that have descendants only."""
        segment = jax.tree.map(lambda x: x[place], segments)
        moves = lineages.Moves(segments.h, segments.fresh, segments.trace, segments.notes.transition)

        def advance(params, h, inputs, fresh, trace, notes):
            agent = self.agent_of(params)
            return agent.advance(agent.restart(h, fresh), inputs, trace, Player(notes)).h

        def step_back(carry, x):
            back = lineages.go_back(advance, params, moves, (place, x[0]), x[1], *carry)
            return (back.weights, back.h), back.inputs

        seen = self.see(params, segment)
        inputs, add_action_vjp = jax.vjp(lambda *changing: self.add_action(*changing, segment), params, seen)
        xs = (jnp.arange(segment.fresh.shape[0]), inputs)
        (grads, h_grad), inputs_grad = jax.lax.scan(step_back, (grads, h_grad), xs, reverse=True)
        more, seen_grad = add_action_vjp(inputs_grad)
        return jax.tree.map(jnp.add, grads, more), h_grad, seen_grad

    def _through_encoder(self, params, segments: Segment, length: Array, grads, seen_grads: Any) -> nnx.State:
        """Adds to `grads` of the weights what comes through what was seen in the first `length` segments.

        `seen_grads`, the loss's gradients for that, go back through the encoder as often as it takes: with as many
        images at once as a segment has, but no image twice (see `distinct.py`).
        """
        capacity, num_steps, num_envs = segments.blank.shape
        by_step = lambda x: x.reshape(capacity * num_steps, *x.shape[2:])
        obs, notes = jax.tree.map(by_step, (segments.obs, segments.notes.see))
        distinct = Distinct.of(by_step(segments.blank))
        merged = jax.tree.map(lambda g: distinct.merged(by_step(g)), seen_grads)
        last = length * num_steps

        def look(carry):
            step, grads = carry
            rows, step = distinct.rows(step, last, room=num_envs * num_steps)
            images = rows.of_images(obs.reshape(-1, *obs.shape[2:]))
            grad = jax.tree.map(lambda g: jnp.where(rows.used[:, None], rows.of_images(g), 0.0), merged)
            _, vjp = jax.vjp(lambda p: self.agent_of(p).see(images, RowPlayer(notes, rows)), params)
            return step, jax.tree.map(jnp.add, grads, vjp(grad)[0])

        return jax.lax.while_loop(lambda carry: carry[0] < last, look, (jnp.int32(0), grads))[1]
