"""Choices: how it is computed changes no result; the GPU's program can be traced and run on a CPU."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import envs
from dvrl_jax.choices import Choices
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import config as config_lib
from tests.tiny import tiny_hike, tiny_pong

CPU, GPU = Choices.of("cpu"), Choices.of("gpu")


@functools.cache
def configuration(name):
    """A smaller one of the four configurations; image networks with channels enough for tiles."""
    task, algorithm = name.split("_")
    if task == "hike":
        config = tiny_hike(algorithm, bptt_segments=3)
    else:
        config = tiny_pong(algorithm)
        config.env.p_blank, config.model.batch_norm, config.model.policy_batch_norm = 0.5, True, True
        config.model.channels = (4, 32, 32)
        # So many that there is always something to see: of a batch of blanks, batch norm would enlarge the rounding.
        config.num_envs = 8
    # Steps in proportion to the gradient: else the rounding of small ones would be steps of its own.
    config.optimizer.eps, config.optimizer.learning_rate = 1.0, 0.1
    return config_lib.from_fields(config_lib.flatten(config))


def after_updates(name, use, updates=3):
    """How far the weights have moved after some updates, and the losses of each."""
    config = configuration(name)
    learner = make_learner(config, envs.make_env(config.env, config.num_envs, seed=0), use)
    state, run, losses = learner.init(jax.random.PRNGKey(0)), jax.jit(learner.run), []
    start = state.params
    for _ in range(updates):
        state = run(state, jnp.int32(1))
        losses.append(float(state.metrics.sums["loss.total"]))
    return jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, start), losses


with_all = functools.cache(lambda name: after_updates(name, CPU))


def assert_same_updates(name, use):
    (moved, losses), (expected, expected_losses) = after_updates(name, use), with_all(name)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
    assert norm(jax.tree.map(np.subtract, moved, expected)) < 1e-3 * norm(expected)


def text(name, use):
    """The program of an update."""
    config = configuration(name)
    env = pool(name) if name.startswith("pong") else envs.make_env(config.env, config.num_envs, seed=0)
    learner = make_learner(config, env, use)
    state = jax.eval_shape(lambda key: learner.restart(learner._untrained(key, key), env.reset(key)), KEY)
    return jax.jit(learner.run).lower(state, jnp.int32(1)).as_text()


KEY = jax.random.PRNGKey(0)


@functools.cache
def pool(name):
    config = configuration(name)
    env = envs.make_env(config.env, config.num_envs, seed=0)
    state = env.reset(KEY)
    env.reset = lambda key: state
    return env


CHANGED = {"lineages": ["hike_dvrl"], "distinct": ["pong_rnn", "pong_dvrl"], "tiles": ["pong_rnn", "pong_dvrl"]}
ALL = ["hike_rnn", "hike_dvrl", "pong_rnn", "pong_dvrl"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("path", CHANGED)
def test_a_fast_path_can_be_deleted(path, name, monkeypatch):
    """Without its file, and switched off by its one setting, updates are the same, to rounding."""
    without = dataclasses.replace(CPU, **{path: False})
    if name in CHANGED[path]:
        with_all(name)
        monkeypatch.setitem(sys.modules, f"dvrl_jax.fast.{path}", None)
        monkeypatch.delattr(f"dvrl_jax.fast.{path}", raising=False)
        with pytest.raises(ImportError):
            text(name, CPU)
        assert_same_updates(name, without)
    else:
        expected = text(name, CPU)
        monkeypatch.setitem(sys.modules, f"dvrl_jax.fast.{path}", None)
        monkeypatch.delattr(f"dvrl_jax.fast.{path}", raising=False)
        assert text(name, without) == expected  # This path is not taken there: the program is the same.


@pytest.mark.parametrize("name", ["hike_dvrl", "pong_rnn"])
def test_the_program_of_a_gpu_can_be_run_on_a_cpu(name):
    program = text(name, GPU)
    assert "stablehlo.case" not in program and "stablehlo.if" not in program
    assert "stablehlo.case" in text(name, CPU) or "stablehlo.if" in text(name, CPU)
    assert_same_updates(name, GPU)


def test_choices_are_made_once_from_the_back_end():
    assert GPU != CPU and not GPU.lineages and not GPU.tiles and GPU.unroll > 1 and not GPU.conditionals
    assert not CPU.for_seeds().lineages and not CPU.for_seeds().distinct
    with pytest.raises(dataclasses.FrozenInstanceError):
        CPU.tiles = False
    config = configuration("hike_rnn")
    assert make_learner(config, envs.make_env(config.env, config.num_envs, seed=0)).choices == Choices.of(
        jax.default_backend()
    )
