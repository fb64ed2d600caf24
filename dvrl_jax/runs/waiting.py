"""What a user sees while something takes its time: on a terminal, a line that says what, and for how long already.

It imports nothing that takes time itself, so that it can be seen while libraries are loaded.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

CLEAR = "\r\033[K"  # Back to the beginning of a terminal's line, which becomes empty.


@contextlib.contextmanager
def waiting(what: str, stream: Any = None) -> Iterator[None]:
    """Within it, a terminal shows "<what> ... 12 s"; then the line is gone. Elsewhere nothing is written."""
    stream = sys.stderr if stream is None else stream
    if stream is None or not stream.isatty():
        yield
        return
    over, began = threading.Event(), time.monotonic()

    def show() -> None:
        while True:
            with contextlib.suppress(OSError, ValueError):  # The terminal may be closed meanwhile.
                stream.write(f"\r{what} ... {time.monotonic() - began:.0f} s")
                stream.flush()
            if over.wait(1.0):
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError, ValueError):
            stream.write(CLEAR)
            stream.flush()
