"""Layers against NumPy transcriptions; initialisation; the number of parameters."""

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import mountain_hike_dvrl, pong_dvrl
from dvrl_jax import networks
from dvrl_jax import particle_filter as pf
from dvrl_jax.acting import make_agent
from dvrl_jax.agents.base import bind
from dvrl_jax.convolutions import ConvSpec
from dvrl_jax.envs import ActionSpec, ObservationSpec
from dvrl_jax.notes import recorded, replayed
from tests.tiny import normals


def stand_in(obs_shape, dtype, discrete, size):
    """What networks need to know of an environment."""
    return SimpleNamespace(observation=ObservationSpec(obs_shape, dtype), action=ActionSpec(discrete, size))


@pytest.mark.parametrize("size", [(84, 84), (32, 32), (16, 16), (5, 7), (30, 41)])
def test_decoder_puts_logits_and_targets_in_the_same_order(size):
    """Pixels that `to_blocks` does not mask out are the image's, each once, where `to_images` finds the logits."""
    shape, channels = (*size, 2), (3, 4, 5)
    features = np.prod(networks.encoded_shape(shape, channels))
    make = lambda: networks.ImageDecoder(shape, channels, True, rngs=nnx.Rngs(0))
    decoder = nnx.eval_shape(make)
    images = np.arange(1, 2 * np.prod(shape) + 1, dtype=np.int32).reshape(2, *shape)
    blocks, mask = jax.jit(decoder.to_blocks)(images)
    np.testing.assert_array_equal(jax.jit(decoder.to_images)(blocks), images)
    assert nnx.eval_shape(lambda: make()(jnp.zeros((2, features)))).shape == blocks.shape
    inside = np.ones(blocks.shape, bool) if mask is None else np.broadcast_to(mask == 1, blocks.shape)
    np.testing.assert_array_equal(np.sort(np.asarray(blocks)[inside]), images.ravel())
    assert not np.any(np.asarray(blocks)[~inside])


@pytest.mark.parametrize(
    "obs_shape, channels, expected",
    [
        ((84, 84, 1), (32, 64, 32), (7, 7, 32)),
        ((32, 32, 3), (32, 64, 16), (3, 3, 16)),
        ((16, 16, 1), (32, 64, 8), (1, 1, 8)),
        ((10, 10, 4), (16, 32, 8), (5, 5, 8)),
        ((30, 40, 3), (16, 32, 8), (3, 4, 8)),
        ((128, 96, 3), (16, 32, 8), (13, 9, 8)),
        ((2,), (64, 48), (48,)),
    ],
)
def test_encoded_shape(obs_shape, channels, expected):
    assert networks.encoded_shape(obs_shape, channels) == expected
    encode = lambda: networks.Encoder(obs_shape, channels, True, rngs=nnx.Rngs(0))(jnp.ones((2, *obs_shape)))
    assert nnx.eval_shape(encode).shape == (2, np.prod(expected))


@pytest.mark.parametrize(
    "obs_shape, channels",
    [((84, 4, 1), (1, 2, 3)), ((8, 8), (1, 2, 3)), ((84, 84, 1), (1, 2)), ((2,), (1, 2, 3))],
)
def test_observations_without_a_network_are_refused(obs_shape, channels):
    with pytest.raises(ValueError):
        networks.encoded_shape(obs_shape, channels)


SIDE = st.integers(5, 128)


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(SIDE, SIDE), colours=st.integers(1, 10), likelihood=st.sampled_from(["bernoulli", "normal"]))
def test_images_of_any_size_are_encoded_whole_and_decoded_to_their_size(size, colours, likelihood):
    """Every pixel reaches phi_o, nothing else does, and what is decoded has the image's size."""
    spec, channels = ObservationSpec((*size, colours), jnp.float32, likelihood), (2, 3, 4)

    def both(images):
        phi_o = networks.Encoder(spec.shape, channels, False, rngs=nnx.Rngs(0))(images)
        decoder = networks.make_decoder(spec, channels, False, rngs=nnx.Rngs(0))
        decoded = decoder(phi_o)
        if likelihood == "bernoulli":
            assert decoder.to_blocks(images)[0].shape == decoded.shape
            return phi_o, decoder.to_images(decoded)
        return phi_o, *(part.reshape(images.shape) for part in decoded)

    phi_o, *decoded = nnx.eval_shape(both, jnp.zeros((2, *spec.shape)))
    assert phi_o.shape == (2, np.prod(networks.encoded_shape(spec.shape, channels)))
    assert all(part.shape == (2, *spec.shape) for part in decoded)


