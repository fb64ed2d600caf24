"""Saving and restoring training with Orbax: the last few checkpoints and the best one.

A checkpoint holds every array of the training state under a readable name, such as `params.encoder.layers.0.kernel`,
and, as JSON, a few numbers and the arrays' checksums, which are verified on reading. A damaged checkpoint is set aside,
never deleted, and training resumes from the one before it. Where the environment cannot be restored (Atari), what
belongs to the episodes under way (`actor`, `window`) is left out, and training resumes with new episodes.
"""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dvrl_jax.errors import RunError
from dvrl_jax.runs import process
from dvrl_jax.runs.run_directory import PROBE
from dvrl_jax.train_state import TrainState

EPISODE_FIELDS = ("actor", "window")
# Of what a checkpoint holds: 2 added the checksums and the counts of skipped updates, 3 to 5 changed what the window
# notes, 6 what the environments carry.
FORMAT = 6
READABLE_FORMATS = (FORMAT, 5, 4, 3, 2)  # Of older ones all but the episodes under way.


class Restored(NamedTuple):
    """A restored state (without the episode fields, if those were not saved) and the numbers saved with it."""

    state: TrainState
    has_episodes: bool
    extra: dict[str, Any]


class _Damaged(Exception):
    """A checkpoint that cannot be read, or not as it was written; the message says what is wrong."""


