"""Image observations as a picture: game, observation, reconstruction, predictions, and the numbers of the belief."""

import colorsys
import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dvrl_jax.viewing.images import to_uint8
from dvrl_jax.viewing.recording import Recording

INK, FAINT, PAPER = (30, 30, 30), (150, 150, 150), (255, 255, 255)
BLUE, ORANGE, GRID = (31, 119, 180), (255, 127, 14), (225, 225, 225)


@functools.cache
def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


class FramePainter:
    """Image observations: game, observation, reconstruction and predictions in a row, numbers of the belief below."""

    side, gap, margin, caption = 168, 12, 16, 22
    below = 158
    history = 100  # Steps that the curve of values shows.

    def __init__(self, fps: float = 15.0):
        self.fps = fps

    def frames(self, recording: Recording) -> Iterator[np.ndarray]:
        for t in range(len(recording.value)):
            yield self._paint(recording, t)

    def still(self, recording: Recording) -> np.ndarray:
        """A step in the middle; one without an observation, if there is one, since those tell most."""
        middle = len(recording.value) // 2
        blank = np.flatnonzero(~recording.observed)
        return self._paint(recording, int(blank[np.argmin(np.abs(blank - middle))]) if blank.size else middle)

    def predictions(
        self, observation: np.ndarray, observed: np.ndarray, predicted: dict[int, np.ndarray]
    ) -> np.ndarray:
        """A row per environment, left to right the observation, as blank as it was, and the predictions by time.

        Images of less than half of `side` have each pixel as several.
        """
        del observed
        columns = [_visible(images) for images in (observation, *(predicted[dt] for dt in sorted(predicted)))]
        scale = max(1, self.side // 2 // max(columns[0].shape[1:3]))
        columns = [images.repeat(scale, axis=1).repeat(scale, axis=2) for images in columns]
        padded = [np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255) for x in columns]
        return np.concatenate([np.concatenate(list(column), axis=0) for column in padded], axis=1)

    def panel(self, frame: np.ndarray, column: int) -> np.ndarray:
        """The image [84, 84] (red channel, at half size) of one panel of a finished frame."""
        x, y = self.margin + column * (self.side + self.gap), self.margin + self.caption
        return frame[y : y + self.side : 2, x : x + self.side : 2, 0]

    def _paint(self, recording: Recording, t: int) -> np.ndarray:
        images = [
            ("game", recording.view[t]),
            ("observation" if recording.observed[t] else "observation: blank", recording.obs[t]),
        ]
        for dt in sorted(recording.predictions):
            label = "reconstruction" if dt == 0 else f"predicted, {dt} step{'s' if dt > 1 else ''} ahead"
            images.append((label, recording.predictions[dt][t]))
        columns = max(len(images), 4 if recording.weights is None else 6)  # The words above the weights are long.
        width = 2 * self.margin + columns * self.side + (columns - 1) * self.gap
        height = 2 * self.margin + self.caption + self.side + self.below
        canvas = Image.new("RGB", (width, height + height % 2), PAPER)
        draw = ImageDraw.Draw(canvas)
        for column, (label, image) in enumerate(images):
            x, y = self.margin + column * (self.side + self.gap), self.margin
            draw.text((x, y), label, INK, _font(14))
            shown = _visible(image)
            pixels = Image.fromarray(np.repeat(shown, 3 // shown.shape[-1], axis=-1))
            size = [round(self.side * length / max(pixels.size)) for length in pixels.size]
            canvas.paste(pixels.resize(size, Image.Resampling.NEAREST), (x, y + self.caption))
            edge = ORANGE if column == 1 and not recording.observed[t] else FAINT
            draw.rectangle((x - 1, y + self.caption - 1, x + size[0], y + self.caption + size[1]), outline=edge)
        self._channels(draw, recording.obs.shape[-1])
        self._numbers(draw, recording, t, width)
        return np.asarray(canvas)

    def _channels(self, draw: ImageDraw.ImageDraw, channels: int) -> None:
        """Below the images, which colour is which channel, where channels have colours."""
        if channels in (1, 3):
            return
        x, y = self.margin, self.margin + self.caption + self.side + 10
        draw.text((x, y), "channels", FAINT, _font(11), anchor="lm")
        for channel in range(channels):
            left = x + 56 + 28 * channel
            colour = tuple(np.round(255 * _colour(channel, channels)).astype(int))
            draw.rectangle((left, y - 5, left + 9, y + 4), fill=colour)
            draw.text((left + 13, y), str(channel), FAINT, _font(11), anchor="lm")

    def _numbers(self, draw: ImageDraw.ImageDraw, recording: Recording, t: int, width: int) -> None:
        top = self.margin + self.caption + self.side + 18
        total = width - 2 * self.margin
        third = (total - 2 * 36) // 3
        lefts = [self.margin + i * (third + 36) for i in range(3)]
        bars = (top + self.caption + 8, top + self.caption + 96)
        if recording.weights is None:
            draw.text((lefts[0], top), "no particles", FAINT, _font(14))
        else:
            weights = recording.weights[t]
            size = recording.effective_sample_size[t]
            text = f"weights of {len(weights)} particles, effective sample size {size:.1f}"
            draw.text((lefts[0], top), text, INK, _font(14))
            _bars(draw, lefts[0], third, *bars, weights, BLUE)
        if recording.action.ndim > 1:
            numbers = ", ".join(f"{x:.2f}" for x in recording.action[t])
            draw.text((lefts[1], top), f"action {numbers}", INK, _font(14))
        else:
            draw.text((lefts[1], top), "action probabilities (orange: taken)", INK, _font(14))
            taken = int(recording.action[t])
            colours = [ORANGE if a == taken else BLUE for a in range(recording.policy.shape[1])]
            _bars(draw, lefts[1], third, *bars, recording.policy[t], colours)
        score = recording.reward[:t].sum()
        draw.text((lefts[2], top), f"value {recording.value[t]:.2f}, step {t + 1}, score {score:g}", INK, _font(14))
        first = max(0, t + 1 - self.history)
        limits = (recording.value.min(), recording.value.max())
        _curve(draw, lefts[2], third, *bars, recording.value[first : t + 1], limits, self.history)


def _visible(images: np.ndarray) -> np.ndarray:
    """Images [..., c] as uint8 with 1 or 3 channels; of any other number, each has a colour, the brightest on top."""
    images, channels = to_uint8(images), images.shape[-1]
    if channels in (1, 3):
        return images
    shown = np.zeros((*images.shape[:-1], 3), np.uint8)
    for channel in range(channels):
        coloured = images[..., channel, None] * _colour(channel, channels)
        shown = np.maximum(shown, np.round(coloured).astype(np.uint8))
    return shown


def _colour(channel: int, channels: int) -> np.ndarray:
    """Red, green and blue of one of several channels, in 0..1."""
    return np.asarray(colorsys.hsv_to_rgb(channel / channels, 0.8, 1.0))


def _bars(draw, left: int, width: int, top: int, bottom: int, values: np.ndarray, colours) -> None:
    """Bars of values in 0..1, with their numbers below and the scale at the left."""
    axis = left + 26
    for share, label in ((0.0, "0"), (0.5, "0.5"), (1.0, "1")):
        y = round(bottom - share * (bottom - top))
        draw.line((axis, y, left + width, y), fill=GRID)
        draw.text((axis - 6, y), label, FAINT, _font(11), anchor="rm")
    pitch = (left + width - axis) / len(values)
    for i, value in enumerate(values):
        x = axis + i * pitch
        colour = colours[i] if isinstance(colours, list) else colours
        edge = max(1.0, 0.12 * pitch)
        draw.rectangle((x + edge, bottom - value * (bottom - top), x + pitch - edge, bottom), fill=colour)
        draw.text((x + pitch / 2, bottom + 4), str(i), FAINT, _font(11), anchor="ma")


def _curve(draw, left: int, width: int, top: int, bottom: int, values: np.ndarray, limits, length: int) -> None:
    """A curve of the last `length` values between `limits`; the newest one is at the right."""
    axis = left + 44
    low, high = limits if limits[1] > limits[0] else (limits[0] - 1, limits[1] + 1)
    for y, number in ((bottom, low), (top, high)):
        draw.line((axis, y, left + width, y), fill=GRID)
        draw.text((axis - 6, y), f"{number:.2f}", FAINT, _font(11), anchor="rm")
    pitch = (left + width - axis) / (length - 1)
    ys = bottom - (values - low) / (high - low) * (bottom - top)
    xs = left + width - pitch * np.arange(len(values))[::-1]
    points = list(zip(xs.tolist(), ys.tolist(), strict=True))
    if len(points) > 1:
        draw.line(points, fill=BLUE, width=2)
    x, y = points[-1]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=BLUE)
    draw.text((left + width, bottom + 4), f"last {length} steps", FAINT, _font(11), anchor="ra")
