"""Layers and networks of both agents: what is learned, and nothing about how it is used.

Everything here is a Flax NNX module with float32 parameters, PyTorch's GRU and batch-norm conventions and the
original's initialisation. Images are NHWC; how their convolutions are computed is told in `convolutions.py`. Layers
take notes of their costly products (see `notes.py`).
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import choices, notes
from dvrl_jax.convolutions import ConvSpec, conv, conv_transpose_blocks, depth_to_space, space_to_depth
from dvrl_jax.notes import SIGMOID, SOFTPLUS, TANH
from dvrl_jax.products import matmul

RELU_GAIN = math.sqrt(2.0)
BATCH_NORM_EPSILON = 1e-5
VARIANCE_FLOOR = 1e-10  # Far below any variance that matters; keeps 1/var and its gradient finite in float32.
BATCH_NORM_MOMENTUM = 0.1  # PyTorch's meaning: the weight of the new batch in the running average.

Array = jax.Array


def orthogonal(key: Array, rows: int, columns: int, gain: float) -> Array:
    """Draws a matrix [rows, columns] with orthonormal rows or columns (whichever are fewer), times `gain`."""
    # Under vmap one after the other: decomposing a batch of matrices waits for ever on a CPU of two threads (JAX 0.10).
    draw = lambda key: jax.nn.initializers.orthogonal(gain)(key, (rows, columns), jnp.float32)
    return jax.custom_batching.sequential_vmap(draw)(key)


class Layer(nnx.Module):
    """A layer that takes notes, under the `path` at which it is found in its agent (see `name_layers`)."""

    path = ""

    def named(self, name: str = "") -> str:
        """The name of one of its notes."""
        return ".".join(part for part in (self.path, name) if part)


def name_layers(module: nnx.Module) -> None:
    """Tells each layer inside a module where it is, such as "encoder.activations.0"."""
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, Layer):
            layer.path = ".".join(map(str, path))


class Linear(nnx.Module):
    """Affine map of several named inputs, `y = sum_i x_i W_i + b`, one kernel [in_i, out] per input.

    It is the usual layer on the concatenation of its inputs (and initialised as that one: orthogonal, gain sqrt(2),
    bias 0), kept in blocks so that an input shared by all particles can be multiplied once per environment.
    """

    def __init__(self, inputs: Mapping[str, int], features: int, *, gain: float = RELU_GAIN, rngs: nnx.Rngs):
        kernel = orthogonal(rngs.params(), sum(inputs.values()), features, gain)
        self.kernel = nnx.Dict(_row_blocks(kernel, inputs))
        self.bias = nnx.Param(jnp.zeros(features))

    def product(self, **inputs: Array) -> Array:
        """Returns `sum_i x_i W_i` [..., out] for some of the inputs [..., in_i], without the bias."""
        return sum(matmul(x, self.kernel[name][...]) for name, x in inputs.items())

    def __call__(self, **inputs: Array) -> Array:
        """Returns `sum_i x_i W_i + b` [..., out]; inputs [..., in_i] broadcast against each other."""
        return self.product(**inputs) + self.bias[...]


def _row_blocks(kernel: Array, inputs: Mapping[str, int]) -> dict[str, nnx.Param]:
    blocks, start = {}, 0
    for name, size in inputs.items():
        blocks[name] = nnx.Param(kernel[start : start + size])
        start += size
    return blocks


class BatchNorm(Layer):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy, 2015).

    While learning and acting it uses the batch's own mean and biased variance, and moves the running averages by
    `BATCH_NORM_MOMENTUM` (with the unbiased variance, as PyTorch does). With `use_running_average` it uses those
    averages instead: for evaluation with few environments.
    """

    use_running_average = False

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))

    def __call__(self, x: Array) -> Array:
        """Normalises x [..., C]; in a replay of several steps [T, ..., C], each by its own noted statistics."""
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            return _scaled(x, scale, bias, self.mean[...], self.var[...])
        axes, count = tuple(range(x.ndim - 1)), math.prod(x.shape[:-1])
        keep = lambda name, compute: notes.note_statistic(compute, self.named(name))
        mean = keep("mean", lambda: jnp.mean(x, axes))
        var = keep("var", lambda: jnp.mean(jnp.square(x - mean), axes))
        if not notes.is_replay():
            self._move_averages(mean, var * (count / max(count - 1, 1)))
        # The output is too large to note, and cheap: it is computed again, with scale and bias of the time of acting.
        old_scale, old_bias = keep("scale", lambda: scale), keep("bias", lambda: bias)
        return normalise(x, scale, bias, mean, var, old_scale, old_bias, notes.batch_means())

    def _move_averages(self, mean: Array, var: Array) -> None:
        for average, new in ((self.mean, mean), (self.var, var)):
            average[...] += BATCH_NORM_MOMENTUM * (new - average[...])


