"""The compilation cache holds what it may hold, whatever was compiled before; small models leave threads alone."""

import os

import jax
import jax.numpy as jnp
import pytest

from dvrl_jax import compilation
from tests.tiny import tiny_config, tiny_hike

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
    compilation.spare_threads(config)
    assert os.environ.get("NPROC") == expected
