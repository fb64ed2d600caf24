"""The compilation cache holds what it may hold, whatever was compiled before."""

import jax
import jax.numpy as jnp

from dvrl_jax import compilation

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def test_programs_are_cached_only_where_allowed(tmp_path):
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in zip(SETTINGS, (str(tmp_path), 0.0), strict=True):
        jax.config.update(name, value)
    entries = lambda: len(list(tmp_path.glob("*-cache")))
    try:
        for number, enabled in enumerate((False, True, False, True)):
            count = entries()
            with compilation.cached(enabled):
                jax.jit(lambda x, number=number: jnp.sin(x) + number).lower(1.0).compile()
            assert (entries() > count) == enabled
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation.compilation_cache.reset_cache()
