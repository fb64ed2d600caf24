"""Saving and restoring training with Orbax: the last few checkpoints and the best one.

A checkpoint holds every array of the training state under a readable name, such as `params.encoder.layers.0.kernel`,
and a few numbers as JSON. Where the environment cannot be restored (Atari), what belongs to the episodes under way
(`actor`, `window`) is left out, and training goes on with new episodes.
"""

import contextlib
import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dvrl_jax.a2c import TrainState
from dvrl_jax.runs import RunError

EPISODE_FIELDS = ("actor", "window")


class Restored(NamedTuple):
    """A restored state (without the episode fields, if those were not saved) and the numbers saved with it."""

    state: TrainState
    has_episodes: bool
    extra: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `directory`, numbered by update."""

    def __init__(self, directory: Path, keep: int, read_only: bool = False):
        """Keeps the last `keep` checkpoints and the one with the highest `result.true`."""
        best = preservation_policy.BestN(get_metric_fn=_result, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best]),
            best_fn=_result,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self.directory = Path(directory).absolute()
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Update number of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Update number of the checkpoint with the highest `result.true`, None if there is none."""
        return self._manager.best_step()

    def save(self, state: TrainState, with_episodes: bool, result: float | None, extra: dict[str, Any]) -> None:
        """Starts saving; the arrays are copied before it returns, writing goes on in the background.

        `result` is the return by which the best checkpoint is chosen.
        """
        self._manager.wait_until_finished()
        _return_free_memory()
        # Copies: the state's own buffers are donated to the next call of the training program.
        arrays = {name: np.array(leaf) for name, leaf in _named_leaves(state, with_episodes).items()}
        metrics = {"result.true": float("-inf") if result is None else result}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            extra=ocp.args.JsonSave(extra | {"with_episodes": with_episodes, "format": 1}),
        )
        self._manager.save(int(state.update), args=items, metrics=metrics, force=True)

    def restore(self, template: TrainState, step: int | None = None) -> Restored:
        """Restores a checkpoint, the newest by default, into the shape of `template`.

        Raises:
            RunError: there is none, or it does not fit this configuration.
        """
        step = self.latest if step is None else step
        if step is None:
            raise RunError(f"{self.directory}: there is no checkpoint")
        extra = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
        if extra.get("format") != 1:
            raise RunError(f"{self.directory}/{step}: unknown checkpoint format {extra.get('format')!r}")
        expected = _named_leaves(template, extra["with_episodes"])
        self._check_fit(step, expected)
        abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in expected.items()}
        restore = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(step, args=restore)["state"]
        return Restored(_fill(template, arrays), extra["with_episodes"], extra)

    def find(self, which: str) -> int:
        """The update number that `which` means: "best", "latest" or the number itself.

        Raises:
            RunError: there is no such checkpoint; the message lists those there are.
        """
        step = {"best": self.best, "latest": self.latest}.get(which, int(which) if which.isdigit() else None)
        steps = self._manager.all_steps()
        if step not in steps:
            there = ", ".join(map(str, sorted(steps))) or "none"
            raise RunError(f"{self.directory}: no checkpoint {which!r}; there are: {there}")
        return step

    def restore_weights(self, step: int, params: nnx.State, batch_stats: nnx.State) -> tuple[nnx.State, nnx.State]:
        """Restores parameters and batch-norm averages alone, into the shapes of the templates.

        Raises:
            RunError: they do not fit.
        """
        template = {"params": params, "batch_stats": batch_stats}
        self._check_fit(step, _named_leaves(template))
        arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
        filled = _fill(template, arrays)
        return filled["params"], filled["batch_stats"]

    def _check_fit(self, step: int, expected: dict[str, jax.Array]) -> None:
        found = self._manager.item_metadata(step)["state"]
        for name, leaf in expected.items():
            if name not in found:
                raise RunError(f"{self.directory}/{step}: holds no {name}; it belongs to another configuration")
            if tuple(found[name].shape) != leaf.shape:
                raise RunError(
                    f"{self.directory}/{step}: {name} has shape {tuple(found[name].shape)}, "
                    f"this configuration needs {leaf.shape}"
                )

    def wait(self) -> None:
        """Returns once everything is written; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _return_free_memory() -> None:
    """Gives freed heap memory back to the system.

    The buffers that checkpoints are written from are freed, but in pieces that glibc keeps: without this, resident
    memory creeps up from one checkpoint to the next.
    """
    with contextlib.suppress(OSError, AttributeError):  # Another C library has no such function, or no such trouble.
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _result(metrics: dict[str, float]) -> float:
    return metrics["result.true"]


def _named_leaves(state: Any, with_episodes: bool = True) -> dict[str, jax.Array]:
    """The arrays to save by name; arrays without elements are nothing to save."""
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    skip = () if with_episodes else EPISODE_FIELDS
    return {name: leaf for name, leaf in leaves.items() if leaf.size and name.split(".")[0] not in skip}


def _fill(template: Any, arrays: dict[str, jax.Array]) -> Any:
    return jax.tree.map_with_path(lambda path, leaf: jnp.asarray(arrays.get(_name(path), leaf)), template)


def _name(path) -> str:
    keys = [getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path]
    return ".".join(str(key) for key in keys if key != "value")
