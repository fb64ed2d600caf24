"""What the layers computed while acting, kept for the gradient that is taken afterwards.

An agent acts without being differentiated. Learning runs the same code again and differentiates that. What makes this
cheap: while acting, layers hand their products to a `Recorder`; when learning, to a `Player`, which answers with the
value noted while acting. The gradient still passes through the product as written, but nobody needs its value any more,
and the compiler drops the computation.

It is also what the method asks for. Backpropagation through an earlier segment of a window needs the activations that
the segment had when it was acted, and the weights as they are now: that is what the original computes, by changing
weights in place under a graph that it keeps.

A plain `Tape` changes nothing.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dvrl_jax.fast.distinct import Rows

Array = jax.Array

MOST_UNROLLED_ON_GPU = 16  # More would only be longer to compile.


class Curve(NamedTuple):
    """An element-wise function, and its slope as a function of its value."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]


SIGMOID = Curve(jax.nn.sigmoid, lambda y: y * (1.0 - y))
TANH = Curve(jnp.tanh, lambda y: 1.0 - jnp.square(y))
SOFTPLUS = Curve(jax.nn.softplus, lambda y: -jnp.expm1(-y))


def scan(step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan`, on a GPU with steps written out one after the other: there the loop costs more than its steps."""
    length = len(jax.tree.leaves(xs)[0])
    most = MOST_UNROLLED_ON_GPU if jax.default_backend() == "gpu" else 1
    return jax.lax.scan(step, init, xs, unroll=max(n for n in range(1, most + 1) if length % n == 0))


class Tape:
    """Takes a product and returns what to go on with: here, the product itself.

    Attributes:
        steps: how many axes in front of all others count steps of an episode: 0, or 1 where several are replayed.
        rows: the images that are replayed, if it is not all of several steps.
    """

    rows: Rows | None = None

    def __init__(self, steps: int = 0):
        self.steps = steps

    def __call__(self, x: Array) -> Array:
        return x

    def bend(self, x: Array, curve: Curve) -> Array:
        """The curve at x. Learning needs neither x nor the curve again: values and slopes come from the note."""
        return curve.value(x)

    def then(self, x: Array) -> Array:
        """What x was at the time of acting, as a constant."""
        return jax.lax.stop_gradient(x)

    def scan(self, step: Callable[[Any, Any, "Tape"], tuple[Any, Any]], init: Any, xs: Any) -> tuple[Any, Any]:
        """`lax.scan` of step(carry, x, tape) -> (carry, y), for steps with products of their own."""
        return scan(lambda carry, x: step(carry, x, Tape()), init, xs)


class Recorder(Tape):
    """Notes what passes, in order; no gradient flows into the notes."""

    def __init__(self):
        super().__init__()
        self._notes: list[Any] = []

    @property
    def notes(self) -> tuple:
        return tuple(self._notes)

    def __call__(self, x: Array) -> Array:
        self._notes.append(jax.lax.stop_gradient(x))
        return x

    def bend(self, x: Array, curve: Curve) -> Array:
        return self(super().bend(x, curve))

    def then(self, x: Array) -> Array:
        return super().then(self(x))

    def scan(self, step, init, xs):
        def recorded(carry, x):
            tape = Recorder()
            carry, y = step(carry, x, tape)
            return carry, (y, tape.notes)

        carry, (ys, notes) = scan(recorded, init, xs)
        self._notes.append(notes)
        return carry, ys


class Player(Tape):
    """Answers with the notes of a `Recorder`, in order; with `steps` = 1 those of several steps, stacked."""

    def __init__(self, notes: Iterable[Any], steps: int = 0):
        super().__init__(steps)
        self._notes = iter(notes)

    def __call__(self, x: Array) -> Array:
        return recall(x, self._note())

    def bend(self, x: Array, curve: Curve) -> Array:
        return recall_curve(x, self._note(), curve)

    def then(self, x: Array) -> Array:
        del x
        return next(self._notes)

    def _note(self) -> Array:
        """The next note of what has a row per environment."""
        return next(self._notes)

    def scan(self, step, init, xs):
        def played(carry, x):
            x, notes = x
            return step(carry, x, Player(notes, self.steps))

        notes = jax.tree.map(lambda x: jnp.moveaxis(x, self.steps, 0), next(self._notes))
        return scan(played, init, (xs, notes))


class RowPlayer(Player):
    """Answers for some images out of many steps: each of the `rows` is a step of its own, with a single image.

    The notes are those of all steps, [N, B, ...], or [N, ...] of what a step's images share (`then`).
    """

    def __init__(self, notes: Iterable[Any], rows: Rows):
        super().__init__(notes, steps=1)
        self.rows = rows

    def then(self, x: Array) -> Array:
        return self.rows.of_steps(super().then(x))

    def scan(self, step, init, xs):
        raise NotImplementedError("what an observation is encoded by has no steps of its own")

    def _note(self) -> Array:
        note = super()._note()
        return self.rows.of_images(note.reshape(-1, *note.shape[2:]))


@jax.custom_vjp
def recall(computed: Array, remembered: Array) -> Array:
    """The value of `remembered` with the gradient of `computed` (same shape)."""
    del computed
    return remembered


recall.defvjp(lambda computed, remembered: (remembered, None), lambda _, grad: (grad, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def recall_curve(x: Array, remembered: Array, curve: Curve) -> Array:
    """The value of `remembered` with the gradient of curve.value(x) where it took that value (same shape)."""
    del x, curve
    return remembered


recall_curve.defvjp(
    lambda x, remembered, curve: (remembered, remembered),
    lambda curve, remembered, grad: (grad * curve.slope(remembered), None),
)


NO_TAPE = Tape()