def _spread(stat: Array, x: Array) -> Array:
    """Puts statistics [C], or [T, C] of several steps, against x [..., C] or [T, ..., C]."""
    return jnp.expand_dims(stat, tuple(range(stat.ndim - 1, x.ndim - 1)))


def _scaled(x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> Array:
    """(x - mean) / sqrt(var + eps) * scale + bias, with statistics as `_spread` takes them."""
    rate = jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
    return (x - _spread(mean, x)) * _spread(rate * scale, x) + _spread(bias, x)


@jax.custom_vjp
def normalise(
    x: Array,
    scale: Array,
    bias: Array,
    mean: Array,
    var: Array,
    old_scale: Array,
    old_bias: Array,
    batch_means: Array | None = None,
) -> Array:
    """Batch normalisation of x [..., C] by its own mean and variance [C], or of each step by its own, [T, C].

    Returns (x - mean) / sqrt(var + eps) * old_scale + old_bias, with the gradient that this has for `scale` and `bias`
    [C] in place of the old ones and, through mean and variance, for x. By itself JAX would go over x for it about seven
    times instead of four.

    With `batch_means` [T, T], the T steps are rows, several of which were normalised as one batch (see
    `notes.batch_means`).
    """
    del scale, bias, batch_means
    return _scaled(x, old_scale, old_bias, mean, var)


def _normalise_fwd(x, scale, bias, mean, var, old_scale, old_bias, batch_means):
    return normalise(x, scale, bias, mean, var, old_scale, old_bias, batch_means), (x, scale, mean, var, batch_means)


def _normalise_bwd(residuals, grad: Array):
    """Of y = scale * n + bias with n = rate * (x - mean): dx = scale * rate * (dy - mean(dy) - n * mean(dy * n))."""
    x, scale, mean, var, batch_means = residuals
    axes = tuple(range(mean.ndim - 1, x.ndim - 1))
    count = math.prod(x.shape[axis] for axis in axes)
    # Means, not a layer: on a GPU, products would be of fewer bits (TF32).
    in_batch = lambda total: total if batch_means is None else jnp.matmul(batch_means, total, precision="highest")
    mean_of = lambda total: in_batch(total) / count
    rate = jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
    centred = x - _spread(mean, x)
    bias_grad = jnp.sum(grad, axes)
    scale_grad = jnp.sum(grad * centred, axes) * rate
    by_centred, by_one = (_spread(scale * rate * mean_of(total), x) for total in (rate * scale_grad, bias_grad))
    x_grad = _spread(scale * rate, x) * grad - by_centred * centred - by_one
    over_steps = lambda total: jnp.sum(total.reshape(-1, total.shape[-1]), 0)
    return x_grad, over_steps(scale_grad), over_steps(bias_grad), None, None, None, None, None


normalise.defvjp(_normalise_fwd, _normalise_bwd)


class Activation(Layer):
    """ReLU, preceded by batch normalisation if `batch_norm`, of a layer's product, of which it takes a note."""

    def __init__(self, features: int, batch_norm: bool):
        self.norm = BatchNorm(features) if batch_norm else None

    def __call__(self, x: Array) -> Array:
        x = notes.note(x, self.named())
        return jax.nn.relu(x if self.norm is None else self.norm(x))


class Normal(Layer):
    """Two linear maps of one input: the mean and, through a softplus, the **variance** of a diagonal normal."""

    def __init__(self, inputs: int, features: int, *, rngs: nnx.Rngs):
        self.mean = Linear({"x": inputs}, features, rngs=rngs)
        self.var = Linear({"x": inputs}, features, rngs=rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Maps x [..., inputs] to (mean, variance), each [..., features]."""
        mean = notes.note(self.mean(x=x), self.named("mean"))
        return mean, notes.note(self.var(x=x), self.named("var"), SOFTPLUS) + VARIANCE_FLOOR


class GRUCell(Layer):
    """Gated recurrent unit with PyTorch's gates: r, z, n in this order, and both bias vectors.

        r = s(W_ir x + b_ir + W_hr h + b_hr)      z = s(W_iz x + b_iz + W_hz h + b_hz)
        n = tanh(W_in x + b_in + r * (W_hn h + b_hn))      h' = (1 - z) * n + z * h

    The input is a set of named blocks (see `Linear`). Initialised orthogonally with gain 1 on the full matrices, or
    with `uniform` from U(-1/sqrt(H), 1/sqrt(H)), biases included. `update_bias` is b_iz at first: with log(T) a state
    lasts for about T steps (Tallec and Ollivier, 2018), with 0 for two.
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        features: int,
        *,
        uniform: bool = False,
        update_bias: float = 0.0,
        rngs: nnx.Rngs,
    ):
        sizes = {"i": sum(inputs.values()), "h": features}
        if uniform:
            bound = 1.0 / math.sqrt(features)
            draw = lambda *shape: jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
            kernel_i, kernel_h = (draw(size, 3 * features) for size in sizes.values())
            bias_i, bias_h = draw(3 * features), draw(3 * features)
        else:
            kernel_i, kernel_h = (orthogonal(rngs.params(), size, 3 * features, 1.0) for size in sizes.values())
            bias_i, bias_h = jnp.zeros(3 * features), jnp.zeros(3 * features)
        self.kernel_i = nnx.Dict(_row_blocks(kernel_i, inputs))
        self.kernel_h = nnx.Param(kernel_h)
        self.bias_i = nnx.Param(bias_i.at[features : 2 * features].add(update_bias) if update_bias else bias_i)
        self.bias_h = nnx.Param(bias_h)

    def product(self, **inputs: Array) -> Array:
        """Returns the input's part of the gates, `sum_i x_i W_i` [..., 3H], without the bias."""
        return sum(matmul(x, self.kernel_i[name][...]) for name, x in inputs.items())

    def __call__(self, h: Array, product: Array) -> Array:
        """Returns the next h [..., H] from h [..., H] and the input's `product` [..., 3H]."""
        r_i, z_i, n_i = jnp.split(product + self.bias_i[...], 3, axis=-1)
        r_h, z_h, n_h = jnp.split(matmul(h, self.kernel_h[...]) + self.bias_h[...], 3, axis=-1)
        r = notes.note(r_i + r_h, self.named("r"), SIGMOID)
        z = notes.note(z_i + z_h, self.named("z"), SIGMOID)
        n = notes.note(n_i + r * notes.note(n_h, self.named("n_h")), self.named("n"), TANH)
        return n + z * (h - n)


# --- Convolution layers --------------------------------------------------------------------------------------------


class Conv(nnx.Module):
    """Convolution layer: kernel [k, k, C, D] orthogonal over its output features (gain sqrt(2)), bias 0."""

    def __init__(self, channels: int, features: int, spec: ConvSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        k = spec.kernel
        kernel = orthogonal(rngs.params(), k * k * channels, features, RELU_GAIN)
        self.kernel = nnx.Param(kernel.reshape(k, k, channels, features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        """Maps x [..., H, W, C] to [..., H', W', D]."""

        def of_images(x: Array, kernel: Array, bias: Array) -> Array:
            y = conv(x.reshape(-1, *x.shape[-3:]), kernel, self.spec) + bias
            return y.reshape(*x.shape[:-3], *y.shape[-3:])

        return choices.current().over_envs(of_images, x.ndim - 4, x, self.kernel[...], self.bias[...])


class ConvTranspose(nnx.Module):
    """Transposed convolution layer: kernel [C, k, k, D] orthogonal over its input channels, bias 0."""

    def __init__(self, channels: int, features: int, spec: ConvSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        k = spec.kernel
        kernel = orthogonal(rngs.params(), channels, k * k * features, RELU_GAIN)
        self.kernel = nnx.Param(kernel.reshape(channels, k, k, features))
        self.bias = nnx.Param(jnp.zeros(features))

    def blocks(self, x: Array) -> Array:
        """Maps x [N, H, W, C] to its image in block order (see `conv_transpose_blocks`), uncropped, with bias."""
        bias = jnp.tile(self.bias[...], self.spec.stride**2)
        of_images = functools.partial(conv_transpose_blocks, spec=self.spec)
        return choices.current().over_envs(of_images, 0, x, self.kernel[...]) + bias

    def __call__(self, x: Array) -> Array:
        """Maps x [N, H, W, C] to [N, H', W', D]."""
        return self.unblock(self.blocks(x))

    def unblock(self, blocks: Array) -> Array:
        """Puts blocks [N, h, w, s*s*D] in pixel order and cuts the border off: [N, H', W', D]."""
        image, p = depth_to_space(blocks, self.spec.stride), self.spec.padding
        return image[:, p : image.shape[1] - p, p : image.shape[2] - p]


# --- Encoders and decoders by kind of observation -------------------------------------------------------------------

IMAGE_ENCODERS: dict[int, tuple[ConvSpec, ConvSpec, ConvSpec]] = {
    84: (ConvSpec(8, 4), ConvSpec(4, 2), ConvSpec(3, 1)),
    32: (ConvSpec(4, 2, 1), ConvSpec(4, 2, 1), ConvSpec(4, 2)),
    16: (ConvSpec(4, 2, 1), ConvSpec(4, 2, 1), ConvSpec(4, 1)),
}


SMALLEST_IMAGE = 5
# Convolutions of images of other sizes, by the least length of the shorter side.
OTHER_IMAGE_ENCODERS = {
    64: IMAGE_ENCODERS[84],
    16: IMAGE_ENCODERS[32],
    SMALLEST_IMAGE: (ConvSpec(3, 1, 1), ConvSpec(4, 2, 1), ConvSpec(3, 1, 1)),
}


def image_layers(height: int, width: int) -> tuple[ConvSpec, ConvSpec, ConvSpec]:
    """The encoder's convolutions for images of this size, none of whose sides is less than `SMALLEST_IMAGE`."""
    if height == width and height in IMAGE_ENCODERS:
        return IMAGE_ENCODERS[height]
    return next(specs for least, specs in OTHER_IMAGE_ENCODERS.items() if min(height, width) >= least)


def layer_sizes(size: int, specs: Sequence[ConvSpec]) -> list[int]:
    """Lengths of one side of an image before the first and after each of some convolutions.

    The first of them is the least that is not less than `size` and of which no layer leaves out the last pixels: so
    much is the image padded. The transposed convolutions go through the same lengths in the opposite order.
    """
    for padded in itertools.count(size):
        sizes = list(itertools.accumulate(specs, lambda size, spec: spec.output_size(size), initial=padded))
        if all(
            spec.input_size(after) == before
            for spec, (before, after) in zip(specs, itertools.pairwise(sizes), strict=True)
        ):
            return sizes


def encoded_shape(obs_shape: Sequence[int], channels: Sequence[int]) -> tuple[int, ...]:
    """Shape of the encoder's output for one observation: (h, w, channels[-1]) for images, else (channels[-1],).

    Raises:
        ValueError: no network is defined for this observation shape, or `channels` has the wrong length.
    """
    if len(obs_shape) == 1:
        if len(channels) != 2:
            raise ValueError(f"vector observations need 2 layer widths, not {len(channels)}")
        return (channels[-1],)
    if len(obs_shape) != 3 or min(obs_shape[:2]) < SMALLEST_IMAGE:
        rule = f"they must be vectors, or images of at least {SMALLEST_IMAGE}x{SMALLEST_IMAGE}"
        raise ValueError(f"no network for observations of shape {tuple(obs_shape)}; {rule}")
    if len(channels) != 3:
        raise ValueError(f"image observations need 3 channel counts, not {len(channels)}")
    specs = image_layers(*obs_shape[:2])
    return (*(layer_sizes(size, specs)[-1] for size in obs_shape[:2]), channels[-1])


def _padding(obs_shape: Sequence[int]) -> list[int]:
    """How many pixels of 0 images get at the bottom and at the right (see `layer_sizes`)."""
    specs = image_layers(*obs_shape[:2])
    return [layer_sizes(size, specs)[0] - size for size in obs_shape[:2]]


class Encoder(nnx.Module):
    """phi_o: three convolutions (images) or two linear layers (vectors), each followed by BN? and ReLU."""

    def __init__(self, obs_shape: Sequence[int], channels: Sequence[int], batch_norm: bool, *, rngs: nnx.Rngs):
        encoded_shape(obs_shape, channels)
        self.is_image = len(obs_shape) == 3
        sizes = (obs_shape[-1], *channels)
        pairs = list(itertools.pairwise(sizes))
        if self.is_image:
            specs, self.padding = image_layers(*obs_shape[:2]), tuple(_padding(obs_shape))
            layers = [Conv(*pair, spec, rngs=rngs) for pair, spec in zip(pairs, specs, strict=True)]
        else:
            layers = [Linear({"x": inputs}, outputs, rngs=rngs) for inputs, outputs in pairs]
        self.layers = nnx.List(layers)
        self.activations = nnx.List([Activation(size, batch_norm) for size in channels])

    def __call__(self, obs: Array) -> Array:
        """Encodes obs [..., H, W, C] or [..., D] as phi_o [..., F]."""
        x = obs
        if self.is_image and any(self.padding):
            x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), *((0, missing) for missing in self.padding), (0, 0)])
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x) if self.is_image else layer(x=x))
        return x.reshape(*obs.shape[: -3 if self.is_image else -1], -1)


