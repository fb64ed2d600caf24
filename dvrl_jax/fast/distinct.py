"""Distinct images: in a flickering environment half of all images are blank, and one of them stands for all of a step.

Images that are equal, and normalised in one batch, are encoded to the same vector, and the gradients that arrive at it
may be added up before they go back through the encoder: that is linear. So learning takes the images of a window in
passes of a fixed number of rows, and each pass as many whole steps as it has rows for their distinct images. Where no
image is blank, a pass is a segment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


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
