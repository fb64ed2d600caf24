"""Convolutions, plain and transposed, as matrix products: XLA's CPU back end has no fast gradient for strided ones.

With stride s and kernel k = m * s, an image in blocks of s x s pixels turns both kinds into convolutions of stride 1
with m x m taps between blocks. Those are computed in one of two ways:

- by shifted copies: one product of all m*m taps at once (`shifted_product`);
- in tiles: the fewest multiplications for several neighbouring pixels at once (`tiled_conv`, after Winograd), 16
  products that are together 1.6 to 2.8 times smaller, at the price of sums before and after them.

On a GPU the products of the first kind go to the matrix units.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

Array = jax.Array
Square = Sequence[Sequence[Array]]  # Arrays by line and column.


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """Kernel size, stride and padding of one square convolution; the stride must divide the kernel size."""

    kernel: int
    stride: int
    padding: int = 0

    def output_size(self, size: int) -> int:
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


def conv(x: Array, kernel: Array, spec: ConvSpec) -> Array:
    """Convolution (cross-correlation) of x [N, H, W, C] with kernel [k, k, C, D]: [N, H', W', D]."""
    chex.assert_rank([x, kernel], 4)
    size, channels, features = spec.output_size(x.shape[1]), kernel.shape[2], kernel.shape[3]
    s, m, p = spec.stride, spec.kernel // spec.stride, spec.padding
    extent = s * (size - 1 + m)
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    blocks = space_to_depth(x[:, :extent, :extent], s)
    kernel = kernel.reshape(m, s, m, s, channels, features).transpose(0, 2, 1, 3, 4, 5)
    kernels = kernel.reshape(m, m, s * s * channels, features)
    return (tiled_conv if tiles_pay(kernels, size) else shifted_conv)(blocks, kernels)


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
    return (tiled_conv_transpose if tiles_pay(kernels, x.shape[1]) else shifted_conv_transpose)(x, kernels)


def matmul(x: Array, kernel: Array) -> Array:
    """Product of x [..., in] with kernel [in, out]: [..., out].

    All rows are put on one axis first: where the kernel's gradient sums over several axes, XLA's CPU back end copies
    and transposes operands.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = _turning_product(rows, kernel) if turning_pays(kernel) else rows @ kernel
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def turning_pays(kernel: Array) -> bool:
    """Whether gradients of a product's rows should be taken with a transposed copy of its kernel.

    XLA's CPU back end is up to 2.7 times slower where it has to transpose an operand on the way. All gradients of an
    update share one copy, which XLA makes before its loops.
    """
    return jax.default_backend() == "cpu" and kernel.size >= 2**18


@jax.custom_vjp
def _turning_product(rows: Array, kernel: Array) -> Array:
    return rows @ kernel


_turning_product.defvjp(
    lambda rows, kernel: (rows @ kernel, (rows, kernel)),
    lambda residuals, grad: (grad @ _whole(residuals[1].T), residuals[0].T @ grad),
)


def _whole(x: Array) -> Array:
    """x, computed once and kept: its first number is overwritten with itself.

    Otherwise XLA's CPU back end computes what is cheap again in every operation that reads it (16 sums, for tiles),
    and `optimization_barrier` is gone by the time that it decides so.
    """
    return jax.lax.dynamic_update_slice(x, x[(slice(1),) * x.ndim], (0,) * x.ndim)


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


# --- By shifted copies ------------------------------------------------------------------------------------------------


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


# --- In tiles ---------------------------------------------------------------------------------------------------------
#
# A filter of m taps gives t = 5 - m neighbouring values from 4 inputs d with 4 instead of m * t multiplications (S.
# Winograd, Arithmetic Complexity of Computations, 1980; for images, in both directions, A. Lavin and S. Gray, Fast
# Algorithms for Convolutional Neural Networks, CVPR 2016): y = A ((B d) * (G g)), with matrices that evaluate
# polynomials at 0, 1, -1 and infinity. Transposing A and B gives the transposed convolution, and the gradients.


def tiles_pay(kernels: Array, size: int) -> bool:
    """Whether tiles are faster than shifted copies for kernels [m, m, C, D]; `size` is the smaller image's side.

    The sums around the products cost C or D operations where a product costs C * D: with 16 channels on either side
    they outweigh what they save. Only measured on CPUs.
    """
    m, thinner = kernels.shape[0], min(kernels.shape[-2:])
    if jax.default_backend() != "cpu" or m not in (2, 3) or thinner < 32:
        return False
    return (4 * math.ceil(size / (5 - m))) ** 2 < (m * (size + m - 1)) ** 2


def tiled_conv(x: Array, kernels: Array) -> Array:
    """`shifted_conv` with fewer multiplications, for 2 x 2 or 3 x 3 kernels: [N, H, W, C] to [N, H-m+1, W-m+1, D]."""
    m = kernels.shape[0]
    size = x.shape[1] - m + 1
    products = _products(_read_windows(_fill_tiles(x, size, m), m), kernels)
    return _write_tiles(products, m)[:, :size, :size]


def tiled_conv_transpose(x: Array, kernels: Array) -> Array:
    """`shifted_conv_transpose` with fewer multiplications: [N, H, W, C] to [N, H+m-1, W+m-1, D]."""
    m = kernels.shape[0]
    size = x.shape[1]
    products = _products(_read_tiles(_fill_tiles(x, size, m), m), kernels)
    return _write_windows(products, m)[:, : size + m - 1, : size + m - 1]


