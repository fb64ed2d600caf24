"""Truncated backpropagation through time: the window of past segments, and the way back through it.

A *segment* is `num_steps` environment steps followed by one update of the weights. A *window* is `bptt_segments`
segments. Update i of a window sends its gradient back through its own segment and then through the i earlier segments
of the window, under the current weights. The recurrent state is detached where a window starts.

What crosses segments is the belief's carry alone. So the gradient goes back in time through the recurrence of one
segment after the other, and last, for all of them, through the encoder, where no step depends on another.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import choices
from dvrl_jax.agents import Agent, Inputs, Timestep
from dvrl_jax.notes import Notes, replayed

Array = jax.Array


class RecurrenceNotes(NamedTuple):
    """What encoder and recurrence noted in T steps, by the agent's verbs; arrays [T, ...]."""

    encode_observation: Notes
    add_context: Notes
    advance: Notes


class Segment(NamedTuple):
    """What taking a segment's recurrence again needs.

    Attributes:
        carry: pytree of [B, ...], before the first step. timesteps: [T, B, ...].
        trace: pytree of [T, B, ...]. notes: of T steps.
    """

    carry: Any
    timesteps: Timestep
    trace: Any
    notes: RecurrenceNotes


class Window(NamedTuple):
    """The segments of a window.

    Attributes:
        segments: on a leading axis of `capacity`. Those before the newest one's place are filled.
        first: [] int32, gradients reach back to this one: past a segment whose update was skipped none may go.
    """

    segments: Segment
    first: Array

    @classmethod
    def empty(cls, segment: Segment, capacity: int) -> "Window":
        """A window for as many segments like this one, whose arrays may be abstract."""
        segments = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), segment)
        return cls(segments, jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.segments.timesteps.is_first.shape[0]

    def put(self, segment: Segment, place: Array) -> "Window":
        """With a segment in that place, behind the earlier ones. In place 0 a new window begins."""
        write = lambda all, new: jax.lax.dynamic_update_index_in_dim(all, new, place, 0)
        first = jnp.where(place == 0, 0, self.first)
        return Window(jax.tree.map(write, self.segments, segment), first)

    def cut(self, place: Array, where: Array) -> "Window":
        """Where the condition [] holds, later gradients reach back to the segment after `place`, and not past it."""
        return self._replace(first=jnp.where(where, place + 1, self.first))


@dataclasses.dataclass(frozen=True)
class Backpropagation:
    """The way back through a window.

    Attributes:
        agent_of: the agent with given weights, to be asked for inside each transformation (see `agents.bind`).
        past: which activations earlier segments have: "as_acted", those of the time when they were acted, as the method
            is; or "recomputed", those under the weights of now, from the carry at the segment's start.
        through_recurrence, through_encoder: other ways to compute what the functions of those names below do.
    """

    agent_of: Callable[[nnx.State], Agent]
    past: str = "as_acted"
    through_recurrence: "Callable[..., tuple[nnx.State, Any, Any]] | None" = None
    through_encoder: "Callable[..., nnx.State] | None" = None

    def encode(self, params: nnx.State, segment: Segment) -> Any:
        """What was seen in a segment's steps: a pytree of [T, B, ...], see `Agent.encode_observation`."""
        encode = self._again(params, "encode_observation", segment.notes.encode_observation)
        return encode(segment.timesteps.obs)

    def add_context(self, params: nnx.State, seen: Any, segment: Segment) -> Inputs:
        """The inputs of a segment's steps, from what was `seen` in them."""
        return self._again(params, "add_context", segment.notes.add_context)(seen, segment.timesteps)

    def recur(self, params: nnx.State, carry: Any, seen: Any, segment: Segment) -> tuple[Any, Inputs, Any]:
        """The recurrence of a segment, from a carry [B, ...] and what was `seen`.

        Returns the last carry, the inputs and the steps of the recurrence, the latter two with leading axis T.
        """

        def advance(carry, x):
            is_first, inputs, trace, notes = x
            agent = self.agent_of(params)
            carry = agent.restart_carry(carry, is_first)
            again = agent.advance if self.past == "recomputed" else replayed(agent.advance, notes)
            step = again(carry, inputs, trace)
            return step.carry, step

        inputs = self.add_context(params, seen, segment)
        xs = (segment.timesteps.is_first, inputs, segment.trace, segment.notes.advance)
        carry, steps = choices.current().over_steps(advance, carry, xs)
        return carry, inputs, steps

    def through_window(
        self, params: nnx.State, window: Window, place: Array, grads: nnx.State, carry_grad: Any, seen_grad: Any
    ) -> nnx.State:
        """The gradient of the newest segment's loss through the whole window.

        Args:
            params: the weights of now. window: with the newest segment in `place`, behind the earlier ones.
            grads, carry_grad, seen_grad: the loss's gradients for the weights, for the carry before the newest segment
            [B, ...] and for what was seen in it.
        Returns:
            the gradient for the weights: `grads` and what comes to them through all segments.
        """
        through_recurrence = self.through_recurrence or _through_recurrence
        through_encoder = self.through_encoder or _through_encoder
        write = lambda all, g, place: jax.lax.dynamic_update_index_in_dim(all, g, place, 0)
        empty = jax.tree.map(lambda g: jnp.zeros((window.capacity, *g.shape), g.dtype), seen_grad)
        seen_grads = jax.tree.map(lambda all, g: write(all, g, place), empty, seen_grad)

        def through_earlier(i, carry):
            grads, carry_grad, seen_grads = carry
            earlier = place - 1 - i
            more, carry_grad, seen_grad = through_recurrence(self, params, window.segments, earlier, grads, carry_grad)
            # What a segment of a skipped update left may be NaN, which a gradient of 0 would not remove.
            reached = earlier >= window.first
            only = lambda tree: jax.tree.map(lambda g: jnp.where(reached, g, 0.0), tree)
            grads = jax.tree.map(lambda new, old: jnp.where(reached, new, old), more, grads)
            seen_grads = jax.tree.map(lambda all, g: write(all, g, earlier), seen_grads, only(seen_grad))
            return grads, only(carry_grad), seen_grads

        if window.capacity > 1:
            grads, _, seen_grads = jax.lax.fori_loop(0, place, through_earlier, (grads, carry_grad, seen_grads))
        return through_encoder(self, params, window, place, grads, seen_grads)

    def _again(self, params: nnx.State, verb: str, notes: Notes) -> Callable:
        """An agent's verb for several steps [T, B, ...] at once, as `past` says."""
        if self.past == "recomputed":
            return jax.vmap(lambda *arguments: getattr(self.agent_of(params), verb)(*arguments))
        return replayed(getattr(self.agent_of(params), verb), notes)


def at(segments: Segment, place: Array) -> Segment:
    """One segment of several."""
    return jax.tree.map(lambda x: x[place], segments)


def _through_recurrence(
    way: Backpropagation, params: nnx.State, segments: Segment, place: Array, grads: nnx.State, carry_grad: Any
) -> tuple[nnx.State, Any, Any]:
    """The gradient through the recurrence of the segment in that `place`, from that of its last carry.

    Returns `grads` with what comes to the weights, and the gradients of the first carry and of what was seen.
    """
    segment = at(segments, place)
    last_carry = lambda *inputs: way.recur(*inputs, segment)[0]
    _, vjp = jax.vjp(last_carry, params, segment.carry, way.encode(params, segment))
    more, carry_grad, seen_grad = vjp(carry_grad)
    return jax.tree.map(jnp.add, grads, more), carry_grad, seen_grad


def _through_encoder(
    way: Backpropagation, params: nnx.State, window: Window, place: Array, grads: nnx.State, seen_grads: Any
) -> nnx.State:
    """Adds to `grads` of the weights what comes through what was seen in the segments up to `place`."""

    def through(i, grads):
        _, vjp = jax.vjp(lambda p: way.encode(p, at(window.segments, i)), params)
        (more,) = vjp(at(seen_grads, i))
        return jax.tree.map(lambda old, new: jnp.where(i >= window.first, old + new, old), grads, more)

    return jax.lax.fori_loop(0, place + 1, through, grads)
