"""Where log lines go besides metrics.jsonl: TensorBoard, and Weights & Biases if asked for.

All of them are views of the run directory. TensorBoard's event files are written anew from metrics.jsonl and
`reconstructions/` whenever training starts, so a run that was stopped, killed or resumed shows each line once.
"""

import abc
import contextlib
import math
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dvrl_jax import config as config_lib
from dvrl_jax import reconstructions, runs

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
    """Event files in the run's folder `tensorboard/`, under the names of metrics.jsonl."""

    def __init__(self, run: runs.RunDirectory, config: ConfigDict):
        from tensorboardX import SummaryWriter

        folder = run.path / "tensorboard"
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = SummaryWriter(str(folder))
        if run.metrics_path.exists():
            for line in runs.read_metrics(run.path):
                self.line(line)
        for update in reconstructions.saved_updates(run.path):
            arrays = reconstructions.load(run.path, update)
            picture = reconstructions.picture(config.env.name, arrays)
            if picture is not None:
                self.image("reconstructions", picture, int(arrays["env_steps"]))

    def line(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["env_steps"])
        self._writer.flush()

    def image(self, name: str, image: np.ndarray, env_steps: int) -> None:
        self._writer.add_image(name, image, env_steps, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """A run at Weights & Biases, or in the run's folder `wandb/` with WANDB_MODE=offline."""

    def __init__(self, run: runs.RunDirectory, config: ConfigDict):
        wandb = import_wandb()
        self._wandb = wandb
        id_path = run.path / "wandb_id"
        if not id_path.exists():
            id_path.write_text(secrets.token_hex(4) + "\n")
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

    def __init__(self, run: runs.RunDirectory, config: ConfigDict):
        """Opens them.

        Raises:
            ConfigError: `log.wandb` is set and wandb is not installed.
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
        raise config_lib.ConfigError(message) from None
    return wandb