def test_no_size_is_padded_by_more_than_a_stride_of_all_layers():
    for size in range(5, 129):
        for other in (5, 16, 64, 128):
            specs = networks.image_layers(size, other)
            sizes = networks.layer_sizes(size, specs)
            assert size <= sizes[0] < size + np.prod([spec.stride for spec in specs]) and sizes[-1] >= 1
            assert [spec.input_size(n) for spec, n in zip(specs, sizes[1:], strict=True)] == sizes[:-1]


def test_pixels_that_pad_an_image_count_nowhere():
    """The log probability is that of the image's own pixels; each has a gradient, on the way in too."""
    spec, channels = ObservationSpec((9, 6, 2), jnp.float32, "bernoulli"), (3, 4, 5)
    encoder = networks.Encoder(spec.shape, channels, False, rngs=nnx.Rngs(0))
    decoder = networks.make_decoder(spec, channels, False, rngs=nnx.Rngs(1))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(2, *spec.shape)), jnp.float32)

    @jax.jit
    def both(images):
        logits = decoder(encoder(images))
        blocks, mask = decoder.to_blocks(images)
        plain = decoder.to_images(logits)
        expected = jnp.sum(images * plain - jax.nn.softplus(plain), axis=(1, 2, 3))
        return pf.bernoulli_log_prob(blocks, logits, mask), expected, jax.grad(lambda x: encoder(x).sum())(images)

    actual, expected, gradient = both(images)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert np.all(np.any(gradient != 0, axis=(0, 3)))


@pytest.mark.parametrize(
    ("spec", "likelihood"),
    [
        (ObservationSpec((84, 84, 1), jnp.uint8), "bernoulli"),
        (ObservationSpec((50,), bool), "bernoulli"),
        (ObservationSpec((10, 10, 4), jnp.float32), "normal"),
        (ObservationSpec((3,), jnp.int32), "normal"),
        (ObservationSpec((3,), jnp.float32, "categorical"), "categorical"),
    ],
)
def test_the_distribution_of_observations_follows_from_their_type(spec, likelihood):
    assert spec.likelihood == likelihood


def test_a_distribution_that_no_decoder_has_is_refused():
    spec = ObservationSpec((8, 8, 1), jnp.float32, "categorical")
    with pytest.raises(ValueError, match="emission = 'categorical': must be one of bernoulli, normal here"):
        networks.make_decoder(spec, (1, 2, 3), False, rngs=nnx.Rngs(0))


# --- Linear, GRU, batch norm -----------------------------------------------------------------------------------------


def test_linear_on_blocks_is_linear_on_their_concatenation():
    layer = networks.Linear({"a": 3, "b": 4}, 6, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(6.0)
    a, b = normals(1, 5, 1, 3), normals(2, 5, 7, 4)  # `a` is shared by seven particles.
    kernel = np.concatenate([layer.kernel["a"][...], layer.kernel["b"][...]])
    expected = np.concatenate([np.broadcast_to(a, (5, 7, 3)), b], axis=-1) @ kernel + np.arange(6.0)
    np.testing.assert_allclose(layer(a=a, b=b), expected, atol=1e-5)
    np.testing.assert_allclose(layer.product(a=a) + layer(b=b), expected, atol=1e-5)


def test_several_steps_are_encoded_as_each_alone():
    """Values and gradients; batch norm takes each step's own mean and variance, and leaves its averages alone."""
    steps, shape = 3, (16, 16, 2)
    encoder = networks.Encoder(shape, (3, 4, 5), True, rngs=nnx.Rngs(0))
    networks.name_layers(encoder)
    graphdef, params, averages = nnx.split(encoder, nnx.Param, nnx.BatchStat)
    obs = jnp.asarray(normals(1, steps, 4, *shape), jnp.float32)

    phi, notes = jax.vmap(lambda obs: recorded(bind(graphdef, params, averages))(obs))(obs)
    cotangent = normals(2, *phi.shape).astype(np.float32)

    def alone(params):
        replay = lambda obs, notes: replayed(bind(graphdef, params, averages), notes)(obs)
        return jnp.sum(cotangent * jax.vmap(replay)(obs, notes))

    def together(params):
        bound = bind(graphdef, params, averages)
        value = replayed(bound, notes)(obs)
        return jnp.sum(cotangent * value), (value, nnx.state(bound, nnx.BatchStat))

    grads, (value, averages_after) = jax.jit(jax.grad(together, has_aux=True))(params)
    np.testing.assert_allclose(value, phi, atol=1e-5)
    assert not np.allclose(phi[0], phi[1], atol=0.1)
    jax.tree.map(np.testing.assert_array_equal, averages_after, averages)
    expected = jax.jit(jax.grad(alone))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, expected)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1


