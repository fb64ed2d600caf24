"""Pictures of the belief: one for each step of a recorded game, as a video, an animation or a still; and predictions.

An environment's picture is a `Painter`. It may have one of its own (`Task.painter`); any other environment with
image observations gets `FramePainter`. Nothing here needs a display.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dvrl_jax.envs.base import Task
from dvrl_jax.errors import RunError
from dvrl_jax.runs import run_directory
from dvrl_jax.viewing.pictures.aliased import AliasedPainter
from dvrl_jax.viewing.pictures.frames import FramePainter
from dvrl_jax.viewing.pictures.hike import HikePainter
from dvrl_jax.viewing.pictures.rocks import RockPainter
from dvrl_jax.viewing.recording import Recording

ENDINGS = (".mp4", ".gif", ".png")


class Painter(Protocol):
    """Draws recordings of one kind of environment.

    A painter may have `undrawn`, the fields of the `env` group with which observations are none that it can draw;
    without it, that is `UNDRAWN`.
    """

    fps: float  # Steps per second in which the game runs at its natural speed.

    def frames(self, recording: Recording) -> Iterator[np.ndarray]:
        """One picture per step, uint8 [height, width, 3], all of one even size."""

    def still(self, recording: Recording) -> np.ndarray:
        """One picture of the whole recording, uint8 [height, width, 3]."""

    def predictions(
        self, observation: np.ndarray, observed: np.ndarray, predicted: dict[int, np.ndarray]
    ) -> np.ndarray:
        """Observations [B, ...], which of them are none but blank (`observed` [B] is False), and what is expected dt
        steps later, {dt: [B, ...]}: uint8 [height, width, 1 or 3].
        """


# Painters of the package's own environments, by name. Another environment has its own (`Environment.painter`).
PAINTERS: dict[str, type[Painter]] = {
    "AliasedHike": AliasedPainter,
    "DistractorHike": HikePainter,
    "MountainHike": HikePainter,
    "RockSample": RockPainter,
}


# A painter would look for components where they are no more.
UNDRAWN = ("keep_components",)


def find_painter(env: Task | type[Task], is_image: bool, wrapped: Sequence[str] = ()) -> Painter | None:
    """The painter of an environment, or of environments of that class; None if there is none.

    `wrapped` are fields of the `env` group by which a class's environments are observed otherwise (`Task.wrapped`).
    """
    own = PAINTERS[env.name]() if env.name in PAINTERS else env.painter()
    painter = own or (FramePainter(env.steps_per_second) if is_image else None)
    undrawn = set(getattr(painter, "undrawn", UNDRAWN))
    return None if undrawn.intersection((*env.wrapped, *wrapped)) else painter


def no_picture(name: str, wrapped: Sequence[str] = ()) -> RunError:
    """What to raise where there is no painter for the environment of that name, `wrapped` as for `find_painter`."""
    observed = f" observed with {', '.join(f'env.{field}' for field in wrapped)}" if wrapped else ""
    return RunError(f"there is no picture of {name}{observed}; its class needs a `painter` (docs/extending.md)")


def painter_for(env: Task) -> Painter:
    """The painter of an environment.

    Raises:
        RunError: there is none.
    """
    painter = find_painter(env, env.observation.is_image)
    if painter is None:
        raise no_picture(env.name or type(env).__name__, env.wrapped)
    return painter


def check_path(path: Path) -> None:
    """Raises RunError if a picture cannot be written there in the format that the name's ending says."""
    if path.suffix not in ENDINGS:
        raise RunError(f"--video: {str(path)!r} must end in one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise RunError(f"--video: there is no directory {str(path.parent)!r}")
    if path.suffix == ".mp4":
        _ffmpeg()


def write(path: Path, painter: Painter, recording: Recording) -> None:
    """Writes a recording as MP4 (all steps), GIF (all steps) or PNG (one still), by the name's ending.

    Raises:
        RunError: the ending is another one, MP4 is not installed, or the file cannot be written.
    """
    check_path(path)
    with run_directory.writing(path):
        if path.suffix == ".png":
            Image.fromarray(painter.still(recording)).save(path, optimize=True)
        elif path.suffix == ".gif":
            _write_gif(path, painter.frames(recording), painter.fps)
        else:
            _write_mp4(path, painter.frames(recording), painter.fps)


def _write_gif(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    frames = iter(frames)
    # One palette for all frames, so that colours do not flicker, taken from the first.
    first = Image.fromarray(next(frames)).quantize(128)
    rest = (Image.fromarray(frame).quantize(palette=first, dither=Image.Dither.NONE) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float) -> None:
    frames = iter(frames)
    first = next(frames)
    size = (first.shape[1], first.shape[0])
    writer = _ffmpeg().write_frames(str(path), size, fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    with warnings.catch_warnings():
        # JAX warns of forks; this one becomes ffmpeg at once.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
        writer.send(None)
    try:
        for frame in (first, *frames):
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def _ffmpeg():
    try:
        import imageio_ffmpeg
    except ImportError:
        raise RunError("--video: MP4 needs the extra 'video' (pip install -e '.[video]'); GIF works without") from None
    return imageio_ffmpeg


__all__ = [
    "AliasedPainter",
    "FramePainter",
    "HikePainter",
    "Painter",
    "RockPainter",
    "check_path",
    "find_painter",
    "no_picture",
    "painter_for",
    "write",
]
