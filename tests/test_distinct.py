"""Blank images taken together: every image is in exactly one pass, and the gradient is that of all images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from dvrl_jax.choices import Choices
from dvrl_jax.envs import ActionSpec
from dvrl_jax.fast.distinct import Distinct, is_blank
from tests.golden import Recording
from tests.segments import assert_equal_up_to, last_gradient
from tests.tiny import tiny_pong

STEPS, ENVS = 6, 3
blanks = np_st.arrays(bool, (STEPS, ENVS))
rows_of = jax.jit(Distinct.rows, static_argnums=3)


def passes(blank, last, room):
    """All passes up to step `last`: of each, its rows and the steps in it."""
    distinct, step = Distinct.of(jnp.asarray(blank)), jnp.int32(0)
    while step < last:
        begin = int(step)
        rows, step = rows_of(distinct, step, jnp.int32(last), room)
        assert step > begin
        yield jax.tree.map(np.asarray, rows), range(begin, int(step))


@settings(deadline=None)
@given(blank=blanks, last=st.integers(1, STEPS), room=st.integers(ENVS, 3 * ENVS))
def test_every_distinct_image_is_in_one_pass(blank, last, room):
    done = []
    for rows, steps in passes(blank, last, room):
        images = rows.image[rows.used]
        expected = [
            step * ENVS + env
            for step in steps
            for env in range(ENVS)
            if not blank[step, env] or not blank[step, :env].any()
        ]
        assert images.tolist() == expected
        np.testing.assert_array_equal(rows.step[rows.used], images // ENVS)
        done += steps
        if steps.stop < last:  # The next step did not fit.
            following = blank[steps.stop]
            assert len(expected) + np.sum(~following) + following.any() > room
    assert done == list(range(last))


@settings(deadline=None)
@given(blank=blanks, x=np_st.arrays(np.float32, (STEPS, ENVS, 2), elements=st.floats(-1, 1, width=32)))
def test_sums_and_shares_are_those_of_all_images(blank, x):
    sums = np.asarray(Distinct.of(jnp.asarray(blank)).merged(jnp.asarray(x)))
    for rows, steps in passes(blank, STEPS, 2 * ENVS):
        picked = np.where(rows.used[:, None], sums[rows.image], 0)
        for step in steps:
            mine = (rows.step == step) & rows.used
            np.testing.assert_allclose(picked[mine].sum(0), x[step].sum(0), atol=1e-5)
            for row in np.flatnonzero(mine):
                alike = blank[step].sum() if blank.reshape(-1)[rows.image[row]] else 1
                np.testing.assert_allclose(rows.shares[row] @ picked, alike * x[step].mean(0), atol=1e-5)
        assert not rows.shares[~rows.used].any()
        assert not rows.shares[:, ~rows.used].any()


def test_only_zeros_are_blank():
    obs = np.zeros((3, 2, 2, 1), np.uint8)
    obs[1, 0, 1] = 1
    assert is_blank(obs).tolist() == [True, False, True]


def flickering_images(num_steps):
    """Random images, a good half of them blank: in one step all, in another none."""
    rng = np.random.default_rng(0)
    shape = (num_steps + 1, ENVS)
    blank = rng.random(shape) < 0.6
    blank[2], blank[3] = True, False
    obs = np.where(blank[..., None, None, None], 0.0, rng.random((*shape, 16, 16, 1)))
    no_end = np.zeros((num_steps, ENVS), bool)
    return Recording(obs, rng.normal(size=(num_steps, ENVS)), no_end, ActionSpec(True, 2)), blank[:num_steps]


def test_gradient_is_that_of_every_image_by_itself():
    """In float64, across three segments, with passes across their borders and weights that changed in between."""
    segments, num_steps = 3, 2
    config = tiny_pong("rnn")
    config.bptt_segments, config.num_steps = segments, num_steps
    with jax.enable_x64(True):
        env, blank = flickering_images(segments * num_steps)
        taken = [steps for _, steps in passes(blank, segments * num_steps, ENVS * num_steps)]
        assert any(len(steps) > num_steps for steps in taken)
        use = Choices.of("cpu")
        together, outcomes = last_gradient(config, env, segments, use)
        obs = outcomes[-1].rollout.segment.timesteps.obs
        np.testing.assert_array_equal(jax.vmap(is_blank)(obs), blank[-num_steps:])
        apart, _ = last_gradient(config, env, segments, dataclasses.replace(use, distinct=False))
    assert_equal_up_to(1e-9, together, apart)