def test_gru_cell_is_pytorchs():
    """r, z, n in this order, both bias vectors, and the reset gate applied after W_hn h + b_hn."""
    hidden = 6
    cell = networks.GRUCell({"a": 3, "b": 2}, hidden, uniform=True, rngs=nnx.Rngs(0))
    a, b, h = normals(1, 4, 3), normals(2, 4, 2), normals(3, 4, hidden)
    x = np.concatenate([a, b], axis=-1)
    w_i = np.concatenate([cell.kernel_i["a"][...], cell.kernel_i["b"][...]]).astype(np.float64).T
    w_h, b_i, b_h = (np.asarray(p[...], np.float64) for p in (cell.kernel_h, cell.bias_i, cell.bias_h))
    w_ir, w_iz, w_in = w_i[:hidden], w_i[hidden : 2 * hidden], w_i[2 * hidden :]
    w_hr, w_hz, w_hn = w_h.T[:hidden], w_h.T[hidden : 2 * hidden], w_h.T[2 * hidden :]
    (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = np.split(b_i, 3), np.split(b_h, 3)
    expected = np.zeros((4, hidden))
    for i in range(4):
        r = 1 / (1 + np.exp(-(w_ir @ x[i] + b_ir + w_hr @ h[i] + b_hr)))
        z = 1 / (1 + np.exp(-(w_iz @ x[i] + b_iz + w_hz @ h[i] + b_hz)))
        n = np.tanh(w_in @ x[i] + b_in + r * (w_hn @ h[i] + b_hn))
        expected[i] = (1 - z) * n + z * h[i]
    np.testing.assert_allclose(cell(jnp.asarray(h), cell.product(a=a, b=b)), expected, atol=1e-6)


@pytest.fixture
def norm():
    norm = networks.BatchNorm(3)
    norm.scale[...], norm.bias[...] = jnp.array([1.0, 2.0, -0.5]), jnp.array([0.0, 1.0, 3.0])
    return norm


def batch(seed):
    """Numbers [8, 5, 3] with another mean and deviation in every channel."""
    return normals(seed, 8, 5, 3) * [1.0, 0.3, 4.0] + [0.0, 2.0, -5.0]


def test_batch_norm_uses_the_batchs_mean_and_biased_variance(norm):
    x = batch(1)
    mean, var = x.mean(axis=(0, 1)), x.var(axis=(0, 1))
    expected = (x - mean) / np.sqrt(var + 1e-5) * [1.0, 2.0, -0.5] + [0.0, 1.0, 3.0]
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)


