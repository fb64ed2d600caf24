"""Both ways of computing convolutions, and the choice between them, against XLA's own convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dvrl_jax import convolutions, networks, products
from dvrl_jax.choices import Choices
from dvrl_jax.convolutions import ConvSpec
from dvrl_jax.fast import tiles
from dvrl_jax.networks import IMAGE_ENCODERS
from tests.tiny import normals

CHANNELS, FEATURES, BATCH = 3, 5, 2
WIDTHS = [pytest.param(CHANNELS, FEATURES, id="shifted copies"), pytest.param(33, 32, id="tiles where they pay")]
TWO_WAYS = {
    "plain": (tiles.conv, convolutions.shifted_conv),
    "transposed": (tiles.conv_transpose, convolutions.shifted_conv_transpose),
}


def image_layers():
    """(convolution, its input's side) for every layer of every image encoder."""
    layers = []
    for side, specs in IMAGE_ENCODERS.items():
        for spec in specs:
            layers.append(pytest.param(spec, side, id=f"{side}-{spec.kernel}_{spec.stride}_{spec.padding}"))
            side = spec.output_size(side)
    return layers


def conv_reference(x, kernel, spec):
    """Strided cross-correlation, by XLA."""
    padding = [(spec.padding, spec.padding)] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (spec.stride, spec.stride), padding, dimension_numbers=layout)


