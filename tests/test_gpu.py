"""What is done otherwise on a GPU, tried on any machine; and, where there is one, that it learns as a CPU does."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from benchmarks import kernels
from dvrl_jax import envs
from dvrl_jax.choices import Choices
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import compilation, process
from dvrl_jax.runs import config as config_lib
from tests.tiny import tiny_hike, tiny_pong

UPDATES = 7  # More than a window and less than two.


@pytest.fixture
def gpu_ways(monkeypatch):
    """XLA's options, and a learner's choices where nothing else is said, are those for a GPU from here on."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def learner_and_state(config, use=None):
    config = config_lib.finalise(config)
    learner = make_learner(config, envs.make_env(config.env, config.num_envs, 0), use)
    return learner, learner.init(jax.random.PRNGKey(0))


def print_first_losses():
    """For a process of its own: what JAX runs on, and the losses of the first updates, as JSON."""
    config = tiny_hike("dvrl")
    learner, state = learner_and_state(config)
    run, losses = compilation.jit(learner.run, config, use_cache=False), []
    for _ in range(UPDATES):
        state = run(state._replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics)), jnp.int32(1))
        losses.append(state.metrics.means()["loss.total"])
    print(json.dumps([jax.default_backend(), losses]))


def operations(learner, state):
    """The program for one update, operation by operation."""
    return str(jax.make_jaxpr(learner.run)(state, jnp.int32(1)))


@pytest.mark.parametrize("algorithm", ["dvrl", "rnn"])
def test_its_program_has_no_conditions_and_its_loop_over_particles_is_written_out(algorithm):
    """That it learns the same is tested in test_choices.py."""
    by_cpu, by_gpu = (
        operations(*learner_and_state(tiny_hike(algorithm), Choices.of(platform))) for platform in ("cpu", "gpu")
    )
    assert [" cond[" in each for each in (by_cpu, by_gpu)] == [True, False]
    unrolled = "unroll=3"  # As many as there are particles.
    assert [unrolled in each for each in (by_cpu, by_gpu)] == [False, algorithm == "dvrl"]


def test_an_update_that_is_not_finite_is_skipped():
    learner, start = learner_and_state(tiny_hike("rnn"), Choices.of("gpu"))
    broken = start._replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), start.params))
    end = jax.jit(learner.run)(broken, jnp.int32(1))
    assert (int(end.skipped), int(end.skipped_in_row)) == (1, 1)
    for kept in ("params", "batch_stats", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(end, kept), getattr(broken, kept))


def test_the_program_can_be_written_for_cuda_with_the_emulators_in_it():
    """As far as that goes without CUDA: every operation has a form there, and none of them calls Python."""
    learner, state = learner_and_state(tiny_pong("dvrl"), Choices.of("gpu"))
    text = jax.jit(learner.run).trace(state, jnp.int32(1)).lower(lowering_platforms=("cuda",)).as_text()
    called = re.findall(r"custom_call @(\w+)", text)
    assert {name.rsplit("_", 1)[1] for name in called} == {"send", "recv"}


@pytest.fixture
def cache_home(monkeypatch, tmp_path):
    """Programs are cached in here, as far as only the default says where."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_options(gpu_ways, cache_home, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compilation, "_is_known", lambda option, value: True)
    directory = cache_home / "dvrl_jax" / "compiled" / "tuning" / jaxlib.__version__
    assert compilation.options(tiny_hike("dvrl"), use_cache=False) == compilation.GPU_OPTIONS
    assert not directory.exists()
    assert compilation.options(tiny_hike("dvrl")) == compilation.GPU_OPTIONS | {compilation.TUNING: str(directory)}
    assert directory.is_dir()
    assert compilation.options() == compilation.options(tiny_hike("dvrl"))  # Of programs that do not train.
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert "xla_gpu_enable_triton_gemm" not in compilation.options(tiny_hike("dvrl"))


def test_where_nothing_can_be_kept_training_compiles_without(gpu_ways, cache_home, monkeypatch):
    monkeypatch.setattr(compilation, "_is_known", lambda option, value: True)
    (cache_home / "dvrl_jax").write_text("no directory")
    assert compilation.TUNING not in compilation.options(tiny_hike("dvrl"))


def test_xla_knows_the_options(gpu_ways, tmp_path):
    wanted = compilation.GPU_OPTIONS | {compilation.TUNING: str(tmp_path)}
    assert all(compilation._is_known(option, value) for option, value in wanted.items())


def test_time_when_kernels_overlap_counts_once():
    spans = [kernels.Span(*x) for x in (("b", 5, 10), ("a", 0, 10), ("c", 6, 2), ("d", 20, 1))]
    assert kernels.busy(spans) == 16
    assert kernels.busy([]) == 0
    assert [kernels.kind(name) for name in ("loop_add_fusion_12", "wrapped_add.3", "gemm<64>")] == [
        "loop_add_fusion",
        "wrapped_add",
        "gemm<64>",
    ]


def test_the_table_of_kernels(capsys):
    spans = [kernels.Span("add_1", 0, 1e6), kernels.Span("add_2", 2e6, 1e6), kernels.Span("copy", 4e6, 1e6)]
    kernels.print_table(spans, seconds=0.01, updates=2, top=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5.00 ms per update")
    assert "1.50 ms" in lines[1] and "30%" in lines[1]
    assert lines[2].split() == ["1.000", "ms", "1.0", "times", "add"]
    assert len(lines) == 3


def test_kernels_need_a_gpu():
    command = [sys.executable, "-m", "benchmarks.kernels", "--config=configs/mountain_hike_rnn.py"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: this needs a GPU; JAX runs on the cpu"


@pytest.mark.skipif(not process.may_use_gpu(), reason="there is no GPU")
def test_a_gpu_learns_what_a_cpu_learns():
    """Products in full precision; otherwise they are TF32."""

    def first_losses(**variables):
        environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "float32"} | variables
        root = Path(__file__).parents[1]
        command = [sys.executable, "-c", "from tests import test_gpu; test_gpu.print_first_losses()"]
        done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    (cpu, by_cpu), (gpu, by_gpu) = first_losses(JAX_PLATFORMS="cpu"), first_losses(JAX_PLATFORMS="cuda")
    assert (cpu, gpu) == ("cpu", "gpu")
    np.testing.assert_allclose(by_gpu, by_cpu, rtol=1e-5)