def test_batch_norm_moves_its_averages_by_a_tenth_with_the_unbiased_variance(norm):
    x, y = batch(1), batch(2)
    norm(jnp.asarray(x, jnp.float32))
    mean, var = 0.1 * x.mean(axis=(0, 1)), 0.9 + 0.1 * x.reshape(-1, 3).var(axis=0, ddof=1)
    np.testing.assert_allclose(norm.mean[...], mean, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    norm(jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(norm.mean[...], 0.9 * mean + 0.1 * y.mean(axis=(0, 1)), atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 * var + 0.1 * y.reshape(-1, 3).var(axis=0, ddof=1), rtol=1e-5)


def test_batch_norm_with_running_averages_uses_and_keeps_them(norm):
    norm.mean[...], norm.var[...] = jnp.array([1.0, -1.0, 0.5]), jnp.array([4.0, 0.25, 9.0])
    norm.use_running_average = True
    x = batch(1)
    expected = (x - [1.0, -1.0, 0.5]) / np.sqrt(np.array([4.0, 0.25, 9.0]) + 1e-5) * [1.0, 2.0, -0.5] + [0.0, 1.0, 3.0]
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)
    np.testing.assert_array_equal(norm.mean[...], [1.0, -1.0, 0.5])
    np.testing.assert_array_equal(norm.var[...], [4.0, 0.25, 9.0])


def test_gradient_passes_through_the_batchs_statistics(norm):
    """With batch statistics a channel's outputs always add up to the same: no gradient. With fixed ones there is."""
    x = jnp.asarray(batch(1), jnp.float32)

    def gradient(use_running_average):
        graphdef, state = nnx.split(norm)

        def total(x):
            copy = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
            copy.use_running_average = use_running_average
            return jnp.sum(copy(x))

        return jax.grad(total)(x)

    np.testing.assert_allclose(gradient(False), 0, atol=1e-5)
    np.testing.assert_allclose(gradient(True), np.broadcast_to([1.0, 2.0, -0.5], x.shape), rtol=1e-4)


@pytest.mark.parametrize("steps", [0, 1])
def test_batch_norms_gradient_is_that_of_its_formula(steps):
    """In double precision, for x, scale and bias; each of several steps is normalised by itself."""
    axes = tuple(range(steps, 3))

    def formula(x, scale, bias):
        mean, var = jnp.mean(x, axes, keepdims=True), jnp.var(x, axes, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    def normalised(x, scale, bias):
        stats = jax.lax.stop_gradient((jnp.mean(x, axes), jnp.var(x, axes)))
        return networks.normalise(x, scale, bias, *stats, jax.lax.stop_gradient(scale), jax.lax.stop_gradient(bias))

    with jax.enable_x64(True):
        x, cotangent = (jnp.asarray(np.stack([batch(i), batch(i + 1)]) * [1.0, 2.0, 3.0]) for i in (1, 3))
        scale, bias = jnp.array([1.0, 2.0, -0.5]), jnp.array([0.0, 1.0, 3.0])
        expected, expected_vjp = jax.vjp(formula, x, scale, bias)
        actual, vjp = jax.vjp(normalised, x, scale, bias)
        np.testing.assert_allclose(actual, expected, atol=1e-12)
        for ours, theirs in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-10)


def test_batch_norm_has_the_old_scales_value_and_the_new_ones_gradient():
    x, new, old, zero = jnp.asarray(batch(1), jnp.float32), jnp.full(3, 2.0), jnp.full(3, 5.0), jnp.zeros(3)
    stats = jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))
    weights = jnp.asarray(normals(2, *x.shape), jnp.float32)
    total = lambda x, scale, old_scale: jnp.sum(weights * networks.normalise(x, scale, zero, *stats, old_scale, zero))
    np.testing.assert_allclose(total(x, new, old), total(x, old, old), rtol=1e-5)
    np.testing.assert_allclose(total(x, new, old), 2.5 * total(x, new, new), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(total)(x, new, old), jax.grad(total)(x, new, new), atol=1e-5)


# --- Initialisation --------------------------------------------------------------------------------------------------


def assert_orthogonal(matrix, gain):
    """The fewer of the rows and columns are orthogonal and have norm `gain`."""
    matrix = np.asarray(matrix, np.float64)
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    np.testing.assert_allclose(matrix @ matrix.T, gain**2 * np.eye(len(matrix)), atol=1e-5 * gain**2)


def rows(kernel):
    """A kernel's blocks as the one matrix that they are parts of."""
    return np.concatenate([block[...] for block in kernel.values()])


@pytest.mark.parametrize("inputs, features", [({"a": 30, "b": 20}, 40), ({"a": 6, "b": 9}, 40)])
def test_linear_is_orthogonal_over_all_its_inputs_together(inputs, features):
    layer = networks.Linear(inputs, features, rngs=nnx.Rngs(0))
    assert_orthogonal(rows(layer.kernel), np.sqrt(2))
    np.testing.assert_array_equal(layer.bias[...], np.zeros(features))
    assert [block.shape for block in layer.kernel.values()] == [(size, features) for size in inputs.values()]


@pytest.mark.parametrize(
    "channels, features, spec", [(3, 8, ConvSpec(4, 2)), (1, 32, ConvSpec(4, 2)), (2, 40, ConvSpec(3, 1))]
)
def test_convolutions_are_orthogonal_over_features_and_transposed_ones_over_channels(channels, features, spec):
    conv = networks.Conv(channels, features, spec, rngs=nnx.Rngs(0))
    assert conv.kernel.shape == (spec.kernel, spec.kernel, channels, features)
    # PyTorch's (out, in * k * k) up to the order of columns, which does not matter to orthogonality.
    assert_orthogonal(np.moveaxis(conv.kernel[...], -1, 0).reshape(features, -1), np.sqrt(2))
    transposed = networks.ConvTranspose(features, channels, spec, rngs=nnx.Rngs(0))
    assert transposed.kernel.shape == (features, spec.kernel, spec.kernel, channels)
    assert_orthogonal(np.asarray(transposed.kernel[...]).reshape(features, -1), np.sqrt(2))
    np.testing.assert_array_equal(conv.bias[...], np.zeros(features))
    np.testing.assert_array_equal(transposed.bias[...], np.zeros(channels))