def _fill_tiles(x: Array, size: int, taps: int) -> Array:
    """Pads x [N, H, W, C] at the end as much as whole tiles of `size` pixels per side need."""
    missing = -size % (5 - taps)
    return jnp.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)))


def _products(tiles: Square, kernels: Array) -> Square:
    """Products of 4 x 4 arrays [N, T, T, C] with the 4 x 4 kernels made of [m, m, C, D]: 4 x 4 arrays [N, T, T, D]."""
    kernels = [_mixed_taps(row) for row in _mixed_taps(kernels)]
    return [[matmul(*pair) for pair in zip(*line, strict=True)] for line in zip(tiles, kernels, strict=True)]


def _mixed_taps(g: Array) -> tuple[Array, ...]:
    """G g: the taps g [m, ...] of a filter as the factors of the 4 multiplications."""
    even, odd = (g[0], g[1]) if len(g) == 2 else (g[0] + g[2], g[1])
    return g[0], (even + odd) / 2, (even - odd) / 2, g[-1]


def _mixed_inputs(d: Sequence[Array]) -> tuple[Array, ...]:
    """B d."""
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]


def _mixed_inputs_adjoint(v: Sequence[Array]) -> tuple[Array, ...]:
    return v[0], v[1] - v[2] - v[3], v[1] + v[2] - v[0], v[3]


def _outputs(v: Sequence[Array], taps: int) -> tuple[Array, ...]:
    """A v."""
    if taps == 2:
        return v[0] + v[1] + v[2], v[1] - v[2], v[1] + v[2] + v[3]
    return v[0] + v[1] + v[2], v[1] - v[2] + v[3]


def _outputs_adjoint(y: Sequence[Array], taps: int) -> tuple[Array, ...]:
    if taps == 2:
        ends = y[0] + y[2]
        return y[0], ends + y[1], ends - y[1], y[2]
    return y[0], y[0] + y[1], y[0] - y[1], y[1]


def _adjoint_pair(forward: Callable, backward: Callable) -> tuple[Callable, Callable]:
    """Two linear maps f(x, taps), each made the gradient of the other.

    By itself JAX would add up 16 padded arrays, one for each strided slice.
    """

    def with_gradient(function: Callable, adjoint: Callable) -> Callable:
        result = jax.custom_vjp(function, nondiff_argnums=(1,))
        result.defvjp(lambda x, taps: (function(x, taps), None), lambda taps, _, grad: (adjoint(grad, taps),))
        return result

    return with_gradient(forward, backward), with_gradient(backward, forward)


def _read_windows(x: Array, taps: int) -> Square:
    """B of all windows of 4 x 4 pixels, t apart, of x [N, t*T+m-1, t*T+m-1, C]: 4 x 4 arrays [N, T, T, C]."""
    t = 5 - taps
    x, span = _whole(x), x.shape[1] - 3
    lines = _mixed_inputs([x[:, a : a + span : t] for a in range(4)])
    return [list(_mixed_inputs([line[:, :, b : b + span : t] for b in range(4)])) for line in lines]


def _write_windows(v: Square, taps: int) -> Array:
    """Adjoint of `_read_windows`: 4 x 4 arrays [N, T, T, C] to [N, t*T+m-1, t*T+m-1, C], sums where windows overlap."""
    columns = [_whole(_overlap(_mixed_inputs_adjoint(line), 2, taps)) for line in v]
    return _overlap(_mixed_inputs_adjoint(columns), 1, taps)


def _overlap(parts: Sequence[Array], axis: int, taps: int) -> Array:
    """Puts the 4 parts of windows, each with T along `axis`, where they belong, t*T+m-1 pixels, and adds them up."""
    t, count = 5 - taps, parts[0].shape[axis]
    pad = lambda x, before, after: jnp.pad(x, [(before, after) if a == axis else (0, 0) for a in range(x.ndim)])
    residues = [pad(parts[r], 0, 1) + pad(parts[r + t], 1, 0) if r + t < 4 else pad(parts[r], 0, 1) for r in range(t)]
    return jax.lax.slice_in_dim(_interleave(residues, axis), 0, t * count + taps - 1, axis=axis)


def _read_tiles(y: Array, taps: int) -> Square:
    """Adjoint of A for all tiles of t x t pixels of y [N, t*T, t*T, D]: 4 x 4 arrays [N, T, T, D]."""
    n, height, _, features = y.shape
    t = 5 - taps
    y = _whole(y).reshape(n, height // t, t, height // t, t, features)
    lines = _outputs_adjoint([y[:, :, i] for i in range(t)], taps)
    return [list(_outputs_adjoint([line[:, :, :, j] for j in range(t)], taps)) for line in lines]


def _write_tiles(v: Square, taps: int) -> Array:
    """A: 4 x 4 arrays [N, T, T, D] to tiles of t x t pixels, [N, t*T, t*T, D]."""
    columns = [_whole(_interleave(_outputs(line, taps), 2)) for line in v]
    return _interleave(_outputs(columns, taps), 1)


def _interleave(parts: Sequence[Array], axis: int) -> Array:
    """Takes turns between arrays along `axis`: the first of each, then the second of each, and so on."""
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return jnp.stack(parts, axis + 1).reshape(shape)


_read_windows, _write_windows = _adjoint_pair(_read_windows, _write_windows)
_write_tiles, _read_tiles = _adjoint_pair(_write_tiles, _read_tiles)
