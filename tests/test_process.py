"""Small models leave threads alone, and many threads share two heaps."""

import os
import subprocess
import sys

import pytest

from dvrl_jax import process
from tests.tiny import tiny_config, tiny_hike


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (tiny_hike("rnn"), None, "1"),
        (tiny_hike("rnn"), "2", "2"),
        (tiny_hike("dvrl"), None, None),
        (tiny_config("rnn", env__name="Pong", model__channels=(8, 8, 8)), None, None),
    ],
)
def test_only_the_smallest_models_are_given_one_thread(config, given, expected, monkeypatch):
    monkeypatch.setenv("NPROC", "to be restored after the test")
    os.environ.pop("NPROC")
    if given is not None:
        os.environ["NPROC"] = given
    process.spare_threads(config)
    assert os.environ.get("NPROC") == expected


COUNT_HEAPS = """
import ctypes, sys, threading
from dvrl_jax import process

process.use_few_arenas()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
start = threading.Barrier(32)


def allocate():
    start.wait()
    for _ in range(100):
        libc.malloc(1000)
    start.wait()


threads = [threading.Thread(target=allocate) for _ in range(32)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc")
@pytest.mark.parametrize(("given", "most"), [(None, process.MOST_ARENAS), ("5", 5)])
def test_threads_share_heaps(given, most):
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    environment |= {"MALLOC_ARENA_MAX": given} if given else {}
    command = [sys.executable, "-c", COUNT_HEAPS]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert 1 < output.count("<heap nr=") <= most
