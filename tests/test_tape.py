"""Tapes: values come from the notes, gradients from the layers as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax.fast.distinct import Distinct
from dvrl_jax.tape import SIGMOID, SOFTPLUS, TANH, Player, Recorder, RowPlayer, Tape

STEPS = 3


def network(weights, x, tape):
    """Two layers, a loop with a layer of its own, and a sum."""
    hidden = jnp.tanh(tape(x @ weights["in"]))

    def step(h, x, tape):
        h = tape.bend(h @ weights["loop"] + x, TANH)
        return h, h

    h, hs = tape.scan(step, hidden, jnp.arange(float(STEPS)))
    return jnp.sum(tape(h @ weights["out"])) + jnp.sum(jnp.sin(hs))


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    sizes = {"in": (4, 5), "loop": (5, 5), "out": (5, 2)}
    weights = {name: jax.random.normal(key, size) for key, (name, size) in zip(keys, sizes.items(), strict=False)}
    return weights, jax.random.normal(keys[3], (7, 4))


def recorded(weights, x):
    tape = Recorder()
    return network(weights, x, tape), tape.notes


def test_played_under_the_same_weights_nothing_changes(case):
    value, notes = recorded(*case)
    expected = jax.value_and_grad(network)(*case, Tape())
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    weights, x = case
    played = jax.value_and_grad(lambda w: network(w, x, Player(notes)))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), played, expected)


def test_played_under_other_weights_activations_are_old_and_weights_new(case):
    """By hand, for y = sum(W2 tanh(W1 x)): dy/dW1 = x (W2_new * (1 - tanh(W1_old x)^2))."""
    rng = np.random.default_rng(0)
    x, old, new = rng.normal(size=(6, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    out_old, out_new = rng.normal(size=(4, 1)), rng.normal(size=(4, 1))

    def net(weights, tape):
        return jnp.sum(tape(jnp.tanh(tape(x @ weights[0])) @ weights[1]))

    tape = Recorder()
    value = net((old, out_old), tape)
    played, grads = jax.value_and_grad(lambda w: net(w, Player(tape.notes)))((jnp.asarray(new), jnp.asarray(out_new)))
    np.testing.assert_allclose(played, value, rtol=1e-6)
    activation = np.tanh(x @ old)
    np.testing.assert_allclose(grads[0], x.T @ (out_new.T * (1 - activation**2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], activation.sum(0)[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("curve", [SIGMOID, TANH, SOFTPLUS])
def test_slopes_of_curves_are_told_from_their_values(curve):
    x = jnp.linspace(-30.0, 30.0, 601)
    slope = jax.vmap(jax.grad(curve.value))(x)
    np.testing.assert_allclose(curve.slope(curve.value(x)), slope, rtol=1e-5, atol=1e-7)
    if curve is SOFTPLUS:  # Small variances have slopes as small, and those must be right in relation to them.
        np.testing.assert_allclose(curve.slope(curve.value(x)), slope, rtol=1e-5)


def test_slopes_of_curves_are_those_of_the_time_of_acting():
    rng = np.random.default_rng(1)
    x, old, new = rng.normal(size=(6, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    tape = Recorder()
    value = jnp.sum(tape.bend(x @ old, SIGMOID))
    played, grad = jax.value_and_grad(lambda w: jnp.sum(Player(tape.notes).bend(x @ w, SIGMOID)))(jnp.asarray(new))
    np.testing.assert_allclose(played, value, rtol=1e-6)
    y = 1 / (1 + np.exp(-x @ old))
    np.testing.assert_allclose(grad, x.T @ (y * (1 - y)), rtol=1e-4, atol=1e-6)


def test_no_gradient_flows_into_notes_and_what_is_noted_is_not_computed_again(case):
    weights, x = case
    _, notes = recorded(weights, x)
    grads = jax.grad(lambda notes: network(weights, x, Player(notes)))(notes)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))
    # Values alone need none of the three products.
    compiled = jax.jit(lambda w, notes: network(w, x, Player(notes))).lower(weights, notes).compile().as_text()
    assert " dot(" not in compiled and "dot_general" not in compiled


def test_rows_are_answered_with_the_notes_of_their_images_and_steps():
    rng = np.random.default_rng(2)
    of_images, of_steps = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5))
    blank = jnp.array([[False, True, True], [False, False, True]])
    rows, _ = Distinct.of(blank).rows(jnp.int32(0), jnp.int32(2), room=6)
    images, steps = [0, 1, 3, 4, 5], [0, 0, 1, 1, 1]
    tape = RowPlayer((of_images, of_images, of_steps), rows)
    x = jnp.zeros((6, 4))
    for answer in (tape(x), tape.bend(x, SIGMOID)):
        np.testing.assert_array_equal(answer[:5], of_images.reshape(6, 4)[images].astype(np.float32))
    np.testing.assert_array_equal(tape.then(x)[:5], of_steps[steps].astype(np.float32))
    with pytest.raises(NotImplementedError):
        tape.scan(None, x, x)
