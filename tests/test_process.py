"""Small models leave threads alone, and new threads share one heap, which is kept."""

import os
import subprocess
import sys

import pytest

from dvrl_jax.runs import process
from dvrl_jax.runs.config import flatten
from tests.tiny import tiny_hike, tiny_pong


@pytest.mark.parametrize(
    ("config", "given", "has_gpu", "expected"),
    [
        (tiny_hike("rnn"), None, False, "1"),
        (tiny_hike("rnn"), "2", False, "2"),
        (tiny_hike("rnn"), None, True, None),
        (tiny_hike("dvrl"), None, False, None),
        (tiny_pong("rnn"), None, False, None),
    ],
)
def test_only_the_smallest_models_are_given_one_thread(config, given, has_gpu, expected, monkeypatch):
    monkeypatch.setattr(process, "may_use_gpu", lambda: has_gpu)
    monkeypatch.setenv("NPROC", "to be restored after the test")
    os.environ.pop("NPROC")
    if given is not None:
        os.environ["NPROC"] = given
    process.prepare(flatten(config))
    assert os.environ.get("NPROC") == expected


@pytest.mark.parametrize(
    ("plugin", "variables", "may"),
    [
        ("json", {}, True),
        ("json", {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "1"}, True),
        ("json", {"JAX_PLATFORMS": "cpu"}, False),
        ("json", {"JAX_PLATFORMS": "cpu,cuda"}, False),
        ("json", {"CUDA_VISIBLE_DEVICES": ""}, False),
        ("no_such_plugin", {}, False),
    ],
)
def test_a_gpu_is_used_if_it_is_there_and_jax_can_and_may(plugin, variables, may, monkeypatch, tmp_path):
    monkeypatch.setattr(process, "NVIDIA_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setattr(process, "CUDA_PLUGINS", ("no_such_plugin_either", plugin))
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not process.may_use_gpu()
    process.NVIDIA_DEVICE.touch()
    assert process.may_use_gpu() == may


@pytest.mark.parametrize(
    ("config", "is_kept"),
    [
        (tiny_pong("dvrl"), True),
        (tiny_pong("rnn"), False),
        (tiny_hike("dvrl"), False),
    ],
)
def test_one_heap_is_kept_where_working_memory_is_large(config, is_kept, monkeypatch):
    called = []
    monkeypatch.setattr(process, "keep_one_heap", lambda: called.append(True))
    process.prepare(flatten(config))
    assert not called
    process.settle(config)
    assert bool(called) == is_kept


COUNT_HEAPS = """
import ctypes, sys, threading
from dvrl_jax.runs import process

process.keep_one_heap()
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


COUNT_PAGE_FAULTS = """
import ctypes, resource
from dvrl_jax.runs import process

process.keep_one_heap()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p


def use(size=2**27):
    block = ctypes.c_void_p(libc.malloc(size))
    ctypes.memset(block, 1, size)
    libc.free(block)


use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
process.return_free_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

PAGES = 2**27 // os.sysconf("SC_PAGE_SIZE")

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc")


def run_with_options(program: str, **options: str) -> str:
    """What a program prints with these options of malloc's in its environment, and no others."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment | options).stdout


@on_linux
@pytest.mark.parametrize(("options", "heaps"), [({}, {1}), ({"MALLOC_ARENA_MAX": "5"}, {2, 3, 4, 5})])
def test_threads_share_one_heap(options, heaps):
    assert run_with_options(COUNT_HEAPS, **options).count("<heap nr=") in heaps


@on_linux
def test_large_blocks_are_kept_until_they_are_given_back():
    kept, given_back = map(int, run_with_options(COUNT_PAGE_FAULTS).split())
    assert kept < PAGES / 100 and given_back > PAGES / 2


@on_linux
@pytest.mark.parametrize(
    "options",
    [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}],
)
def test_options_of_the_user_stay(options):
    kept, _ = map(int, run_with_options(COUNT_PAGE_FAULTS, **options).split())
    assert kept > 5 * PAGES / 2


@pytest.mark.parametrize("program", ["train", "evaluate", "plot", "reproduce"])
def test_a_python_without_docstrings_is_refused(program):
    command = [sys.executable, "-OO", "-m", f"dvrl_jax.commands.{program}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: python -OO (or PYTHONOPTIMIZE=2): must be off") and done.stderr.count("\n") == 1
    )


def test_a_configuration_computes_nothing_before_threads_are_settled():
    """Gymnax computes when an environment is made, after which it is too late."""
    program = """
import os
from dvrl_jax.configs import gymnax
from dvrl_jax.runs import process, training
from dvrl_jax.runs.config import flatten

process.prepare(flatten(gymnax.get_config("CartPole-v1,rnn")) | {"num_seeds": 2})
import jax

assert os.environ["NPROC"] == "1" and jax.local_device_count() == min(2, len(os.sched_getaffinity(0)))
"""
    settings = {name: value for name, value in os.environ.items() if name != "NPROC"} | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=settings, check=True, timeout=120)
