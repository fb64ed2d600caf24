"""Notes: what layers computed while acting, kept by name for the gradient that is taken afterwards.

An agent acts without being differentiated. Learning runs the same code again and differentiates that. Inside layers,

    x = note(x, "gru.r")

changes nothing by itself. Two transformations give it a meaning:

    y, notes = recorded(f)(*xs)      f as it is, and what it noted
    y = replayed(f, notes)(*xs)      noted values, with the gradient of f as written

In a replay nobody needs the value that f computes, and the compiler drops the computation: learning costs a backward
pass. It is also what the method asks for. Backpropagation through an earlier segment of a window needs the activations
that the segment had when it was acted, and the weights as they are now.

A replay may take several steps at once, with one more axis in front of every array and every note.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.nnx.tracers import TraceState

from dvrl_jax import choices

Array = jax.Array


class NoteError(ValueError):
    """A note that is missing, left over, taken twice or of another shape; the message names it."""


class Notes(NamedTuple):
    """What one function noted, by name.

    Attributes:
        rows: arrays [B, ...], a row per environment.
        batch: statistics of a whole batch, such as batch norm's mean [C].
    """

    rows: dict[str, Array]
    batch: dict[str, Array]


class Activation(NamedTuple):
    """An element-wise function, and its slope as a function of its value."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]


SIGMOID = Activation(jax.nn.sigmoid, lambda y: y * (1.0 - y))
TANH = Activation(jnp.tanh, lambda y: 1.0 - jnp.square(y))
SOFTPLUS = Activation(jax.nn.softplus, lambda y: -jnp.expm1(-y))
IDENTITY = Activation(lambda x: x, lambda y: 1.0)


def note(x: Array, name: str, activation: Activation = IDENTITY) -> Array:
    """activation.value(x), of x [B, ...]; in a replay the noted value.

    A replay then needs neither x nor the activation, whose slope comes from the note.

    Raises:
        NoteError: the name is taken already, or, in a replay, there is no such note or it has another shape.
    """
    pad = _pad.get()
    if not isinstance(pad, _Replay):
        value = activation.value(x)
        return value if pad is None else pad.put(pad.notes.rows, name, value)
    noted = pad.take(pad.notes.rows, name)
    if noted.shape != jnp.shape(x):
        raise NoteError(f"note {name!r}: has shape {noted.shape}, and {jnp.shape(x)} when learning")
    return _recall(x, noted) if activation is IDENTITY else _recall_activation(activation, x, noted)


def note_statistic(compute: Callable[[], Array], name: str) -> Array:
    """What `compute` returns for a batch, as a constant; in a replay what it returned at the time of acting.

    Raises:
        NoteError: as `note`, but for shapes.
    """
    pad = _pad.get()
    if isinstance(pad, _Replay):
        return pad.take(pad.notes.batch, name)
    value = jax.lax.stop_gradient(compute())
    return value if pad is None else pad.put(pad.notes.batch, name, value)


def is_replay() -> bool:
    """Whether values come from notes now."""
    return isinstance(_pad.get(), _Replay)