def conv_transpose_reference(x, kernel, spec):
    """Transposed convolution as PyTorch defines it: a correlation of the dilated input with the flipped kernel."""
    flipped = kernel.transpose(1, 2, 0, 3)[::-1, ::-1]
    border = spec.kernel - 1 - spec.padding
    return jax.lax.conv_general_dilated(
        x,
        flipped,
        (1, 1),
        [(border, border)] * 2,
        lhs_dilation=(spec.stride, spec.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def assert_same_function(function, reference, x, kernel):
    """Equal values and equal gradients for both arguments, in double precision."""

    @jax.jit
    def both(x, kernel, cotangent):
        expected, reference_vjp = jax.vjp(reference, x, kernel)
        actual, vjp = jax.vjp(function, x, kernel)
        return (actual, *vjp(cotangent)), (expected, *reference_vjp(cotangent))

    with jax.enable_x64(True):
        cotangent = normals(7, *jax.eval_shape(reference, x, kernel).shape)
        for actual, expected in zip(*both(x, kernel, cotangent), strict=True):
            assert actual.dtype == np.float64 and actual.shape == expected.shape
            assert np.max(np.abs(expected)) > 0.1
            np.testing.assert_allclose(actual, expected, atol=1e-10)


@pytest.mark.parametrize("channels, features", WIDTHS)
@pytest.mark.parametrize("spec, side", image_layers())
def test_conv_is_a_strided_convolution(spec, side, channels, features):
    x, kernel = normals(1, BATCH, side, side, channels), normals(2, spec.kernel, spec.kernel, channels, features)
    assert_same_function(
        lambda x, kernel: convolutions.conv(x, kernel, spec),
        lambda x, kernel: conv_reference(x, kernel, spec),
        x,
        kernel,
    )


@pytest.mark.parametrize("side", [21, 22, 23])
def test_conv_leaves_out_pixels_that_no_kernel_position_covers(side):
    spec = ConvSpec(8, 4)
    x, kernel = normals(1, BATCH, side, side, CHANNELS), normals(2, 8, 8, CHANNELS, FEATURES)
    assert_same_function(
        lambda x, kernel: convolutions.conv(x, kernel, spec),
        lambda x, kernel: conv_reference(x, kernel, spec),
        x,
        kernel,
    )


@pytest.mark.parametrize("channels, features", WIDTHS)
@pytest.mark.parametrize("spec, side", image_layers())
def test_conv_transpose_is_a_transposed_convolution(spec, side, channels, features):
    layer = nnx.eval_shape(lambda: networks.ConvTranspose(channels, features, spec, rngs=nnx.Rngs(0)))
    small = spec.output_size(side)
    x, kernel = normals(3, BATCH, small, small, channels), normals(4, channels, spec.kernel, spec.kernel, features)

    def image(x, kernel):
        return layer.unblock(convolutions.conv_transpose_blocks(x, kernel, spec))

    assert_same_function(image, lambda x, kernel: conv_transpose_reference(x, kernel, spec), x, kernel)
    assert jax.eval_shape(image, x, kernel).shape == (BATCH, side, side, features)


def test_layers_add_their_bias_to_every_pixel():
    spec = ConvSpec(4, 2, 1)
    conv = networks.Conv(CHANNELS, FEATURES, spec, rngs=nnx.Rngs(0))
    transposed = networks.ConvTranspose(CHANNELS, FEATURES, spec, rngs=nnx.Rngs(1))
    for layer, reference in ((conv, conv_reference), (transposed, conv_transpose_reference)):
        layer.bias[...] = jnp.arange(1.0, FEATURES + 1)
        x = jnp.asarray(normals(5, BATCH, 8, 8, CHANNELS), jnp.float32)
        expected = reference(x, layer.kernel[...], spec) + np.arange(1.0, FEATURES + 1)
        np.testing.assert_allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("width", [7, 1024])
def test_matmul_of_several_axes_with_small_and_large_kernels(width):
    """Gradients of a large kernel's rows are taken with a transposed copy of it."""
    x, kernel = normals(1, 2, 3, 256), normals(2, 256, width)
    assert products.transposed_pays(kernel) == (width == 1024 and jax.default_backend() == "cpu")
    assert_same_function(products.matmul, lambda x, kernel: jnp.einsum("abi,io->abo", x, kernel), x, kernel)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_depth_to_space_undoes_space_to_depth(block):
    x = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    blocks = np.asarray(convolutions.space_to_depth(jnp.asarray(x), block))
    assert blocks.shape == (2, 8 // block, 12 // block, block * block * 3)
    np.testing.assert_array_equal(blocks[1, 1, 2], x[1, block : 2 * block, 2 * block : 3 * block].ravel())
    np.testing.assert_array_equal(convolutions.depth_to_space(jnp.asarray(blocks), block), x)


@pytest.mark.parametrize("size", [4, 5, 6, 7])
@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("way", TWO_WAYS)
def test_tiles_give_what_shifted_copies_give(way, taps, size):
    """For whole tiles and for parts of one."""
    x, kernels = normals(1, BATCH, size, size, CHANNELS), normals(2, taps, taps, CHANNELS, FEATURES)
    assert_same_function(*TWO_WAYS[way], x, kernels)


@pytest.mark.parametrize("way", TWO_WAYS)
def test_tiles_are_as_exact_as_shifted_copies_in_single_precision(way):
    """For the size of the largest layers of Pong; sums before the products cost no digit."""
    x, kernels = normals(1, 4, 9, 9, 64).astype(np.float32), normals(2, 2, 2, 64, 64).astype(np.float32)
    tiled, shifted = (np.asarray(jax.jit(function)(x, kernels)) for function in TWO_WAYS[way])
    with jax.enable_x64(True):
        exact = np.asarray(TWO_WAYS[way][1](x.astype(np.float64), kernels.astype(np.float64)))
    scale = np.abs(exact).max()
    assert np.abs(shifted - exact).max() / scale < 1e-6
    assert np.abs(tiled - exact).max() / scale < 2e-6


def test_large_layers_of_pong_go_in_tiles_and_thin_ones_do_not():
    ways = {}
    for name, taps, channels, features, size in [
        ("encoder 1", 2, 16, 32, 20),
        ("encoder 2", 2, 128, 64, 9),
        ("encoder 3", 3, 64, 32, 7),
        ("decoder 1", 3, 32, 64, 7),
        ("decoder 2", 2, 64, 128, 9),
        ("decoder 3", 2, 32, 16, 20),
    ]:
        ways[name] = tiles.pay(jnp.zeros((taps, taps, channels, features)), size)
    assert [name for name, in_tiles in ways.items() if not in_tiles] == ["encoder 1", "decoder 3"]
    assert not tiles.pay(jnp.zeros((4, 4, 64, 64)), 1)  # The last layer for images of 16 x 16.


@pytest.mark.parametrize(("platform", "expected"), [("cpu", tiles), ("gpu", None), ("tpu", None)])
def test_tiles_are_for_cpus(platform, expected):
    with Choices.of(platform).in_use():
        assert convolutions._tiles_for(jnp.zeros((2, 2, 128, 64)), 9, 9) is expected
        assert convolutions._tiles_for(jnp.zeros((2, 2, 128, 64)), 9, 10) is None


@pytest.mark.parametrize("layer", ["conv", "transposed"])
def test_tiles_have_fewer_multiplications(layer):
    """Counted in the program, for the second layer of Pong's encoder and its mirror in the decoder."""
    x = jnp.zeros((1, 10, 10, 128)) if layer == "conv" else jnp.zeros((1, 9, 9, 64))
    kernels = jnp.zeros((2, 2, x.shape[-1], 64 if layer == "conv" else 128))
    tiled, shifted = TWO_WAYS["plain" if layer == "conv" else "transposed"]

    def multiplications(function):
        total = 0
        for equation in jax.make_jaxpr(function)(x, kernels).jaxpr.eqns:
            for inner in [equation, *getattr(equation.params.get("call_jaxpr"), "eqns", [])]:
                if inner.primitive.name == "dot_general":
                    total += inner.outvars[0].aval.size * inner.invars[0].aval.shape[-1]
        return total

    assert multiplications(tiled) == 16 * 9 * 128 * 64
    assert multiplications(shifted) == 100 * 4 * 128 * 64
