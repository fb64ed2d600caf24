"""What a user sees while waiting: what for, how long already, and no estimate made of warm-up."""

import functools
import io
import re
import time

import pytest

from dvrl_jax.runs import reporting
from dvrl_jax.runs.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_what_is_waited_for_and_the_line_is_gone_afterwards():
    terminal = Terminal()
    with waiting("compiling", terminal):
        time.sleep(1.2)
    said = terminal.getvalue()
    assert said.startswith("\rcompiling ... 0 s\rcompiling ... 1 s") and said.endswith("\r\033[K")


def test_elsewhere_nothing_is_written_and_errors_pass():
    for stream in (io.StringIO(), Terminal()):
        with pytest.raises(KeyError), waiting("loading", stream):
            raise KeyError
    file = io.StringIO()
    with waiting("loading", file):
        pass
    assert file.getvalue() == ""


def test_the_first_call_counts_for_no_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = reporting.Progress(1000, 0, stream)
    for seconds, steps in ((10.0, 100), (12.0, 300), (14.0, 500)):  # 10 steps/s, then 100.
        now[0] = seconds
        progress.advance(steps, -1.0, 2.0, is_line=True)
    first, second, third = stream.getvalue().splitlines()
    assert first == "100 steps (10.0%), return -1.00, loss 2"
    assert second.startswith("300 steps (30.0%), 100 steps/s, 0:00:07 left")
    assert third.startswith("500 steps (50.0%), 100 steps/s, 0:00:05 left")


def test_on_a_terminal_too():
    terminal = Terminal()
    progress = reporting.Progress(1000, 0, terminal)
    time.sleep(0.5)
    progress.advance(10, None, 2.0, is_line=False)  # 20 steps/s.
    for steps in range(20, 120, 10):
        time.sleep(0.11)
        progress.advance(steps, None, 2.0, is_line=False)  # 90 steps/s.
    progress.close()
    rates = [float(rate) for rate in re.findall(r"([\d.]+)step/s", terminal.getvalue())]
    assert rates and 45 < rates[-1] < 120


def test_a_bar_that_the_user_has_switched_off_leaves_lines(monkeypatch):
    """TQDM_DISABLE=1, which tqdm reads when it is imported."""
    monkeypatch.setattr(reporting, "tqdm", functools.partial(reporting.tqdm, disable=True))
    terminal = Terminal()
    progress = reporting.Progress(1000, 0, terminal)
    progress.say("begins")
    progress.advance(100, -1.0, 2.0, is_line=True)
    progress.close()
    assert terminal.getvalue() == "begins\n100 steps (10.0%), return -1.00, loss 2\n"
