"""What a process asks of its operating system: threads, a heap, streams that may lose their reader, signals."""

import contextlib
import ctypes
import errno
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvrl_jax.runs.config import default_config, flatten, has_particles, sees_images
from dvrl_jax.runs.waiting import CLEAR

NVIDIA_DEVICE = Path("/dev/nvidiactl")
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # One of them comes with jax[cuda12] or jax[cuda13].

# Options of glibc's mallopt: its number for each and the value, by the environment variable that sets the same.
HEAP_OPTIONS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    # Blocks of at least so many bytes come straight from the system. Where that is too much, glibc is older than 2.35
    # and refuses it, and its own rule for large blocks, which any option would end, is the better one.
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1),
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # The heap's free end is never given back, but by `return_free_memory`.
}


def prepare(fields: Mapping[str, Any]) -> None:
    """Settles the threads of a process that trains; to be called before JAX's first computation.

    The smallest models, of one row per environment on vectors, get one thread, unless a GPU trains them: there threads
    only compile. So do several seeds of any model on vectors: each core trains seeds of its own, with nothing to share.

    `fields` are those of the configuration by dotted name, not checked as yet: a check may make an environment, and so
    compute.
    """
    fields = flatten(default_config()) | dict(fields)
    if may_use_gpu():
        return
    of_vectors = len(fields["model.channels"]) == 2  # Of images it has three.
    if of_vectors and (fields["num_seeds"] > 1 or not has_particles(fields)):
        spare_threads()
        divide_processor(min(fields["num_seeds"], len(os.sched_getaffinity(0))))
    if fields["num_devices"] > 1:
        divide_processor(fields["num_devices"])


def settle(config) -> None:
    """Settles the heap of a process that trains `config`; to be called once its program is compiled.

    Only the largest models, of particles on images, have so much working memory that a kept heap pays: to the many
    short operations of the others it is a loss (`docs/performance.md`).
    """
    if has_particles(flatten(config)) and sees_images(config):
        keep_one_heap()


def may_use_gpu() -> bool:
    """Whether JAX will take an NVIDIA GPU. JAX itself cannot be asked before its threads are settled."""
    allowed = os.environ.get("JAX_PLATFORMS", "").split(",")[0] in ("", "cuda", "gpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")
    return NVIDIA_DEVICE.exists() and allowed and visible and any(map(importlib.util.find_spec, CUDA_PLUGINS))


def share_gpu() -> None:
    """JAX takes memory of a GPU as it needs it, not most of it in advance, for a process that is not alone there.

    Of an evaluation, for example, another one may be training. It works before JAX's first computation only.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def spare_threads() -> None:
    """Gives XLA one CPU thread, for a model so small that a second one costs more time than it saves.

    It works before JAX's first computation only, and a number that the user has set (environment variable NPROC, which
    XLA reads) stays.
    """
    os.environ.setdefault("NPROC", "1")


def divide_processor(num_devices: int) -> None:
    """Makes JAX see so many CPU devices: of the smallest models each one trains seeds of its own, with one thread.

    It works before JAX's first computation only, and a number that the user has set in XLA_FLAGS stays.
    """
    if num_devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        import jax

        jax.config.update("jax_num_cpu_devices", num_devices)


def keep_one_heap() -> None:
    """Gives threads that are started from now on no heaps of their own, and gives no memory back between calls.

    glibc gives each thread a heap of its own, and what checkpoints are copied to and written from moves between
    threads: each heap keeps the most that it ever held, and resident memory rises with every few checkpoints, until
    all of them have been that full (`docs/reliability.md`). And it takes large blocks straight from the system and
    gives them back when they are freed: every call of the compiled program then has the system clear its working
    memory again, 1 GB for Pong with DVRL, which costs a tenth of the time (`docs/performance.md`).

    Not before the program is compiled: a heap that the compiler shares is left in small pieces, and with it the
    program runs up to half as long again.

    Options that the user has set in the environment (MALLOC_ARENA_MAX, ..., or any in GLIBC_TUNABLES) stay.
    """
    if "GLIBC_TUNABLES" not in os.environ:
        with _only_with_glibc():
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for variable, (option, value) in HEAP_OPTIONS.items():
                if variable not in os.environ and not mallopt(option, value):
                    break


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


class Unbroken:
    """A text stream that goes nowhere once nobody reads it: its pipe or terminal is closed, or it never was there."""

    def __init__(self, stream: Any):
        self._stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115 (open to the end)

    def write(self, text: str) -> int:
        return self._unless_gone(self._stream.write, text)

    def flush(self) -> None:
        self._unless_gone(self._stream.flush)

    def _unless_gone(self, action: Any, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                raise
            self._stream = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
            return len(arguments[0]) if arguments else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """From now on a closed terminal or pipe ends what this process prints, and not the process."""
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # The last when a terminal is closed.


@contextlib.contextmanager
def answering(handler: Any) -> Iterator[None]:
    """Within it, the signals that stop a process are answered by `handler`; not SIGHUP where `nohup` has it ignored."""
    is_heard = lambda number: number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in STOPPING if is_heard(number)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def leaving(clean_up: Callable[[], str]) -> Iterator[None]:
    """Within it, a signal that stops a process ends it at once with exit code 128 + signal, after `clean_up`.

    Also while the main thread is in a library that returns late, such as a compiler: Python's own handlers would wait
    for it, so another thread reads the signal's number. What `clean_up` returns is said to the user.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def leave() -> None:
        while received := os.read(reader, 1):
            if received[0] in STOPPING:
                name, gone = signal.Signals(received[0]).name, contextlib.suppress(OSError)
                said = clean_up()
                with gone:  # The terminal may have been closed. Its line may show what was waited for: clear it.
                    os.write(2, f"{CLEAR if os.isatty(2) else ''}stopped by {name} {said}\n".encode())
                os._exit(128 + received[0])

    thread = threading.Thread(target=leave, daemon=True)
    with answering(lambda signum, frame: None):
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writer)
            thread.join()
            os.close(reader)
