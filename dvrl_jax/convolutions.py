"""Convolutions, plain and transposed, as matrix products: XLA's CPU back end has no fast gradient for strided ones.

With stride s and kernel k = m * s, an image in blocks of s x s pixels turns both kinds into convolutions of stride 1
with m x m taps between blocks. Those are one product of all m*m taps at once, by shifted copies (`shifted_product`),
or, where that is faster, several smaller ones in tiles (`fast/tiles.py`). On a GPU the former go to the matrix units.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from dvrl_jax import choices

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """Kernel size, stride and padding of one square convolution; the stride must divide the kernel size."""

    kernel: int
    stride: int
    padding: int = 0

    def output_size(self, size: int) -> int:
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def input_size(self, size: int) -> int:
        """The least size of which this output is made: what the transposed convolution returns."""
        return (size - 1) * self.stride + self.kernel - 2 * self.padding


def conv(x: Array, kernel: Array, spec: ConvSpec) -> Array:
    """Convolution (cross-correlation) of x [N, H, W, C] with kernel [k, k, C, D]: [N, H', W', D]."""
    chex.assert_rank([x, kernel], 4)
    channels, features = kernel.shape[2:]
    s, m, p = spec.stride, spec.kernel // spec.stride, spec.padding
    height, width = (s * (spec.output_size(size) - 1 + m) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    blocks = space_to_depth(x[:, :height, :width], s)
    kernel = kernel.reshape(m, s, m, s, channels, features).transpose(0, 2, 1, 3, 4, 5)
    kernels = kernel.reshape(m, m, s * s * channels, features)
    tiles = _tiles_for(kernels, *(size // s - m + 1 for size in (height, width)))
    return tiles.conv(blocks, kernels) if tiles else shifted_conv(blocks, kernels)


def conv_transpose_blocks(x: Array, kernel: Array, spec: ConvSpec) -> Array:
    """Transposed convolution of x [N, H, W, C] with kernel [C, k, k, D], left in block order and unpadded.

    Returns [N, H+m-1, W+m-1, s*s*D] with s the stride and m = k / s: `depth_to_space(., s)` and cutting `padding`
    off each border give the image.
    """
    chex.assert_rank([x, kernel], 4)
    s, m = spec.stride, spec.kernel // spec.stride
    channels, features = kernel.shape[0], kernel.shape[-1]
    kernel = kernel.reshape(channels, m, s, m, s, features).transpose(1, 3, 0, 2, 4, 5)
    kernels = kernel.reshape(m, m, channels, s * s * features)
    tiles = _tiles_for(kernels, *x.shape[1:3])
    return tiles.conv_transpose(x, kernels) if tiles else shifted_conv_transpose(x, kernels)


def _tiles_for(kernels: Array, height: int, width: int):
    """The module that computes in tiles, if it is in use and faster for kernels [m, m, C, D]; else None.

    `height` and `width` are the smaller image's; tiles are for square ones.
    """
    if not choices.current().tiles or height != width:
        return None
    from dvrl_jax.fast import tiles

    return tiles if tiles.pay(kernels, height) else None


def space_to_depth(x: Array, block: int) -> Array:
    """Rearranges x [N, H, W, C] into [N, H/block, W/block, block*block*C]."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // block, block, width // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // block, width // block, block * block * channels)


def depth_to_space(x: Array, block: int) -> Array:
    """Inverse of `space_to_depth`: [N, H, W, block*block*C] to [N, H*block, W*block, C]."""
    n, height, width, depth = x.shape
    channels = depth // (block * block)
    x = x.reshape(n, height, width, block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height * block, width * block, channels)


