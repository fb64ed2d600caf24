"""Notes: values come from the notes, gradients from the layers as they are; whatever does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import notes
from dvrl_jax.notes import SIGMOID, SOFTPLUS, TANH, NoteError, Notes, note, recorded, replayed
from tests.tiny import normals

STEPS = 3


def network(weights, x):
    """Two layers, a loop with a layer of its own, and a sum."""
    hidden = jnp.tanh(note(x @ weights["in"], "in"))

    def step(h, x):
        h = note(h @ weights["loop"] + x, "h", TANH)
        return h, h

    h, hs = notes.scan("loop", step, hidden, jnp.arange(float(STEPS)))
    return jnp.sum(note(h @ weights["out"], "out")) + jnp.sum(jnp.sin(hs))


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    sizes = {"in": (4, 5), "loop": (5, 5), "out": (5, 2)}
    weights = {name: jax.random.normal(key, size) for key, (name, size) in zip(keys, sizes.items(), strict=False)}
    return weights, jax.random.normal(keys[3], (7, 4))


def test_replayed_under_the_same_weights_nothing_changes(case):
    value, noted = recorded(network)(*case)
    expected = jax.value_and_grad(network)(*case)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    weights, x = case
    found = jax.value_and_grad(lambda w: replayed(network, noted)(w, x))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_several_steps_are_replayed_at_once(case):
    weights, x = case
    each = [recorded(lambda w, x: (network(w, x), network)[0])(weights, k * x)[1] for k in (1.0, 2.0)]
    together = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    expected = jax.grad(lambda w: network(w, x) + network(w, 2.0 * x))(weights)
    found = jax.grad(lambda w: replayed(network, together)(w, jnp.stack([x, 2.0 * x])))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_under_other_weights_activations_are_old_and_weights_new():
    """By hand, for y = sum(W2 tanh(W1 x)): dy/dW1 = x (W2_new * (1 - tanh(W1_old x)^2))."""
    x, old, new = normals(0, 6, 3), normals(1, 3, 4), normals(2, 3, 4)
    out_old, out_new = normals(3, 4, 1), normals(4, 4, 1)

    def net(weights):
        return jnp.sum(note(jnp.tanh(note(x @ weights[0], "first")) @ weights[1], "second"))

    value, noted = recorded(net)((old, out_old))
    found, grads = jax.value_and_grad(replayed(net, noted))((jnp.asarray(new), jnp.asarray(out_new)))
    np.testing.assert_allclose(found, value, rtol=1e-6)
    activation = np.tanh(x @ old)
    np.testing.assert_allclose(grads[0], x.T @ (out_new.T * (1 - activation**2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads[1], activation.sum(0)[:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [SIGMOID, TANH, SOFTPLUS])
def test_slopes_of_activations_are_told_from_their_values(activation):
    x = jnp.linspace(-30.0, 30.0, 601)
    slope = jax.vmap(jax.grad(activation.value))(x)
    np.testing.assert_allclose(activation.slope(activation.value(x)), slope, rtol=1e-5, atol=1e-7)
    if activation is SOFTPLUS:  # Small variances have slopes as small, and those must be right in relation to them.
        np.testing.assert_allclose(activation.slope(activation.value(x)), slope, rtol=1e-5)


def test_slopes_of_activations_are_those_of_the_time_of_acting():
    x, old, new = normals(5, 6, 3), normals(6, 3, 4), normals(7, 3, 4)
    function = lambda w: jnp.sum(note(x @ w, "y", SIGMOID))
    value, noted = recorded(function)(old)
    found, grad = jax.value_and_grad(replayed(function, noted))(jnp.asarray(new))
    np.testing.assert_allclose(found, value, rtol=1e-6)
    y = 1 / (1 + np.exp(-x @ old))
    np.testing.assert_allclose(grad, x.T @ (y * (1 - y)), rtol=1e-4, atol=1e-6)


def test_no_gradient_flows_into_notes_and_what_is_noted_is_not_computed_again(case):
    weights, x = case
    _, noted = recorded(network)(weights, x)
    grads = jax.grad(lambda noted: replayed(network, noted)(weights, x))(noted)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))
    # Values alone need none of the three products.
    compiled = jax.jit(lambda w, noted: replayed(network, noted)(w, x)).lower(weights, noted).compile().as_text()
    assert " dot(" not in compiled and "dot_general" not in compiled


def test_statistics_are_constants_and_those_of_acting():
    function = lambda x: jnp.sum(x * notes.note_statistic(lambda: jnp.mean(x), "mean"))
    x = jnp.arange(4.0)
    np.testing.assert_allclose(jax.grad(function)(x), np.full(4, 1.5))
    _, noted = recorded(function)(x)
    assert not noted.rows and float(noted.batch["mean"]) == 1.5
    np.testing.assert_allclose(jax.grad(replayed(function, noted))(10.0 * x), np.full(4, 1.5))
    assert notes.batch_means() is None and not notes.is_replay()
    inside = replayed(lambda: (notes.batch_means(), notes.is_replay()), Notes({}, {}), jnp.eye(2))()
    assert inside[1] and inside[0].shape == (2, 2)


@pytest.mark.parametrize(
    ("acted", "learned", "message"),
    [
        (
            lambda x: x,
            lambda x: note(x, "new"),
            r"note 'new': is asked for when learning, and was not taken while acting",
        ),
        (lambda x: note(x, "old"), lambda x: x, r"note 'old': was taken while acting, and is not asked for"),
        (lambda x: note(x, "a"), lambda x: note(x[:2], "a"), r"note 'a': has shape \(3,\), and \(2,\) when learning"),
        (lambda x: note(x, "a"), lambda x: note(note(x, "a"), "a"), r"note 'a': is asked for twice"),
        (lambda x: note(note(x, "b"), "b"), None, r"note 'b': is taken twice; tell the two apart with notes.scope"),
        (
            lambda x: jax.lax.map(lambda x: note(x, "c"), x),
            None,
            r"note 'c': is taken inside a loop or transformation of JAX's; use notes.scan",
        ),
        (lambda x: x, lambda x: notes.note_statistic(lambda: x, "mean"), r"note 'mean': is asked for when learning"),
    ],
    ids=["missing", "left over", "shape", "asked twice", "taken twice", "in a loop", "statistic"],
)
def test_a_note_that_does_not_fit_is_named(acted, learned, message):
    x = jnp.arange(3.0)
    with pytest.raises(NoteError, match=message):
        _, noted = recorded(acted)(x)
        replayed(learned, noted)(x)


def test_a_layer_that_is_called_twice_has_scopes():
    def twice(x):
        with notes.scope("first"):
            y = note(2.0 * x, "layer")
        with notes.scope("second"):
            return y + note(3.0 * x, "layer")

    value, noted = recorded(twice)(jnp.ones(2))
    assert set(noted.rows) == {"first.layer", "second.layer"} and float(value[0]) == 5.0
    np.testing.assert_array_equal(replayed(twice, noted)(jnp.zeros(2)), value)
    np.testing.assert_array_equal(twice(jnp.ones(2)), value)
