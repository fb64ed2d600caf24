"""JAX's persistent compilation cache: a program compiled once starts at once the next time."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


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
