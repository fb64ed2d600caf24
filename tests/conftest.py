"""Options shared by all tests."""

import gc
import os
import signal
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

# Python's collector would go through all of JAX's many objects again and again while programs are traced.
gc.set_threshold(100_000, 50, 100)

# Set before JAX is imported. The workers of pytest-xdist, and processes started by tests, inherit all this.
if "PYTEST_XDIST_WORKER" not in os.environ:
    # On a GPU: products as exact as a CPU's, and workers that share its memory.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Programs that several tests need are compiled once.
    _cache = tempfile.TemporaryDirectory(prefix="dvrl_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
    # Most of a test's time is compilation: leave out what makes the machine code fast. The programs stay the same.
    # DVRL_JAX_OPTIMISED=1 leaves it in, as users have it.
    if not int(os.environ.get("DVRL_JAX_OPTIMISED", "0")):
        quick = [
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_parallel_codegen_split_count=1",  # The workers share the processors already.
            # JAX 0.11 no longer knows this one, and XLA ends a process that has a flag which it does not know.
            *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
        ]
        if Path("/dev/nvidiactl").exists() and os.environ.get("JAX_PLATFORMS") != "cpu":
            # On a GPU it is the search for the fastest kernels that takes the time.
            quick = ["--xla_gpu_enable_triton_gemm=false", "--xla_gpu_autotune_level=0"]
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick])

# Files of tests that take minutes. They are handed to the workers first, so that no worker waits for one at the end.
LONGEST = ["agents", "resume", "learning", "evidence", "bptt", "parity", "seeds", "choices", "atari", "determinism"]
LONGEST += ["kill", "reproduce", "launchers", "truncation", "package"]


@pytest.fixture
def start():
    """Starts processes as `subprocess.Popen` does, which hear SIGHUP also where the tests run under nohup.

    What still runs after the test is killed.
    """
    started = []

    def start(*arguments, **options):
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        try:
            started.append(subprocess.Popen(*arguments, cwd=Path(__file__).parent.parent, **options))
        finally:
            signal.signal(signal.SIGHUP, before)
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return  # One process takes them in the order in which they were asked for.
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))  # A stable sort: order within files stays.


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        default=str(Path(__file__).parent / "golden"),
        help="folder of .npz files with reference numbers of the original (schema: tests/golden/README.md)",
    )


def pytest_generate_tests(metafunc):
    if "golden_path" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden-dir"))
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            raise pytest.UsageError(f"--golden-dir: there are no .npz files in {folder}")
        metafunc.parametrize("golden_path", paths, ids=[path.stem for path in paths], scope="module")
