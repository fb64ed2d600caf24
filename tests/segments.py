"""Gradients across the segments of a window, in float64, for tests that take them in two ways."""

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax import a2c


def last_gradient(config, env, segments, use=None):
    """The gradient of the last of some segments, with weights that changed in between; and the outcomes of all.

    `use` are the choices, the back end's by default. To be called with 64-bit numbers enabled.
    """
    learner = a2c.make_learner(config, env, use)
    state = learner.init(jax.random.PRNGKey(0))
    double = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
    params, stats = double(state.params), double(state.batch_stats)
    state = learner.restart(state._replace(params=params, batch_stats=stats), env.reset(None))
    actor, window = state.actor, state.window
    gradient, outcomes = jax.jit(learner.gradient), []
    for segment in range(segments):
        draws = learner.draw(jax.random.PRNGKey(segment))
        grads, outcome = gradient(params, stats, actor, window, segment, draws)
        actor, window = outcome.rollout.actor, window.put(outcome.rollout.segment, segment)
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        outcomes.append(outcome)
    return grads, outcomes


def assert_equal_up_to(share, grads, expected):
    """Both are in float64, and no number differs by more than that share of the expected gradient's norm."""
    whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected)))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, atol=share * whole)