class ImageDecoder(Layer):
    """Three transposed convolutions mirroring the encoder; BN? and ReLU between them, nothing after the last.

    Bernoulli logits stay in the block order of the last layer: nobody but a viewer needs the pixels in order. A
    diagonal normal has two output channels for each of the image's, its mean and, through a softplus, its variance.
    """

    def __init__(
        self,
        obs_shape: Sequence[int],
        channels: Sequence[int],
        batch_norm: bool,
        likelihood: str = "bernoulli",
        *,
        rngs: nnx.Rngs,
    ):
        self.input_shape = encoded_shape(obs_shape, channels)
        self.obs_shape, self.padding, self.likelihood = tuple(obs_shape), tuple(_padding(obs_shape)), likelihood
        specs = image_layers(*obs_shape[:2])[::-1]
        sizes = (*channels[::-1], obs_shape[-1] * (2 if likelihood == "normal" else 1))
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([ConvTranspose(*pair, spec, rngs=rngs) for pair, spec in zip(pairs, specs, strict=True)])
        self.activations = nnx.List([Activation(size, batch_norm) for size in sizes[1:-1]])

    def __call__(self, features: Array) -> Array | tuple[Array, Array]:
        """Decodes features [N, F] into logits [N, h, w, s*s*C], in block order and with the border still on.

        If normal, into (mean, variance), each [N, H*W*C].
        """
        x = self.layers[0].blocks(features.reshape(-1, *self.input_shape))
        for i, activation in enumerate(self.activations):
            x = activation(self.layers[i].unblock(x))
            x = self.layers[i + 1].blocks(x)
        x = notes.note(x, self.named("logits"))
        if self.likelihood != "normal":
            return x
        mean, var = (part.reshape(x.shape[0], -1) for part in jnp.split(self.to_images(x), 2, axis=-1))
        return mean, jax.nn.softplus(var) + VARIANCE_FLOOR

    def to_blocks(self, images: Array) -> tuple[Array, Array | None]:
        """Puts images [N, H, W, C] in the order of the logits; the second value masks the border (None without one)."""
        spec = self.layers[-1].spec
        p = spec.padding
        if not p and not any(self.padding):
            return space_to_depth(images, spec.stride), None
        pad = ((0, 0), *((p, p + missing) for missing in self.padding), (0, 0))
        mask = jnp.pad(jnp.ones_like(images[:1]), pad)
        return space_to_depth(jnp.pad(images, pad), spec.stride), space_to_depth(mask, spec.stride)

    def to_images(self, logits: Array) -> Array:
        """Puts logits [N, h, w, s*s*C] back in pixel order: [N, H, W, C]."""
        height, width, _ = self.obs_shape
        return self.layers[-1].unblock(logits)[:, :height, :width]