def batch_means() -> Array | None:
    """In a replay of R rows out of several batches, the matrix [R, R] that makes sums over rows means of their batches.

    None where all rows of a step are a batch.
    """
    return getattr(_pad.get(), "batch_means", None)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Within it, names begin with this one and a dot: for a layer that is called twice."""
    pad = _pad.get() or _Recording()
    before, pad.prefix = pad.prefix, f"{pad.prefix}{name}."
    try:
        yield
    finally:
        pad.prefix = before


def scan(name: str, step: Callable[[Any, Any], tuple[Any, Any]], init: Any, xs: Any) -> tuple[Any, Any]:
    """`lax.scan` over xs [K, ...] for steps that take notes: step(carry, x) -> (carry, y); returns (carry, ys).

    The notes of all steps are kept as arrays [B, K, F].
    """
    pad, loop = _pad.get(), choices.current().over_particles
    if pad is None:
        return loop(step, init, xs)
    if isinstance(pad, _Replay):
        start = f"{pad.prefix}{name}/"
        names = [x.removeprefix(start) for x in pad.notes.rows if x.startswith(start)]
        notes = {x: jnp.moveaxis(pad.take(pad.notes.rows, f"{name}/{x}"), -2, 0) for x in names}
        return loop(lambda carry, x: replayed(step, Notes(x[1], {}))(carry, x[0]), init, (xs, notes))

    def noted(carry, x):
        (carry, y), notes = recorded(step)(carry, x)
        return carry, (y, notes.rows)

    carry, (ys, notes) = loop(noted, init, xs)
    for inner, x in notes.items():
        pad.put(pad.notes.rows, f"{name}/{inner}", jnp.moveaxis(x, 0, -2))
    return carry, ys


def recorded(function: Callable) -> Callable[..., tuple[Any, Notes]]:
    """The function, which then returns (what it returns, its notes). No gradient flows into notes."""

    @functools.wraps(function)
    def record(*arguments):
        pad = _Recording()
        with pad.in_use():
            return function(*arguments), pad.notes

    return record


def replayed(function: Callable, notes: Notes, batch_means: Array | None = None) -> Callable:
    """The function with the values of `notes` and its own gradient; see `batch_means`.

    Raises (when called):
        NoteError: a note is missing, left over or of another shape.
    """

    @functools.wraps(function)
    def replay(*arguments):
        pad = _Replay(notes, batch_means)
        with pad.in_use():
            result = function(*arguments)
        if left := sorted(pad.left):
            raise NoteError(f"note {left[0]!r}: was taken while acting, and is not asked for when learning")
        return result

    return replay


class _Pad:
    """Where notes are put or taken from."""

    def __init__(self, notes: Notes):
        self.notes, self.prefix = notes, ""

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        token = _pad.set(self)
        try:
            yield
        finally:
            _pad.reset(token)


class _Recording(_Pad):
    def __init__(self):
        super().__init__(Notes({}, {}))
        self.trace = TraceState()

    def put(self, notes: dict[str, Array], name: str, x: Array) -> Array:
        name = self.prefix + name
        if name in self.notes.rows or name in self.notes.batch:
            raise NoteError(f"note {name!r}: is taken twice; tell the two apart with notes.scope")
        if not self.trace.is_valid():
            raise NoteError(f"note {name!r}: is taken inside a loop or transformation of JAX's; use notes.scan")
        notes[name] = jax.lax.stop_gradient(x)
        return x


class _Replay(_Pad):
    def __init__(self, notes: Notes, batch_means: Array | None):
        super().__init__(notes)
        self.batch_means, self.left = batch_means, {*notes.rows, *notes.batch}

    def take(self, notes: dict[str, Array], name: str) -> Array:
        name = self.prefix + name
        if name not in notes:
            raise NoteError(f"note {name!r}: is asked for when learning, and was not taken while acting")
        if name not in self.left:
            raise NoteError(f"note {name!r}: is asked for twice; tell the two apart with notes.scope")
        self.left.remove(name)
        return notes[name]


_pad: contextvars.ContextVar[_Recording | _Replay | None] = contextvars.ContextVar("notes", default=None)


@jax.custom_vjp
def _recall(computed: Array, noted: Array) -> Array:
    """The value of `noted` with the gradient of `computed` (same shape)."""
    del computed
    return noted


_recall.defvjp(lambda computed, noted: (noted, None), lambda _, grad: (grad, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recall_activation(activation: Activation, x: Array, noted: Array) -> Array:
    """The value of `noted` with the gradient of activation.value(x) where it took that value (same shape)."""
    del activation, x
    return noted


_recall_activation.defvjp(
    lambda activation, x, noted: (noted, noted),
    lambda activation, noted, grad: (grad * activation.slope(noted), None),
)
