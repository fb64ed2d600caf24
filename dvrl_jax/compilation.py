"""How programs are compiled: XLA's options, and JAX's persistent cache, from which they start at once the next time."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from dvrl_jax.config import sees_images

# XLA's CPU back end gives products and sums to YNNPACK, whose products gain little from a second thread. With this
# option it gets the sums alone, and products go to Eigen (`docs/performance.md`).
OPTION, SUMS_ALONE = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"


def jit(run: Callable, config) -> jax.stages.Wrapped:
    """Training's program: `run`, a function of a state, which it donates, and a number, with the fastest options."""
    return jax.jit(run, donate_argnums=0, compiler_options=options(config))


def options(config) -> dict[str, str]:
    """XLA's options for training `config` on a CPU: products by Eigen for DVRL on vectors and the RNN on images.

    To DVRL on images it is no gain, and to the RNN on vectors, which has one thread, a loss.

    An option that this version of XLA does not know, or that the user has set in XLA_FLAGS, is left out.
    """
    by_eigen = (config.algorithm == "dvrl") != sees_images(config)
    if not by_eigen or jax.default_backend() != "cpu":
        return {}
    if OPTION in os.environ.get("XLA_FLAGS", "") or not _is_known(OPTION, SUMS_ALONE):
        return {}
    return {OPTION: SUMS_ALONE}


@functools.cache
def _is_known(option: str, value: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value})()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def default_cache_directory() -> Path:
    """The user's cache directory for compiled programs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "dvrl_jax" / "compiled"


@contextlib.contextmanager
def cached(enabled: bool) -> Iterator[None]:
    """Within it, programs are read from and written to the cache, or, if not `enabled`, neither.

    A program that steps EnvPool has the pool's address in it: it could never be found again, and every start would
    leave another useless entry. Such programs must be compiled with `enabled` False.

    A directory set by the environment variable JAX_COMPILATION_CACHE_DIR is respected.
    """
    before = {name: getattr(jax.config, name) for name in ("jax_enable_compilation_cache", "jax_compilation_cache_dir")}
    compilation_cache.reset_cache()  # JAX decides once whether the cache is used, unless it is made to forget.
    jax.config.update("jax_enable_compilation_cache", enabled)
    if enabled and not before["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_directory()))
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
