"""Convolutions in tiles: the fewest multiplications for several neighbouring pixels at once, on a CPU.

A filter of m taps gives t = 5 - m neighbouring values from 4 inputs d with 4 instead of m * t multiplications (S.
Winograd, Arithmetic Complexity of Computations, 1980; for images, in both directions, A. Lavin and S. Gray, Fast
Algorithms for Convolutional Neural Networks, CVPR 2016): y = A ((B d) * (G g)), with matrices that evaluate
polynomials at 0, 1, -1 and infinity. Transposing A and B gives the transposed convolution, and the gradients.

The 16 products are together 1.6 to 2.8 times smaller than one of shifted copies, at the price of sums before and after.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dvrl_jax.products import materialised, matmul

Array = jax.Array
Square = Sequence[Sequence[Array]]  # Arrays by line and column.


def pay(kernels: Array, size: int) -> bool:
    """Whether tiles are faster than shifted copies for kernels [m, m, C, D]; `size` is the smaller image's side.

    The sums around the products cost C or D operations where a product costs C * D: with 16 channels on either side
    they outweigh what they save.
    """
    m, thinner = kernels.shape[0], min(kernels.shape[-2:])
    if m not in (2, 3) or thinner < 32:
        return False
    return (4 * math.ceil(size / (5 - m))) ** 2 < (m * (size + m - 1)) ** 2


def conv(x: Array, kernels: Array) -> Array:
    """`shifted_conv` with fewer multiplications, for 2 x 2 or 3 x 3 kernels: [N, H, W, C] to [N, H-m+1, W-m+1, D]."""
    m = kernels.shape[0]
    size = x.shape[1] - m + 1
    products = _products(_read_windows(_fill_tiles(x, size, m), m), kernels)
    return _write_tiles(products, m)[:, :size, :size]


def conv_transpose(x: Array, kernels: Array) -> Array:
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
    x, span = materialised(x), x.shape[1] - 3
    lines = _mixed_inputs([x[:, a : a + span : t] for a in range(4)])
    return [list(_mixed_inputs([line[:, :, b : b + span : t] for b in range(4)])) for line in lines]


def _write_windows(v: Square, taps: int) -> Array:
    """Adjoint of `_read_windows`: 4 x 4 arrays [N, T, T, C] to [N, t*T+m-1, t*T+m-1, C], sums where windows overlap."""
    columns = [materialised(_overlap(_mixed_inputs_adjoint(line), 2, taps)) for line in v]
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
    y = materialised(y).reshape(n, height // t, t, height // t, t, features)
    lines = _outputs_adjoint([y[:, :, i] for i in range(t)], taps)
    return [list(_outputs_adjoint([line[:, :, :, j] for j in range(t)], taps)) for line in lines]


def _write_tiles(v: Square, taps: int) -> Array:
    """A: 4 x 4 arrays [N, T, T, D] to tiles of t x t pixels, [N, t*T, t*T, D]."""
    columns = [materialised(_interleave(_outputs(line, taps), 2)) for line in v]
    return _interleave(_outputs(columns, taps), 1)


def _interleave(parts: Sequence[Array], axis: int) -> Array:
    """Takes turns between arrays along `axis`: the first of each, then the second of each, and so on."""
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return jnp.stack(parts, axis + 1).reshape(shape)


_read_windows, _write_windows = _adjoint_pair(_read_windows, _write_windows)
_write_tiles, _read_tiles = _adjoint_pair(_write_tiles, _read_tiles)
