"""Lineages: only particles with descendants are gone back through, and the gradient is the same as through all."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from dvrl_jax import acting
from dvrl_jax.choices import Choices
from dvrl_jax.envs import ActionSpec
from dvrl_jax.fast import lineages
from dvrl_jax.learner import make_learner
from tests.golden import Recording
from tests.segments import assert_equal_up_to, last_gradient
from tests.tiny import normals, tiny_config

SEGMENTS, STEPS, ENVS, PARTICLES, SIZE = 2, 3, 4, 5, 2
AT = (1, 2)


class Trace(NamedTuple):
    ancestors: jax.Array
    noise: jax.Array


def advance(weights, h, inputs, is_first, trace, notes):
    """A step in which weights, h, inputs, trace and notes all have a say, but h not where an episode begins."""
    h = jnp.where(is_first[:, None, None], 0.0, h)
    return jnp.tanh(h @ weights + inputs[:, None] * trace.noise) * notes


def moves(is_first):
    shape = (SEGMENTS, STEPS, ENVS, PARTICLES)
    ancestors = np.sort(np.random.default_rng(1).integers(PARTICLES, size=shape), axis=-1)
    trace = Trace(jnp.asarray(ancestors, jnp.int32), jnp.asarray(normals(2, *shape, SIZE)))
    everywhere = jnp.broadcast_to(is_first, (SEGMENTS, STEPS, ENVS))
    h, notes = jnp.asarray(normals(3, ENVS, PARTICLES, SIZE)), jnp.asarray(normals(4, *shape, SIZE))
    return lineages.Moves(h, everywhere, trace, notes)


WEIGHTS, INPUTS, BEFORE = normals(5, SIZE, SIZE), normals(6, ENVS, SIZE), normals(7, SIZE, SIZE)


def through_all(weights, h, inputs, all_moves):
    """The same step, of all particles at once."""
    trace = jax.tree.map(lambda x: x[AT], all_moves.trace)
    inherited = jnp.take_along_axis(h, trace.ancestors[..., None], axis=1)
    return advance(weights, inherited, inputs, all_moves.is_first[AT], trace, all_moves.notes[AT])


@functools.cache
def both_ways(rows):
    """Compiled: the gradients by `go_back`, with that many rows in a pass, and through all particles at once."""

    def go_back(whole, broken, grad):
        _, vjp = jax.vjp(lambda *x: through_all(*x, whole), WEIGHTS, whole.h, INPUTS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lineages, "ROWS", rows)
            return lineages.go_back(advance, WEIGHTS, broken, AT, jnp.asarray(INPUTS), BEFORE, grad), vjp(grad)

    return jax.jit(go_back)


@pytest.mark.parametrize("rows", [1, 3, 80])
@settings(deadline=None, max_examples=20)
@given(live=np_st.arrays(bool, (ENVS, PARTICLES)), is_first=np_st.arrays(bool, ENVS), seed=st.integers(0, 9))
def test_a_step_is_gone_back_through_as_through_all(rows, live, is_first, seed):
    with jax.enable_x64(True):
        whole = moves(jnp.asarray(is_first))
        grad = jnp.where(live[..., None], normals(seed, ENVS, PARTICLES, SIZE), 0.0)
        grad = grad.at[0, :, 0].set(0.0)  # Which leaves others of the same particles.
        # Whoever has no descendants is not looked at.
        broken = whole._replace(notes=jnp.where(live[..., None], whole.notes, jnp.nan))
        back, (weights_grad, h_grad, inputs_grad) = both_ways(rows)(whole, broken, grad)
        np.testing.assert_allclose(back.weights, BEFORE + weights_grad, atol=1e-12)
        np.testing.assert_allclose(back.h, h_grad, atol=1e-12)
        np.testing.assert_allclose(back.inputs, inputs_grad, atol=1e-12)


def test_gradient_is_that_through_every_particle(monkeypatch):
    """Across three segments, in which episodes end and particles are killed."""
    segments, num_steps = 3, 2
    config = tiny_config("dvrl", bptt_segments=segments, num_steps=num_steps, model__num_particles=6)
    monkeypatch.setattr(lineages, "ROWS", 4)  # Several passes; what fits into one, test_choices.py has.
    steps, envs = segments * num_steps, config.num_envs
    ends = np.zeros((steps, envs), bool)
    ends[1, 0] = ends[2, 1] = True
    with jax.enable_x64(True):
        env = Recording(3.0 * normals(0, steps + 1, envs, 2), normals(1, steps, envs), ends, ActionSpec(False, 2))
        use = Choices.of("cpu")
        along_lineages, outcomes = last_gradient(config, env, segments, use)
        through_every, same_outcomes = last_gradient(config, env, segments, dataclasses.replace(use, lineages=False))
    killed, same_killed = (
        np.stack([outcome.metrics["particles.killed"] for outcome in found]) for found in (outcomes, same_outcomes)
    )
    np.testing.assert_array_equal(killed, same_killed)
    assert killed[:-1].any(axis=(1, 2)).all()
    assert_equal_up_to(1e-12, along_lineages, through_every)


@pytest.mark.parametrize(
    "fields",
    [{"model__batch_norm": True}, {"model__resample": False}, {"model__num_particles": 1}, {}],
    ids=["batch norm", "no resampling", "one particle", "plain"],
)
def test_only_particles_that_know_nothing_of_each_other_have_lineages(fields):
    config = tiny_config("dvrl", **fields)
    env = Recording(normals(0, 2, 3, 2), normals(1, 1, 3), np.zeros((1, 3), bool), ActionSpec(False, 2))
    assert lineages.apply_to(acting.make_agent(config, env, jax.random.key(0))) == (not fields)
    assert ("through_recurrence" in make_learner(config, env, Choices.of("cpu")).way_back) == (not fields)
