"""What a user sees while training: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Reports steps done, speed, time left, return and loss."""

    def __init__(self, total: int, done: int, stream=None):
        self._stream = stream or sys.stdout
        self._total, self._done = total, done
        self._start, self._start_steps = time.monotonic(), done
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", unit_scale=True, file=self._stream, smoothing=0.1)

    def say(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def advance(self, env_steps: int, result: float | None, loss: float, is_line: bool) -> None:
        """Moves to `env_steps`. Where the output is no terminal, only log lines and the first call are printed."""
        first = self._done == self._start_steps
        text = f"return {'-' if result is None else f'{result:.2f}'}, loss {loss:.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            self._bar.update(env_steps - self._done)
        self._done = env_steps
        if self._bar is None and (is_line or first):
            elapsed = time.monotonic() - self._start
            speed = (env_steps - self._start_steps) / max(elapsed, 1e-9)
            left = _duration((self._total - env_steps) / max(speed, 1e-9))
            share = 100 * env_steps / self._total
            self.say(f"{env_steps:,} steps ({share:.1f}%), {speed:,.0f} steps/s, {left} left, {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
