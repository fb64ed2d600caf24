"""What the agent reconstructs and predicts while it trains, as arrays and as a picture.

    saved_runs/7/reconstructions/<update>/observation.npy     [B, ...] the observations that the environments gave
    saved_runs/7/reconstructions/<update>/observed.npy        [B] bool, False where that is a blank
    saved_runs/7/reconstructions/<update>/prediction_<dt>.npy [B, ...] expected dt steps later; dt = 0 reconstructs
    saved_runs/7/reconstructions/<update>/env_steps.npy       steps so far

Images are stored as uint8, vectors as they are.
"""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dvrl_jax import acting, envs
from dvrl_jax.agents import bind
from dvrl_jax.errors import RunError
from dvrl_jax.runs import compilation, run_directory
from dvrl_jax.train_state import TrainState
from dvrl_jax.viewing import playing
from dvrl_jax.viewing.images import to_uint8

Array = jax.Array

FOLDER = "reconstructions"
MAX_SHOWN = 4  # Environments in a picture.
KEY = 0x5EED  # Sets these draws apart from those of training.


def make_reconstruct(graphdef: nnx.GraphDef, times: tuple[int, ...]) -> Callable[[TrainState], dict[str, Array]]:
    """Returns a function of the training state: the observations at hand and predictions from them, by file name.

    It changes nothing: training goes on as if it had not been called.
    """

    @functools.partial(jax.jit, compiler_options=compilation.options())
    def reconstruct(params: nnx.State, batch_stats: nnx.State, actor: acting.Actor, key: Array) -> dict[str, Array]:
        agent = bind(graphdef, params, batch_stats)
        observe_key, predict_key = jax.random.split(key)
        predicted = agent.predict(playing.observe(agent, actor, observe_key), times, predict_key)
        seen = {"observation": actor.env.obs, "observed": actor.env.observed}
        return seen | {f"prediction_{dt}": value for dt, value in predicted.items()}

    def of_state(state: TrainState) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, KEY), state.update)
        actor = state.actor._replace(env=state.actor.env._replace(inner=()))
        return reconstruct(state.params, state.batch_stats, actor, key)

    return of_state


def to_storage(values: dict[str, Array]) -> dict[str, np.ndarray]:
    """Arrays on the host, images [B, h, w, c] as uint8."""
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {name: to_uint8(array) if array.ndim == 4 else array for name, array in arrays.items()}


def save(path: Path, update: int, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays by name below a run's directory; a folder is there whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    folder = path / FOLDER / str(update)
    temporary = folder.with_name(f".{update}.new")
    with run_directory.writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def load(path: Path, update: int) -> dict[str, np.ndarray]:
    """Reads what `save` wrote.

    Raises:
        RunError: a file is damaged or missing.
    """
    folder = path / FOLDER / str(update)
    arrays = {}
    for file in sorted(folder.glob("*.npy")):
        try:
            arrays[file.stem] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise RunError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    for name in ("observation", "env_steps"):
        if name not in arrays:
            raise RunError(f"{folder}: has no {name}.npy")
    return arrays


def saved_updates(path: Path) -> list[int]:
    """At which updates a run has saved reconstructions."""
    return sorted(int(folder.name) for folder in (path / FOLDER).glob("*") if folder.name.isdecimal())


def rewind(path: Path, update: int) -> None:
    """Drops what a run that goes on from `update` will save again."""
    for later in saved_updates(path):
        if later > update:
            shutil.rmtree(path / FOLDER / str(later))


def picture(config, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """The stored arrays of the first environments as a picture, uint8 [height, width, 1 or 3].

    `config` is the `env` group of a configuration; None if nobody knows how to draw it, or nothing is predicted.
    """
    from dvrl_jax.viewing import pictures  # Takes a moment to import, and most runs draw nothing.

    observation = arrays["observation"][:MAX_SHOWN]
    painter = pictures.find_painter(envs.find(config.name), observation.ndim == 4, envs.wrappers.in_use(config))
    times = sorted(int(file.removeprefix("prediction_")) for file in arrays if file.startswith("prediction_"))
    if painter is None or not times:
        return None
    observed = arrays.get("observed", np.ones(len(arrays["observation"]), bool))[:MAX_SHOWN]  # Older ones do not say.
    predicted = {dt: arrays[f"prediction_{dt}"][:MAX_SHOWN] for dt in times}
    return painter.predictions(observation, observed, predicted)
