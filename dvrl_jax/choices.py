"""How the same numbers are computed: one record of everything that depends on the back end.

The record is made once for a learner (`Choices.of`) and in use while its functions are traced, so a test on a CPU can
trace the GPU's program. A field of a fast path (`dvrl_jax/fast/`) switches that path off.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Choices:
    """None of these changes a result by more than rounding.

    Attributes:
        lineages: backpropagate through earlier segments along particles with descendants alone (`fast/lineages.py`).
        distinct: encode blank images once per step when learning (`fast/distinct.py`).
        tiles: compute convolutions in tiles where that pays (`fast/tiles.py`).
        materialise: compute an environment's step once (`products.materialised`). XLA's CPU back end would compute it
            again in everything that reads it: over steps that are written out, exponentially often.
        transposed_kernels: keep a transposed copy of large kernels for gradients.
        conditionals: skip what a condition excludes (`lax.cond`), instead of computing both sides.
        unroll: write out up to so many steps of the loop over particles.
        unroll_segment: write out a segment's steps up to this number. What a step leaves for learning then stays where
            it was computed, instead of being copied into arrays over all steps and back.
        seeds_together: several seeds of one program (`seeds.py`) are trained side by side, not one after the other.
        mesh: the devices that the environments are divided over (`devices.py`); None for one.
    """

    lineages: bool = True
    distinct: bool = True
    tiles: bool = True
    materialise: bool = True
    transposed_kernels: bool = True
    conditionals: bool = True
    unroll: int = 1
    unroll_segment: int = 8
    seeds_together: bool = False
    mesh: Mesh | None = None

    @classmethod
    def of(cls, platform: str) -> "Choices":
        """The fastest on a back end, by its name in JAX: "cpu", "gpu", ..."""
        if platform == "cpu":
            return cls()
        # On a GPU `lax.cond` synchronises with the host, a loop costs more than its steps, and all particles take as
        # many kernels as a few of them.
        gpu = platform == "gpu"
        return cls(
            lineages=not gpu,
            tiles=False,
            materialise=False,
            transposed_kernels=False,
            conditionals=not gpu,
            unroll=16 if gpu else 1,
            seeds_together=True,
        )

    def for_seeds(self) -> "Choices":
        """The same for a program that is vmapped over seeds: no loop has a length that depends on the data."""
        together = {"lineages": False, "distinct": False, "conditionals": False, "seeds_together": True}
        return dataclasses.replace(self, **together)

    def for_devices(self, mesh: Mesh) -> "Choices":
        """The same for a program that XLA divides over the devices of a mesh: nothing gathers over the whole batch."""
        return dataclasses.replace(self, lineages=False, distinct=False, tiles=False, mesh=mesh)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, these are the `current` choices."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def select(self, condition: Array, yes: Any, no: Any) -> Any:
        """The first of two pytrees where `condition` [] holds, else the second."""
        if self.conditionals:
            # On a CPU a selection per array would repeat all that the condition takes in each one's code.
            return jax.lax.cond(condition, lambda: yes, lambda: no)
        condition = jax.lax.optimization_barrier(condition)
        return jax.tree.map(lambda yes, no: jnp.where(condition, yes, no), yes, no)

    def over_envs(self, function: Any, axis: int, x: Array, *weights: Array) -> Array:
        """function(x, *weights) of x with environments on `axis`, as its result: on each device, of those it has.

        XLA alone would gather all of x where it is reshaped with another axis before the environments'.
        """
        if self.mesh is None:
            return function(x, *weights)
        spec = P(*[None] * axis, *self.mesh.axis_names)
        specs = (spec, *[P()] * len(weights))
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=spec, check_vma=False)(x, *weights)

    def over_particles(self, step: Any, init: Any, xs: Any) -> tuple[Any, Any]:
        """`lax.scan` over few short steps: step(carry, x) -> (carry, y), xs [K, ...]; returns (carry, ys)."""
        length = len(jax.tree.leaves(xs)[0])
        return jax.lax.scan(step, init, xs, unroll=max(n for n in range(1, self.unroll + 1) if length % n == 0))

    def over_steps(self, step: Any, init: Any, xs: Any) -> tuple[Any, Any]:
        """`lax.scan` over the steps of a segment: step(carry, x) -> (carry, y), xs [T, ...]; returns (carry, ys)."""
        return jax.lax.scan(step, init, xs, unroll=min(len(jax.tree.leaves(xs)[0]), self.unroll_segment))


_current: contextvars.ContextVar[Choices | None] = contextvars.ContextVar("choices", default=None)


def current() -> Choices:
    """The choices in use; those of JAX's back end where none are."""
    return _current.get() or Choices.of(jax.default_backend())