class Checkpoints:
    """The checkpoints of one run, in `directory`, numbered by update."""

    def __init__(self, directory: Path, keep: int, read_only: bool = False):
        """Keeps the last `keep` checkpoints and the one with the highest `result.true`.

        Raises:
            RunError: the directory cannot be used.
        """
        best = preservation_policy.BestN(get_metric_fn=_result, n=1)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(keep), best]),
            best_fn=_result,
            create=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            multiprocessing_options=_alone(),
        )
        self.directory = Path(directory).absolute()
        self._failed = False
        try:
            str(self.directory).encode()
        except UnicodeEncodeError:
            said = (
                "its name cannot be written in this locale's encoding: set LC_ALL=C.UTF-8, or use ASCII letters alone"
            )
            raise RunError(f"{str(self.directory)!a}: {said}") from None
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        if self.directory.exists() and not self.directory.is_dir():
            raise RunError(f"{self.directory}: cannot be used as the directory of checkpoints (it is a file)")
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._vet_results(read_only)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        except (OSError, ValueError) as error:
            raise RunError(f"{self.directory}: cannot be used as the directory of checkpoints ({error})") from None

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

        `result` is the return by which the best checkpoint is chosen. An update that has its checkpoint already is
        not saved again.

        Raises:
            RunError: it, or the one before it, cannot be written.
        """
        self.wait()
        if int(state.update) in self._manager.all_steps():
            return
        process.return_free_memory()
        # Copies: the state's own buffers are donated to the next call of the training program.
        arrays = {name: np.array(leaf) for name, leaf in _named_leaves(state, with_episodes).items()}
        self._write(int(state.update), arrays, result, extra | {"with_episodes": with_episodes})

    def _write(self, step: int, arrays: dict[str, np.ndarray], result: float | None, extra: dict[str, Any]) -> None:
        metrics = {"result.true": float("-inf") if result is None else result}
        extra = extra | {"format": FORMAT}
        extra["arrays"] = {name: _describe(array) for name, array in arrays.items()}
        extra["checksum"] = _checksum(extra)
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), extra=ocp.args.JsonSave(extra))
        with self._writing():
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def try_out(self) -> None:
        """Writes, reads back and deletes a small checkpoint: what would fail when saving fails now, before training.

        Raises:
            RunError: no checkpoint can be written there, or none be read back.
        """
        folder, arrays = self.directory / PROBE, {"probe": np.arange(3.0, dtype=np.float32)}
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with contextlib.closing(Checkpoints(folder, keep=1)) as probe:
                probe._write(0, arrays, None, {"with_episodes": False})
                probe.wait()
                probe._read_arrays(0, probe._read_extra(0), arrays)
        except _Damaged as error:
            raise RunError(f"{self.directory}: a checkpoint written there cannot be read back ({error})") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def check_space(self, state: TrainState, with_episodes: bool, count: int = 1) -> None:
        """Raises RunError if the disk has less space left than `count` checkpoints of this state take at most."""
        needed = count * sum(leaf.nbytes for leaf in _named_leaves(state, with_episodes).values())
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            said = f"a checkpoint takes up to {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left"
            raise RunError(f"{self.directory}: {said}")

    def restore(self, template: TrainState, newest: int | None = None) -> Restored | None:
        """Restores the newest checkpoint that is intact into the shape of `template`; None if there is none at all.

        With `newest`, later ones than that update do not count; they go, since training will get there again.

        Newer, damaged ones are renamed to `<update>.damaged`, so that nothing is overwritten, and reported.

        Raises:
            RunError: no checkpoint is intact, or the newest intact one does not fit this configuration.
        """
        damaged = {}
        for step in self._manager.all_steps() if newest is not None else ():
            if step > newest:
                self._manager.delete(step)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                extra = self._read_extra(step)
                expected = _named_leaves(template, extra["with_episodes"])
                arrays = self._read_arrays(step, extra, expected)
            except _Damaged as error:
                damaged[step] = error
                continue
            for number, error in damaged.items():
                self._set_aside(number, error)
            if damaged:
                self._manager.reload()
            return Restored(_fill(template, {name: arrays[name] for name in expected}), extra["with_episodes"], extra)
        reasons = [f"{step}: {error}" for step, error in damaged.items()]
        reasons += [path.name for path in sorted(self.directory.glob("*.damaged*"))]
        if reasons:
            raise RunError(
                f"{self.directory}: holds no intact checkpoint to continue from ({'; '.join(reasons)}); "
                "train in another directory to start anew"
            )
        return None

    def find(self, which: str) -> int:
        """The update number that `which` means: "best", "latest" or the number itself.

        Raises:
            RunError: there is no such checkpoint; the message lists those there are.
        """
        step = {"best": self.best, "latest": self.latest}.get(which, int(which) if which.isdecimal() else None)
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
        try:
            arrays = self._read_arrays(step, self._read_extra(step), _named_leaves(template))
        except _Damaged as error:
            others = ", ".join(str(other) for other in sorted(self._manager.all_steps()) if other != step) or "none"
            raise RunError(f"{self.directory}/{step}: is damaged ({error}); other checkpoints: {others}") from None
        filled = _fill(template, arrays)
        return filled["params"], filled["batch_stats"]

    def _read_extra(self, step: int) -> dict[str, Any]:
        """The numbers and checksums saved with a checkpoint. Raises _Damaged, or RunError for another format."""
        extra = self._read(step, extra=ocp.args.JsonRestore())
        if not isinstance(extra, dict) or "format" not in extra:
            raise _Damaged("extra: is not what was written")
        if extra["format"] not in READABLE_FORMATS:
            raise RunError(
                f"{self.directory}/{step}: unknown checkpoint format {extra['format']!r}; "
                f"this version reads {min(READABLE_FORMATS)} to {FORMAT}"
            )
        if extra.pop("checksum", None) != _checksum(extra):
            raise _Damaged("extra: is not what was written")
        if extra["format"] != FORMAT:
            extra["with_episodes"] = False
        return extra

    def _read_arrays(self, step: int, extra: dict[str, Any], expected: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        """All arrays of a checkpoint. Raises _Damaged, or RunError if they are not as `expected`."""
        for name, leaf in expected.items():
            if name not in extra["arrays"]:
                raise RunError(f"{self.directory}/{step}: holds no {name}; it belongs to another configuration")
            shape = tuple(extra["arrays"][name]["shape"])
            if shape != leaf.shape:
                raise RunError(
                    f"{self.directory}/{step}: {name} has shape {shape}, this configuration needs {leaf.shape}"
                )
        arrays = self._read(step, state=ocp.args.StandardRestore())
        for name, description in extra["arrays"].items():
            if name not in arrays or _describe(np.asarray(arrays[name])) != description:
                raise _Damaged(f"{name}: is not what was written")
        return arrays

    def _read(self, step: int, **item) -> Any:
        """One item of a checkpoint; whatever Orbax raises, and that is a lot, means that it is damaged."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**item))[next(iter(item))]
        except Exception as error:
            raise _Damaged(_in_one_line(error)) from None

    def _vet_results(self, read_only: bool) -> None:
        """Sets checkpoints aside whose `result.true` is damaged: Orbax would refuse the whole directory."""
        for path in sorted(self.directory.glob("[0-9]*/metrics/metrics")):
            if not path.parent.parent.name.isdecimal():
                continue  # Set aside before.
            try:
                float(json.loads(path.read_bytes())["result.true"])
            except FileNotFoundError:
                continue  # Training has just replaced this checkpoint by another one.
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                if read_only:
                    raise RunError(f"{path}: is damaged ({_in_one_line(error)})") from None
                self._set_aside(path.parent.parent.name, f"{path}: {_in_one_line(error)}")

    def _set_aside(self, step: int | str, error: Exception | str) -> None:
        path, number = self.directory / f"{step}.damaged", 1
        while path.exists():
            path, number = self.directory / f"{step}.damaged.{number}", number + 1
        (self.directory / str(step)).rename(path)
        print(f"checkpoint {step} is damaged ({error}); set aside as {path}", flush=True)

    def last_good(self) -> str:
        """Half a sentence that names the newest complete checkpoint, for messages about failures."""
        steps = [int(path.name) for path in self.directory.glob("[0-9]*") if path.name.isdecimal()]
        return f"the last good checkpoint is {self.directory / str(max(steps))}" if steps else "there is no checkpoint"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns whatever goes wrong with writing a checkpoint into a RunError."""
        try:
            yield
        except Exception as error:
            self._failed = True
            raise RunError(
                f"{self.directory}: a checkpoint could not be written ({_in_one_line(error)}); {self.last_good()}"
            ) from None

    def wait(self) -> None:
        """Returns once everything is written.

        Raises:
            RunError: something could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and reports it if that fails while nothing else has."""
        with self._writing() if not self._failed else contextlib.suppress(Exception):
            self._manager.close()


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes that train together this one writes whole arrays, and waits for none of the others."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))


def _result(metrics: dict[str, float]) -> float:
    return metrics["result.true"]


def _in_one_line(error: Exception) -> str:
    """What an error says, without its long tail."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _describe(array: np.ndarray) -> dict[str, Any]:
    """What tells an array from any other, as JSON."""
    checksum = zlib.crc32(np.ascontiguousarray(array))
    return {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": checksum}


def _checksum(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


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
