"""Programs get the options that suit them, and the cache holds what it may hold, whatever was compiled before."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import dvrl_jax
from dvrl_jax import acting, envs
from dvrl_jax.errors import RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import compilation
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import playing, reconstructions
from tests.tiny import tiny_hike, tiny_pong, train

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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the option is for CPUs")
@pytest.mark.parametrize(
    ("config", "by_eigen"),
    [(tiny_hike("dvrl"), True), (tiny_hike("rnn"), False), (tiny_pong("dvrl"), False), (tiny_pong("rnn"), True)],
    ids=["dvrl on vectors", "rnn on vectors", "dvrl on images", "rnn on images"],
)
def test_products_of_some_models_are_not_given_to_ynnpack(config, by_eigen):
    x, kernel = jnp.ones((480, 128)), jnp.ones((128, 128))
    text = compilation.jit(lambda x, kernel: x @ kernel, config).lower(x, kernel).compile().as_text()
    assert ("ynn_fusion" not in text) == by_eigen


OPTION = next(iter(compilation.CPU_OPTIONS))


@pytest.mark.parametrize(("option", "value"), [("xla_cpu_no_such_option", "1"), (OPTION, "NO_SUCH_VALUE")])
def test_an_option_that_xla_does_not_know_is_left_out(option, value, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(compilation, "CPU_OPTIONS", {option: value})
    assert compilation.options(tiny_hike("dvrl")) == {}
    assert compilation.jit(lambda x, y: x + y, tiny_hike("dvrl"))(jnp.ones(()), 1.0) == 2


def test_an_option_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("XLA_FLAGS", f"--{OPTION}=LIBRARY_FUSION_TYPE_DOT")
    assert compilation.options(tiny_hike("dvrl")) == {}


def test_programs_that_do_not_train_get_options_too(monkeypatch):
    config = config_lib.finalise(tiny_hike("dvrl"))
    env = envs.make_env(config.env, config.num_envs, 0)
    learner = make_learner(config, env)
    state = learner.init(jax.random.PRNGKey(0))
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    assert compilation.options() == {} or jax.default_backend() != "cpu"
    monkeypatch.setattr(compilation, "options", lambda *_: {"xla_no_such_option": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        playing.watch(agent, env, jax.random.PRNGKey(0), steps=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        reconstructions.make_reconstruct(learner.graphdef, (0, 1))(state)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counted as XLA writes it for CPUs")
def test_the_check_of_an_update_is_compiled_once():
    """Were it repeated for each array that depends on it, the program would be a third larger, DVRL's two thirds."""
    config = config_lib.finalise(tiny_hike("rnn"))
    learner = make_learner(config, envs.make_env(config.env, config.num_envs, 0))
    state = learner.init(jax.random.PRNGKey(0))
    text = jax.jit(learner.run).lower(state, jnp.int32(1)).compile().as_text()
    checked = jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.metrics.sums, state.actor))
    assert 0 < text.count(" is-finite(") <= 2 * len(checked)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU's compiler may refuse it before")
def test_a_program_that_does_not_fit_is_refused_before_it_is_called():
    compilation.check_memory(jax.jit(lambda x: x + 1).lower(1.0).compile())
    too_large = jax.jit(lambda x: x + jnp.zeros((10**6, 10**8))).lower(1.0).compile()
    with pytest.raises(RunError, match=r"at least 400,000\.0 GB of memory, and [\d.]+ GB are free; fewer env"):
        compilation.check_memory(too_large)


def test_memory_that_is_not_there_is_one_sentence(tmp_path):
    """Here the process may have 12 GB of addresses; the weights alone would take terabytes."""
    train = [sys.executable, "train.py", "--config=configs/mountain_hike_dvrl.py", f"--workdir={tmp_path}/run"]
    train += ["--config.model.h_dim=1000000", "--nocompilation_cache"]
    command = ["bash", "-c", 'ulimit -v 12000000 && exec "$@"', "bash", *train]
    root = Path(__file__).parent.parent
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=root, env=on_cpu, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    said = re.match(r"error: training needs at least [\d,.]+ GB of memory, and ([\d.]+) GB are free; ", result.stderr)
    assert float(said[1]) < 12 and result.stderr.count("\n") == 1
    assert "fewer environments, particles" in result.stderr


@pytest.mark.parametrize("algorithm", ["rnn", "dvrl"])
def test_64_bit_numbers_are_refused_before_training(algorithm, tmp_path):
    config = tiny_hike(algorithm)
    with jax.enable_x64(True):
        for begin in (lambda: train(tmp_path, config), lambda: dvrl_jax.make_train(config, dvrl_jax.make_env(config))):
            with pytest.raises(RunError, match=r"^JAX_ENABLE_X64: must be off \(0, or unset\), since"):
                begin()
    assert not (tmp_path / "config.json").exists()


def test_what_jax_lacks_is_one_sentence():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nAllocator dump")
    assert str(compilation.lack_of_memory(error)).startswith("Out of memory allocating 4 bytes; fewer environments")
    assert compilation.lack_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else")) is None


def test_without_a_device_or_compilation_nothing_begins(monkeypatch):
    def no_device():
        raise RuntimeError("Unable to initialize backend")

    with jax.disable_jit(), pytest.raises(RunError, match=r"^JAX_DISABLE_JIT: must be off \(0, or unset\), since"):
        compilation.check_settings()
    monkeypatch.setattr(jax, "devices", no_device)
    with pytest.raises(
        RunError, match=r"^(JAX_PLATFORMS=.*: JAX has no such device here; unset|JAX has no device here)"
    ):
        compilation.check_device()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("numpy_dtype_promotion", "strict", "must be unset, or no program here would run"),
        ("numpy_rank_promotion", "raise", "must be unset, or no program here would run"),
        ("transfer_guard_host_to_device", "disallow_explicit", "must be unset, or no program here would run"),
        ("compilation_cache_dir", "abc://x", "cannot be used"),
    ],
)
def test_settings_of_jax_under_which_nothing_runs_are_named(setting, value, message):
    before = getattr(jax.config, f"jax_{setting}")
    jax.config.update(f"jax_{setting}", value)
    try:
        with pytest.raises(RunError, match=rf"^JAX_{setting.upper()}={value}: {message}"):
            compilation.check_device()
    finally:
        jax.config.update(f"jax_{setting}", before)


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").touch()
    monkeypatch.setattr(compilation, "default_cache_directory", lambda: tmp_path / "cache" / "compiled")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for _ in range(2):
            with compilation.cached(True):
                assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    said = capsys.readouterr().err
    assert said.startswith("compiled programs are not kept: ") and said.count("\n") == 1
