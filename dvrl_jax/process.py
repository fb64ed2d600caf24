"""What a training process asks of its operating system: threads, and a heap that does not creep up."""

import contextlib
import ctypes
import os

from dvrl_jax.config import observation_shape

M_ARENA_MAX = -8  # glibc's number for the option of mallopt.
MOST_ARENAS = 2


def spare_threads(config) -> None:
    """Gives XLA one CPU thread for a model so small that a second one costs more time than it saves.

    That is the RNN on vectors (`docs/performance.md`). It works before JAX's first computation only, and a number that
    the user has set (environment variable NPROC, which XLA reads) stays.
    """
    if config.algorithm == "rnn" and len(observation_shape(config)) == 1:
        os.environ.setdefault("NPROC", "1")


def use_few_arenas() -> None:
    """Lets all threads share two heaps. To be called before they start.

    glibc gives each thread a heap of its own, and what checkpoints are copied to and written from moves between
    threads: each heap keeps the most that it ever held, and resident memory rises with every few checkpoints, until
    all of them have been that full (`docs/reliability.md`). The number that the user has set (environment variable
    MALLOC_ARENA_MAX) stays.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with _only_with_glibc():
            ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, MOST_ARENAS)


def return_free_memory() -> None:
    """Gives freed heap memory back to the system.

    The buffers that checkpoints are written from are freed, but in pieces that glibc keeps: without this, resident
    memory creeps up from one checkpoint to the next.
    """
    with _only_with_glibc():
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _only_with_glibc():
    """Another C library has no such functions, or no such trouble."""
    return contextlib.suppress(OSError, AttributeError)
