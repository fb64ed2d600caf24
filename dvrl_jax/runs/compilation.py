"""How programs are compiled: XLA's options, and JAX's persistent cache, from which they start at once the next time."""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jaxlib
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from dvrl_jax import memory
from dvrl_jax.errors import RunError
from dvrl_jax.runs.config import flatten, has_particles, sees_images

# XLA's CPU back end gives products and sums to YNNPACK, whose products gain little from a second thread. With this
# option it gets the sums alone, and products go to Eigen (`docs/performance.md`).
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# Kernels of a CUDA graph that need nothing of each other run at the same time; and products are cuBLAS's, because XLA's
# own would each be compiled in many variants to find the fastest (`docs/gpu.md`).
GPU_OPTIONS = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT", "xla_gpu_enable_triton_gemm": False}
# Several processes would share out the search for the fastest kernels, by a program's text. With EnvPool in them their
# programs have not the same text, since the pools' addresses are part of it.
OPTIONS_OF_SEVERAL = {"xla_gpu_shard_autotuning": False}
TUNING = "xla_gpu_per_fusion_autotune_cache_dir"
# Values of JAX's settings under which no program of this package runs, by the beginning of each.
REFUSED = {"numpy_dtype_promotion": "strict", "numpy_rank_promotion": "raise"}
REFUSED |= {f"transfer_guard{of}": "disallow" for of in ("", "_host_to_device", "_device_to_device", "_device_to_host")}


def jit(run: Callable, config, use_cache: bool = True, shardings: Any = None) -> jax.stages.Wrapped:
    """Training's program: `run`, a function of a state, which it donates, and a number, with the fastest options.

    `shardings` of the state that it returns; by default XLA's choice.
    """
    return jax.jit(run, donate_argnums=0, compiler_options=options(config, use_cache), out_shardings=shardings)


def options(config=None, use_cache: bool = True) -> dict[str, str | bool]:
    """XLA's options for training `config`, or, without one, for a program that does not train.

    On a CPU: `CPU_OPTIONS` for a belief of many particles on vectors and one of a single row on images. To particles on
    images they are no gain, and to a single row on vectors, which has one thread, a loss.

    On a GPU: `GPU_OPTIONS`, and of several processes `OPTIONS_OF_SEVERAL`. With `use_cache`, what XLA finds out about
    the fastest kernels is kept for the next start, also of programs that cannot be kept themselves (see `cached`).

    An option that this version of XLA does not know, or that the user has set in XLA_FLAGS, is left out.
    """
    wanted = {}
    if jax.default_backend() == "gpu":
        directory = tuning_directory() if use_cache else None
        wanted = GPU_OPTIONS | ({TUNING: str(directory)} if directory else {})
        wanted |= OPTIONS_OF_SEVERAL if jax.process_count() > 1 else {}
    elif jax.default_backend() == "cpu" and config and has_particles(flatten(config)) != sees_images(config):
        wanted = CPU_OPTIONS
    given = os.environ.get("XLA_FLAGS", "")
    return {option: value for option, value in wanted.items() if option not in given and _is_known(option, value)}


def check_settings() -> None:
    """Makes sure that JAX is set, as by environment variables, so that it can train; it initialises JAX's back end.

    Raises:
        RunError: numbers have 64 bits (weights and counters have 32, and would be mixed), nothing is compiled, or there
            is no such device.
    """
    if jax.config.jax_enable_x64:
        raise RunError("JAX_ENABLE_X64: must be off (0, or unset), since training uses 32-bit numbers")
    if jax.config.jax_disable_jit:
        raise RunError("JAX_DISABLE_JIT: must be off (0, or unset), since training is one compiled program")
    check_device()


def check_device() -> None:
    """Makes sure that JAX has a device, and no setting under which nothing here runs; it initialises JAX's back end.

    Raises:
        RunError: it has no device of the kind that it is told to use, or such a setting, or a cache in no file system.
    """
    for name, value in REFUSED.items():
        if str(given := getattr(jax.config, f"jax_{name}")).startswith(value):
            raise RunError(f"JAX_{name.upper()}={given}: must be unset, or no program here would run")
    cache = jax.config.jax_compilation_cache_dir
    if cache and "://" in cache:
        try:
            epath.Path(cache).exists()
        except Exception as error:  # Of whatever library reaches such file systems.
            raise RunError(f"JAX_COMPILATION_CACHE_DIR={cache}: cannot be used ({error})") from None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The latter where JAX was installed without that device.
        wanted = jax.config.jax_platforms
        if wanted is None:
            raise RunError(f"JAX has no device here ({error})") from None
        raise RunError(f"JAX_PLATFORMS={wanted}: JAX has no such device here; unset it, or set it to cpu") from None


def check_memory(program: jax.stages.Compiled) -> None:
    """Makes sure that what a program needs besides its arguments fits into the device, before it is called.

    Linux would grant more than there is and kill the process, or another one, when it is used.

    Raises:
        RunError: it does not.
    """
    sizes = program.memory_analysis()
    if sizes is not None:
        memory.check_size(sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes)


def lack_of_memory(error: jax.errors.JaxRuntimeError) -> RunError | None:
    """What to say if an error of JAX's is that memory could not be had; None if it is another one."""
    said = re.search(r"Out of memory.*", str(error))
    return RunError(f"{said[0].rstrip('.')}; {memory.LESS}") if said else None


@functools.cache
def _is_known(option: str, value: str | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def default_cache_directory() -> Path:
    """The user's cache directory for compiled programs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dvrl_jax" / "compiled"


def tuning_directory() -> Path | None:
    """Where XLA keeps what it finds out about the fastest kernels, in the cache; made if it is not there.

    One for each version of XLA, which does not check by itself which one wrote there. None if that is not possible, or
    if the cache is elsewhere (gs://...).
    """
    cache = str(jax.config.jax_compilation_cache_dir or default_cache_directory())
    if "://" in cache:
        return None
    directory = Path(cache) / "tuning" / jaxlib.__version__
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return directory


@functools.cache
def _can_be_written(directory: str) -> bool:
    """Whether programs can be kept there; if not, that is said once. JAX would warn at each program."""
    if "://" in directory:
        return True
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK | os.X_OK):
            return True
        reason = os.strerror(errno.EACCES)
    except OSError as error:
        reason = error.strerror
    print(f"compiled programs are not kept: {directory} cannot be written ({reason})", file=sys.stderr, flush=True)
    return False


@contextlib.contextmanager
def cached(enabled: bool) -> Iterator[None]:
    """Within it, programs are read from and written to the cache, or, if not `enabled`, neither.

    A program that steps EnvPool has the pool's address in it: it could never be found again, and every start would
    leave another useless entry. Such programs must be compiled with `enabled` False.

    A directory set by the environment variable JAX_COMPILATION_CACHE_DIR is respected.
    """
    before = {name: getattr(jax.config, name) for name in ("jax_enable_compilation_cache", "jax_compilation_cache_dir")}
    compilation_cache.reset_cache()  # JAX decides once whether the cache is used, unless it is made to forget.
    directory = str(before["jax_compilation_cache_dir"] or default_cache_directory())
    enabled = enabled and _can_be_written(directory)
    jax.config.update("jax_enable_compilation_cache", enabled)
    if enabled:
        jax.config.update("jax_compilation_cache_dir", directory)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