class VectorDecoder(Layer):
    """One linear layer with BN? and ReLU, then a diagonal normal's mean and variance, or logits.

    To Bernoulli logits, which `to_blocks` and `to_images` are for, a vector [D] is an image of one pixel, [1, 1, D].
    """

    def __init__(
        self,
        obs_shape: Sequence[int],
        channels: Sequence[int],
        batch_norm: bool,
        likelihood: str = "normal",
        *,
        rngs: nnx.Rngs,
    ):
        self.likelihood = likelihood
        self.hidden = Linear({"x": channels[-1]}, channels[0], rngs=rngs)
        self.activation = Activation(channels[0], batch_norm)
        if likelihood == "normal":
            self.head = Normal(channels[0], obs_shape[0], rngs=rngs)
        else:
            self.head = Linear({"x": channels[0]}, obs_shape[0], rngs=rngs)

    def __call__(self, features: Array) -> Array | tuple[Array, Array]:
        """Decodes features [N, F] into (mean, variance), each [N, D], or logits, [N, D] or (Bernoulli) [N, 1, 1, D]."""
        hidden = self.activation(self.hidden(x=features))
        if self.likelihood == "normal":
            return self.head(hidden)
        logits = notes.note(self.head(x=hidden), self.named("logits"))
        return logits[:, None, None] if self.likelihood == "bernoulli" else logits

    def to_blocks(self, vectors: Array) -> tuple[Array, None]:
        """Vectors [N, D] as images of one pixel, [N, 1, 1, D], without a border (see `ImageDecoder.to_blocks`)."""
        return vectors[:, None, None], None

    def to_images(self, logits: Array) -> Array:
        """Takes Bernoulli logits [N, 1, 1, D] as vectors again: [N, D]."""
        return logits[:, 0, 0]


def make_decoder(observation, channels: Sequence[int], batch_norm: bool, *, rngs: nnx.Rngs):
    """Returns the decoder for an `ObservationSpec`: `ImageDecoder` or `VectorDecoder`.

    Raises:
        ValueError: there is none for its `likelihood`.
    """
    kind, known = VectorDecoder, ("bernoulli", "normal", "categorical")
    if observation.is_image:
        kind, known = ImageDecoder, known[:2]
    if observation.likelihood not in known:
        raise ValueError(f"emission = {observation.likelihood!r}: must be one of {', '.join(known)} here")
    return kind(observation.shape, channels, batch_norm, observation.likelihood, rngs=rngs)


def count_parameters(params: nnx.State) -> int:
    """Total number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
