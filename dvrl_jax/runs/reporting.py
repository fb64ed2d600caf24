"""What a user sees while training: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm


class Progress:
    """Reports steps done, speed, time left, return and loss.

    The first call of the program is warm-up: it is left out of the speed, and of what that says about the time left.
    """

    def __init__(self, total: int, done: int, stream=None):
        self._stream = stream or sys.stdout
        self._total, self._done = total, done
        self._warm_since: float | None = None  # When the first call was over, after `_warm_steps`.
        self._warm_steps = done
        self._bar = None
        if self._stream.isatty():
            bar = tqdm(total=total, initial=done, unit="step", unit_scale=True, file=self._stream, smoothing=0.1)
            self._bar = None if bar.disable else bar  # TQDM_DISABLE=1 has lines in its place.

    def say(self, text: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def advance(self, env_steps: int, result: float | None, loss: float, is_line: bool) -> None:
        """Moves to `env_steps`. Where the output is no terminal, only log lines and the first call are printed."""
        text = f"return {'-' if result is None else f'{result:.2f}'}, loss {loss:.4g}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        share = f"{env_steps:,} steps ({100 * env_steps / self._total:.1f}%)"
        if self._warm_since is None:
            self._warm_since, self._warm_steps = time.monotonic(), env_steps
            if self._bar is not None:
                self._bar.initial = self._bar.n = env_steps
                self._bar.unpause()
                self._bar.start_t = self._bar.last_print_t
                self._bar.refresh()
            else:
                self.say(f"{share}, {text}")
        elif self._bar is not None:
            self._bar.update(env_steps - self._done)
        elif is_line:
            speed = (env_steps - self._warm_steps) / max(time.monotonic() - self._warm_since, 1e-9)
            left = _duration((self._total - env_steps) / max(speed, 1e-9))
            self.say(f"{share}, {speed:,.0f} steps/s, {left} left, {text}")
        self._done = env_steps

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
