"""Where log lines go besides metrics.jsonl: TensorBoard, and Weights & Biases if asked for.

All of them are views of the run directory. TensorBoard's event files are written anew from metrics.jsonl and
`reconstructions/` whenever training starts, so a run that was stopped, killed or resumed shows each line once.
"""

import abc
import contextlib
import math
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import run_directory
from dvrl_jax.viewing import reconstructions

NOT_METRICS = ("update", "env_steps", "final")


class Logger(abc.ABC):
    """One place that log lines go to. Its horizontal axis is environment steps."""

    @abc.abstractmethod
    def line(self, line: Mapping[str, Any]) -> None:
        """Takes a line of metrics.jsonl."""

    @abc.abstractmethod
    def image(self, name: str, image: np.ndarray, env_steps: int) -> None:
        """Takes a picture, uint8 [height, width, 1 or 3]."""

    @abc.abstractmethod
    def close(self) -> None:
        """Writes what is left."""


class TensorBoard(Logger):
    """Event files in the run's folder `tensorboard/`, under the names of metrics.jsonl.

    Each line is written when it comes, not in a thread beside: whoever waited for one that has failed, for want of
    space, would wait for ever.
    """

    def __init__(self, run: run_directory.RunDirectory, config: ConfigDict):
        """Writes what the run has so far.

        Raises:
            RunError: it cannot be written.
        """
        from tensorboardX import event_file_writer

        self._folder = run.path / "tensorboard"
        with run_directory.writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            for path in self._folder.glob("events.out.tfevents.*"):
                path.unlink()
            self._writer = event_file_writer.EventsWriter(str(self._folder / "events"))
        for line in run_directory.read_metrics(run.path) if run.metrics_path.exists() else []:
            if not line.get("final", False):  # The end that training now resumes from.
                self._add(_scalars(line), line["env_steps"])
        for update in reconstructions.saved_updates(run.path):
            try:
                arrays = reconstructions.load(run.path, update)
            except RunError as error:
                print(f"{error}; TensorBoard shows nothing of that update", flush=True)
                continue
            picture = reconstructions.picture(config.env, arrays)
            if picture is not None:
                self._add([_picture("reconstructions", picture)], int(arrays["env_steps"]))
        self._flush()

    def line(self, line: Mapping[str, Any]) -> None:
        self._add(_scalars(line), line["env_steps"])
        self._flush()

    def image(self, name: str, image: np.ndarray, env_steps: int) -> None:
        self._add([_picture(name, image)], env_steps)
        self._flush()

    def close(self) -> None:
        with run_directory.writing(self._folder):
            self._writer.close()

    def _add(self, summaries: Iterable[Any], env_steps: int) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with run_directory.writing(self._folder):
            for summary in summaries:
                self._writer.write_event(Event(wall_time=time.time(), step=env_steps, summary=summary))

    def _flush(self) -> None:
        with run_directory.writing(self._folder):
            self._writer.flush()


def _scalars(line: Mapping[str, Any]) -> list[Any]:
    from tensorboardX import summary

    return [summary.scalar(name, value) for name, value in numbers(line).items()]


def _picture(name: str, image: np.ndarray) -> Any:
    from tensorboardX import summary

    return summary.image(name, image, dataformats="HWC")


class WeightsAndBiases(Logger):
    """A run at Weights & Biases, or in the run's folder `wandb/` with WANDB_MODE=offline."""

    def __init__(self, run: run_directory.RunDirectory, config: ConfigDict):
        wandb = import_wandb()
        self._wandb = wandb
        id_path = run.path / "wandb_id"
        if not id_path.exists():
            run_directory.replace(id_path, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project="dvrl_jax",
            name=run.path.name,
            id=id_path.read_text().strip(),
            resume="allow",
            dir=str(run.path),
            config=config_lib.flatten(config),
        )

    def line(self, line: Mapping[str, Any]) -> None:
        # Steps that an earlier part of the run has sent already are ignored there.
        self._run.log(numbers(line) | {"update": line["update"]}, step=line["env_steps"])

    def image(self, name: str, image: np.ndarray, env_steps: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=env_steps)

    def close(self) -> None:
        self._run.finish()


class Loggers(Logger):
    """All that a configuration asks for."""

    def __init__(self, run: run_directory.RunDirectory, config: ConfigDict):
        """Opens them.

        Raises:
            ConfigError: `log.wandb` is set and wandb is not installed.
            RunError: something cannot be written.
        """
        with contextlib.ExitStack() as opened:
            self._loggers: list[Logger] = []
            if config.log.tensorboard:
                self._add(TensorBoard(run, config), opened)
            if config.log.wandb:
                self._add(WeightsAndBiases(run, config), opened)
            self._close = opened.pop_all()

    def _add(self, logger: Logger, opened: contextlib.ExitStack) -> None:
        opened.callback(logger.close)
        self._loggers.append(logger)

    def line(self, line: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.line(line)

    def image(self, name: str, image: np.ndarray, env_steps: int) -> None:
        for logger in self._loggers:
            logger.image(name, image, env_steps)

    def close(self) -> None:
        self._close.close()


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line that have a finite value, by name."""
    return {
        name: value
        for name, value in line.items()
        if name not in NOT_METRICS and isinstance(value, int | float) and math.isfinite(value)
    }


def import_wandb():
    """The wandb package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        message = "log.wandb = True: needs the extra 'wandb' (pip install -e '.[wandb]')"
        raise ConfigError(message) from None
    return wandb