def test_gru_is_orthogonal_with_gain_one_on_its_full_matrices():
    cell = networks.GRUCell({"a": 7, "b": 20}, 16, rngs=nnx.Rngs(0))
    assert_orthogonal(rows(cell.kernel_i), 1.0)
    assert cell.kernel_h.shape == (16, 48)
    assert_orthogonal(cell.kernel_h[...], 1.0)
    np.testing.assert_array_equal(cell.bias_i[...], np.zeros(48))
    np.testing.assert_array_equal(cell.bias_h[...], np.zeros(48))


def test_a_gru_with_a_bias_on_its_update_gate_remembers():
    cell = networks.GRUCell({"x": 2}, 4, update_bias=math.log(30), rngs=nnx.Rngs(0))
    cell.kernel_h[...] = jnp.zeros((4, 12))
    h = jnp.full((1, 4), 0.5)
    after = cell(h, jnp.zeros((1, 12)))  # z = 30/31, and the candidate is 0.
    np.testing.assert_allclose(after, h * 30 / 31, rtol=1e-5)


@pytest.fixture(scope="module")
def hike_agent():
    """DVRL for continuous actions and vector observations, with few particles."""
    c = mountain_hike_dvrl.get_config()
    c.model.h_dim, c.model.z_dim, c.model.channels, c.model.action_encoding = 32, 24, (20, 16), 12
    return nnx.jit(lambda key: make_agent(c, stand_in((2,), jnp.float32, False, 2), key))(jax.random.key(0))


def test_particle_gru_is_uniform(hike_agent):
    summary, hidden = hike_agent.summary, hike_agent.h_dim
    bound = 1 / np.sqrt(hidden)
    for name, x in (
        ("kernel_i", rows(summary.kernel_i)),
        ("kernel_h", summary.kernel_h[...]),
        ("bias_i", summary.bias_i[...]),
        ("bias_h", summary.bias_h[...]),
    ):
        x = np.asarray(x, np.float64).ravel() / bound
        assert np.max(np.abs(x)) <= 1 + 1e-6, name
        # A uniform on [-1, 1] has variance 1/3, and its square's variance is 1/5 - 1/9.
        assert abs(np.mean(x)) < 5 * np.sqrt(1 / 3 / x.size), name
        assert abs(np.mean(x**2) - 1 / 3) < 5 * np.sqrt((1 / 5 - 1 / 9) / x.size), name
    assert not np.array_equal(summary.bias_i[...], summary.bias_h[...])


def test_belief_gru_and_linear_layers_are_orthogonal_in_the_agent(hike_agent):
    assert_orthogonal(rows(hike_agent.gru.kernel_i), 1.0)
    assert_orthogonal(hike_agent.gru.kernel_h[...], 1.0)
    for name in ("proposal_hidden", "prior_hidden", "emission_hidden", "phi_z", "action_encoder", "value_head"):
        assert_orthogonal(rows(getattr(hike_agent, name).kernel), np.sqrt(2))


def test_continuous_policy_starts_near_zero_with_unit_deviation(hike_agent):
    assert_orthogonal(rows(hike_agent.policy_head.kernel), 0.01 * np.sqrt(2))
    np.testing.assert_array_equal(hike_agent.log_std[...], np.zeros(2))


def test_every_layer_gets_its_own_draw(hike_agent):
    assert not np.array_equal(rows(hike_agent.proposal.mean.kernel), rows(hike_agent.proposal.var.kernel))
    assert not np.array_equal(rows(hike_agent.proposal.mean.kernel), rows(hike_agent.prior.mean.kernel))


def test_number_of_parameters_on_pong_is_the_originals():
    env = stand_in((84, 84, 1), jnp.uint8, True, 6)
    agent = nnx.eval_shape(lambda: make_agent(pong_dvrl.get_config(), env, jax.random.key(0)))
    assert networks.count_parameters(nnx.state(agent, nnx.Param)) == 4_336_264


def test_orthogonal_matrices_under_vmap_are_those_drawn_alone_one_after_the_other():
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    draw = lambda key: networks.orthogonal(key, 6, 4, 2.0)
    many = jax.jit(jax.vmap(draw))(keys)
    for key, matrix in zip(keys, many, strict=True):
        np.testing.assert_allclose(matrix, draw(key), rtol=1e-5, atol=1e-6)
    # A decomposition of a batch of them waits for ever on a CPU of two threads (JAX 0.10.2).
    program = str(jax.make_jaxpr(jax.vmap(draw))(keys))
    assert "scan[" in program and " = qr[" in program
    assert not re.search(r"\[3,\d+,\d+\] = qr\[", program)