def shifted_conv(x: Array, kernels: Array) -> Array:
    """y[i, j] = sum_ab x[i + a, j + b] @ kernels[a, b] for x [N, H, W, C], kernels [m, m, C, D]: [N, H-m+1, W-m+1, D].

    With all pixels of all images on one axis a neighbour is a fixed number of rows away. Results whose neighbours would
    lie in the next line or image are cut off.
    """
    n, height, width, channels = x.shape
    m, features = kernels.shape[0], kernels.shape[-1]
    offsets = _negated(_tap_offsets(m, width))
    rows = shifted_product(x.reshape(-1, channels), kernels.reshape(m * m, channels, features), offsets)
    return rows.reshape(n, height, width, features)[:, : height - m + 1, : width - m + 1]


def shifted_conv_transpose(x: Array, kernels: Array) -> Array:
    """y[i, j] = sum_ab x[i - a, j - b] @ kernels[a, b] for x [N, H, W, C], kernels [m, m, C, D]: [N, H+m-1, W+m-1, D].

    As `shifted_conv`; a border of zeros keeps lines and images apart.
    """
    m, channels, features = kernels.shape[0], *kernels.shape[-2:]
    x = jnp.pad(x, ((0, 0), (0, m - 1), (0, m - 1), (0, 0)))
    n, height, width, _ = x.shape
    offsets = _tap_offsets(m, width)
    rows = shifted_product(x.reshape(-1, channels), kernels.reshape(m * m, channels, features), offsets)
    return rows.reshape(n, height, width, features)


def _tap_offsets(taps: int, width: int) -> tuple[int, ...]:
    """How many rows apart a pixel and its neighbours (i, j), i and j < `taps`, are in images of this width."""
    return tuple(i * width + j for i in range(taps) for j in range(taps))


def _negated(offsets: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-offset for offset in offsets)


def _shifted(rows: Array, offset: int) -> Array:
    """Moves rows [R, C] down by `offset` (up if negative), filling up with 0."""
    return jax.lax.pad(rows, jnp.zeros((), rows.dtype), ((offset, -offset, 0), (0, 0, 0)))


def _shifted_copies(rows: Array, offsets: tuple[int, ...]) -> Array:
    """Copies of rows [R, C] moved down by each of T offsets (up if negative), side by side: [R, T*C], 0 outside."""
    count, before, after = rows.shape[0], max(0, *offsets), max(0, *(-offset for offset in offsets))
    padded = jnp.pad(rows, ((before, after), (0, 0)))
    return jnp.concatenate([padded[before - offset : before - offset + count] for offset in offsets], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted_product(rows: Array, kernels: Array, offsets: tuple[int, ...]) -> Array:
    """Convolution of a sequence: y[r] = sum_t rows[r - offsets[t]] @ kernels[t], rows outside being 0.

    It is one matrix product; shifted copies are made of whichever is thinner, its input or its output. The gradients
    are products of the same kind, with the opposite offsets.

    Args:
        rows: [R, C]. kernels: [T, C, D]. offsets: T integers.
    Returns:
        [R, D].
    """
    taps, channels, features = kernels.shape
    if channels <= features:
        return _shifted_copies(rows, offsets) @ kernels.reshape(taps * channels, features)
    products = rows @ jnp.moveaxis(kernels, 0, 1).reshape(channels, taps * features)
    return sum(_shifted(products[:, t * features : (t + 1) * features], offset) for t, offset in enumerate(offsets))


def _shifted_product_fwd(rows: Array, kernels: Array, offsets: tuple[int, ...]):
    return shifted_product(rows, kernels, offsets), (rows, kernels)


def _shifted_product_bwd(offsets: tuple[int, ...], residuals: tuple[Array, Array], grad: Array):
    rows, kernels = residuals
    taps, channels, features = kernels.shape
    rows_grad = shifted_product(grad, jnp.swapaxes(kernels, 1, 2), _negated(offsets))
    if channels <= features:
        kernels_grad = (_shifted_copies(rows, offsets).T @ grad).reshape(kernels.shape)
    else:
        product = rows.T @ _shifted_copies(grad, _negated(offsets))
        kernels_grad = jnp.moveaxis(product.reshape(channels, taps, features), 1, 0)
    return rows_grad, kernels_grad


shifted_product.defvjp(_shifted_product_fwd, _shifted_product_bwd)
