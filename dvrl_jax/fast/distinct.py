"""Distinct images: in a flickering environment half of all images are blank, and one stands for all blanks of a step.

Images that are equal, and normalised in one batch, are encoded to the same vector, and the gradients that arrive at it
may be added up before they go back through the encoder: that is linear. So learning takes the images of a window in
passes of a fixed number of rows, and each pass as many whole steps as it has rows for their distinct images. Where no
image is blank, a pass is a segment.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax.agents import Agent
from dvrl_jax.bptt import Backpropagation, Window
from dvrl_jax.notes import Notes, replayed

Array = jax.Array


def apply_to(agent: Agent) -> bool:
    """Whether an agent sees images, of which many may be blank."""
    return agent.observation.is_image


def through_encoder(
    way: Backpropagation, params: nnx.State, window: Window, place: Array, grads: nnx.State, seen_grads: Any
) -> nnx.State:
    """What `bptt` computes of the encoder: with as many images at once as a segment has, but no blank one twice."""
    segments = window.segments
    capacity, num_steps, num_envs = segments.timesteps.is_first.shape
    by_step = lambda x: x.reshape(capacity * num_steps, *x.shape[2:])
    by_image = lambda x: x.reshape(-1, *x.shape[2:])
    obs, noted = jax.tree.map(by_step, (segments.timesteps.obs, segments.notes.encode_observation))
    distinct = Distinct.of(jax.vmap(is_blank)(obs))
    merged = jax.tree.map(lambda g: distinct.merged(by_step(g)), seen_grads)
    last = (place + 1) * num_steps

    def one_pass(carry):
        step, grads = carry
        rows, step = distinct.rows(step, last, room=num_envs * num_steps)
        images = rows.of_images(by_image(obs))
        notes = Notes(
            jax.tree.map(lambda x: rows.of_images(by_image(x)), noted.rows), jax.tree.map(rows.of_steps, noted.batch)
        )
        grad = jax.tree.map(lambda g: jnp.where(rows.used[:, None], rows.of_images(g), 0.0), merged)
        encode = lambda p: replayed(way.agent_of(p).encode_observation, notes, rows.shares)(images)
        _, vjp = jax.vjp(encode, params)
        return step, jax.tree.map(jnp.add, grads, vjp(grad)[0])

    # Segments that no gradient may reach are left out.
    begin = (window.first * num_steps, grads)
    return jax.lax.while_loop(lambda carry: carry[0] < last, one_pass, begin)[1]


class Rows(NamedTuple):
    """The rows of one pass; R of them, those that are left over count nothing.

    Attributes:
        image: [R] which of all N * B images each row is. step: [R] the step that it belongs to.
        used: [R] bool, False for those left over.
        shares: [R, R], `shares @ x` is the mean of x over the images of a row's step, times the number of images that
        the row stands for, where x [R, ...] holds sums over the images that each row stands for.
    """

    image: Array
    step: Array
    used: Array
    shares: Array

    def of_images(self, x: Array) -> Array:
        """Picks from x [N * B, ...], which has a row per image: [R, ...]."""
        return jnp.take(x, self.image, axis=0, mode="clip")

    def of_steps(self, x: Array) -> Array:
        """Picks from x [N, ...], which has a row per step: [R, ...]."""
        return jnp.take(x, self.step, axis=0, mode="clip")


class Distinct(NamedTuple):
    """The distinct images of N steps in B environments: all that are not blank, and the first blank one of each step.

    Attributes:
        blank: [N, B] which images are blank. first: [N, B] which are the first blank one of their step.
        image: [N * B] the numbers of all distinct images in order, then zeros. ends: [N] how many of them there are up
        to the end of each step.
    """

    blank: Array
    first: Array
    image: Array
    ends: Array

    @classmethod
    def of(cls, blank: Array) -> "Distinct":
        """Finds them from which images are blank, [N, B] bool."""
        first = blank & (jnp.cumsum(blank, axis=1) == 1)
        distinct = ~blank | first
        (image,) = jnp.nonzero(distinct.reshape(-1), size=blank.size, fill_value=0)
        return cls(blank, first, image, jnp.cumsum(jnp.sum(distinct, axis=1)))

    def merged(self, grads: Array) -> Array:
        """Gradients of images [N, B, D], those of a step's blank ones added up at the first: [N * B, D].

        What is then left at the others belongs to no distinct image.
        """
        total = jnp.sum(jnp.where(self.blank[..., None], grads, 0.0), axis=1, keepdims=True)
        return jnp.where(self.first[..., None], total, grads).reshape(-1, grads.shape[-1])

    def rows(self, step: Array, last: Array, room: int) -> tuple[Rows, Array]:
        """The pass that begins with `step` and ends before step `last`; `room` rows, at least B.

        Returns (its rows, the step that the next pass begins with).
        """
        steps, envs = self.blank.shape
        number = jnp.arange(steps)
        begin = jnp.where(step > 0, self.ends[step - 1], 0)
        fits = (number >= step) & (number < last) & (self.ends - begin <= room)
        following = step + jnp.sum(fits, dtype=step.dtype)
        used = jnp.arange(room) < self.ends[following - 1] - begin
        image = jax.lax.dynamic_slice(jnp.pad(self.image, (0, room)), (begin,), (room,))
        image = jnp.where(used, image, image[0])
        of_step = image // envs
        alike = jnp.where(self.first, jnp.sum(self.blank, axis=1, keepdims=True), 1).reshape(-1)[image]
        same_step = (of_step[:, None] == of_step) & used[:, None] & used
        shares = jnp.where(same_step, alike[:, None] / envs, 0.0)
        return Rows(image, of_step, used, shares), following


def is_blank(obs: Array) -> Array:
    """Which of the observations [B, ...] are blank, all zeros: [B] bool."""
    return jnp.all(obs == 0, axis=tuple(range(1, obs.ndim)))
