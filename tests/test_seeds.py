"""Seeds are a vmap: `make_train(...).pure` is a pure function of a key, and no loop's length depends on the seed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import dvrl_jax
from dvrl_jax.errors import RunError
from dvrl_jax.runs import config as config_lib
from tests.tiny import tiny_hike, tiny_pong

UPDATES, SEEDS = 6, 3  # Whole log intervals: for a rest the update is compiled a second time.


@functools.cache
def train_of(algorithm):
    config = config_lib.from_fields(config_lib.flatten(tiny_hike(algorithm, log__interval=3)))
    return dvrl_jax.make_train(config, dvrl_jax.make_env(config))


@functools.cache
def alone(algorithm):
    """Training of one seed, compiled once for all tests."""
    train = train_of(algorithm)
    return jax.jit(lambda key: train.pure(key, UPDATES))


@pytest.mark.parametrize("algorithm", ["rnn", "dvrl"])
def test_several_seeds_train_in_one_program_each_as_it_does_alone(algorithm):
    train = train_of(algorithm)
    keys = jax.random.split(jax.random.PRNGKey(0), SEEDS)
    states, metrics = jax.jit(jax.vmap(lambda key: train.pure(key, UPDATES)))(keys)
    assert metrics["update"].tolist() == [[3, 6]] * SEEDS
    assert metrics["loss.total"].shape == (SEEDS, 2) and np.isfinite(metrics["loss.total"]).all()
    assert np.isnan(metrics["result.true"]).all()  # No episode is over after 12 steps.
    assert states.update.tolist() == [UPDATES] * SEEDS
    for i, key in enumerate(keys):
        state, line = alone(algorithm)(key)
        for a, b in zip(*map(jax.tree.leaves, (state.params, states.params)), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(line["loss.total"], metrics["loss.total"][i], rtol=1e-4)
    kernels = np.asarray(jax.tree.leaves(states.params)[0])
    assert not np.allclose(kernels[0], kernels[1])


def test_pure_training_is_the_training_that_is_called():
    train = train_of("dvrl")
    expected, history = train(seed=4, num_updates=UPDATES)
    state, metrics = alone("dvrl")(jax.random.PRNGKey(4))
    for a, b in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert set(metrics) <= set(history[0])
    for name in ("loss.total", "env_steps", "particles.killed"):
        np.testing.assert_allclose(metrics[name], [line[name] for line in history], rtol=1e-4)


def loops(jaxpr):
    """The conditions of all loops in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation.params["cond_jaxpr"].jaxpr
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                yield from loops(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("algorithm", ["rnn", "dvrl"])
def test_no_loop_has_a_length_that_depends_on_the_seed(algorithm):
    train = train_of(algorithm)
    keys = jax.random.split(jax.random.PRNGKey(0), SEEDS)
    program = jax.make_jaxpr(jax.vmap(lambda key: train.pure(key, UPDATES)))(keys)
    conditions = list(loops(program.jaxpr))
    assert len(conditions) >= 2  # The way back through the window, recurrence and encoder.
    for condition in conditions:
        assert all(not variable.aval.shape for equation in condition.eqns for variable in equation.invars), condition
    if algorithm == "dvrl":  # With lineages, each seed has another number of particles to go back through.
        seeds = jax.vmap(lambda key: train._learner.run(train._learner.init(key), jnp.int32(2)))
        conditions = loops(jax.make_jaxpr(seeds)(keys).jaxpr)
        assert any(v.aval.shape for condition in conditions for e in condition.eqns for v in e.invars)


def test_atari_is_no_pure_function():
    config = tiny_pong("rnn")
    with pytest.raises(RunError, match="Pong: is no pure function, so it cannot be trained by `pure`"):
        dvrl_jax.make_train(config, dvrl_jax.make_env(config)).pure(jax.random.PRNGKey(0), 1)
