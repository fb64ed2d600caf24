"""Weights of the original PyTorch release: their names and layouts mapped to ours.

`from_original` takes any mapping of names to arrays, `load_state_dict` a file written by `torch.save`. The original
keeps each layer's inputs concatenated (here: in blocks, see `networks.Linear`), images as NCHW (here: NHWC) and
kernels with the output first (here: last).
"""

import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dvrl_jax import networks
from dvrl_jax.agents import DVRL, RNN, Agent
from dvrl_jax.agents.particles import GRUSummary, LinearSummary

# Entries of a state_dict that have no counterpart here.
_UNUSED = re.compile(r"(num_batches_tracked|obs_criterion.*)$")


def from_original(agent: Agent, arrays: Mapping[str, np.ndarray]) -> Agent:
    """Fills `agent` with the original's parameters.

    Args:
        agent: an agent of the sizes that the arrays have. Its weights are replaced in place.
        arrays: the original's parameters (and batch-norm averages, if there are any) by their names there.
    Returns:
        `agent`.
    Raises:
        ValueError: a name is missing, unknown, or has another shape than the agent's sizes require, or the agent is of
            no kind that the original has; its weights are as they were.
    """
    pending = _Pending(arrays)
    found = list(_assignments(agent, pending))
    for variable, value in found:
        if value.shape != variable[...].shape:
            raise ValueError(f"original weights: expected shape {variable[...].shape}, found {value.shape}")
    pending.check_all_used()
    for variable, value in found:
        variable[...] = jnp.asarray(value, variable[...].dtype)
    return agent


def translate(agent: Agent, arrays: Mapping[str, np.ndarray], missing: float | None = None) -> nnx.State:
    """Rearranges arrays named and laid out as the original's parameters, for example gradients, as our parameters.

    Returns a parameter tree shaped like the agent's; parameters without an array get the value `missing`, or are an
    error if that is None.
    """
    pending = _Pending(arrays, missing)
    copy = nnx.clone(agent)
    for variable, value in _assignments(copy, pending):
        variable[...] = jnp.asarray(value, variable[...].dtype)
    return nnx.state(copy, nnx.Param)


def load_state_dict(path: str) -> dict[str, np.ndarray]:
    """Reads a `state_dict` saved by PyTorch as arrays. Needs PyTorch; executes nothing from the file.

    Raises:
        ImportError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("reading a PyTorch file needs PyTorch: pip install torch") from error
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}


class _Pending:
    """The arrays not yet used, by name."""

    def __init__(self, arrays: Mapping[str, np.ndarray], missing: float | None = None):
        self.arrays = {name: np.asarray(array) for name, array in arrays.items() if not _UNUSED.search(name)}
        self.missing = missing

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array of that name, once; `shape` is the one the original would give it."""
        if name not in self.arrays:
            if self.missing is not None:
                return np.full(shape, self.missing, np.float32)
            raise ValueError(f"original weights: there is no {name!r}, which this agent needs")
        array = self.arrays.pop(name)
        if array.shape != shape:
            raise ValueError(f"original weights: {name!r} has shape {array.shape}, this agent needs {shape}")
        return array

    def discard(self, prefix: str) -> None:
        """Forgets arrays whose module the agent leaves out."""
        self.arrays = {name: array for name, array in self.arrays.items() if not name.startswith(prefix)}

    def check_all_used(self) -> None:
        if self.arrays:
            raise ValueError(f"original weights: no place in this agent for {', '.join(sorted(self.arrays))}")


def _assignments(agent: Agent, source: _Pending):
    """Yields (variable, value in our layout) for every parameter of the agent."""
    if not isinstance(agent, DVRL | RNN):
        raise ValueError(f"original weights: are DVRL's or the RNN's, not those of {type(agent).__name__}")
    if agent.reward_input:
        raise ValueError("original weights: are of agents without model.reward_input")
    is_dvrl = isinstance(agent, DVRL)
    if is_dvrl and not isinstance(agent.summary, LinearSummary | GRUSummary):
        raise ValueError("original weights: are of agents with model.summary = 'gru'")
    if agent.second_value_head is not None:
        raise ValueError("original weights: are of agents with one value head, loss.lambda_discrepancy_coef = 0")
    prefix = "encoding_network." if is_dvrl else ""
    yield from _encoder(agent.encoder, source, prefix + ("phi_x" if is_dvrl else "encoder"))
    obs_order = _feature_order(agent)
    if agent.action_sizes:
        yield from _linear(agent.action_encoder, source, f"{prefix}action_encoder.0", ["x"])
        yield from _norm(agent.action_activation.norm, source, f"{prefix}action_encoder.1")
    yield from _linear(agent.value_head, source, "critic_linear", ["x"])
    if agent.action.discrete:
        yield from _linear(agent.policy_head, source, "dist.linear", ["x"])
    else:
        yield from _linear(agent.policy_head, source, "dist.fc_mean", ["x"])
        yield agent.log_std, source.take("dist.logstd._bias", (agent.action.size, 1))[:, 0]
    if agent.summary_norm is None:
        source.discard("encoding_bn.")
    yield from _norm(agent.summary_norm, source, "encoding_bn")
    action = list(agent.action_sizes)
    if is_dvrl:
        name = "proposal_network.enc"
        yield from _linear(agent.proposal_hidden, source, f"{name}.0", ["obs", "h", *action], obs=obs_order)
        yield from _norm(agent.proposal_activation.norm, source, f"{name}.1")
        yield from _normal(agent.proposal, source, name)
        yield from _linear(agent.prior_hidden, source, "transition_network.prior.0", ["h", *action])
        yield from _normal(agent.prior, source, "transition_network.prior")
        name = "deterministic_transition_network"
        yield from _linear(agent.phi_z, source, f"{name}.phi_z.0", ["z"])
        yield from _gru(agent.gru, source, f"{name}.rnn", "", ["obs", "phi_z", *action], obs=obs_order)
        name = "emission_network.linear_obs_decoder"
        yield from _linear(agent.emission_hidden, source, f"{name}.0", ["phi_z", "h", *action], out=obs_order)
        yield from _norm(agent.emission_activation.norm, source, f"{name}.1", obs_order)
        yield from _decoder(agent.decoder, source, "emission_network")
        if agent.num_particles > 1:
            yield from _gru(agent.summary, source, "particle_gru", "_l0", ["h", "phi_z", "weight"])
        else:
            yield from _linear(agent.summary, source, "particle_gru", ["h", "phi_z", "weight"])
    else:
        yield from _gru(agent.gru, source, "gru", "", ["obs", *action], obs=obs_order)
        if agent.obs_loss_coef > 0:
            yield from _linear(agent.emission_hidden, source, "linear_obs_decoder.0", ["h", *action], out=obs_order)
            yield from _norm(agent.emission_activation.norm, source, "linear_obs_decoder.1", obs_order)
            yield from _decoder(agent.decoder, source, "decoder")
        # The original makes these layers in any case; here they exist only where they are used.
        source.discard("linear_obs_decoder.")


def _feature_order(agent: Agent) -> np.ndarray:
    """Our flattened (H, W, C) features as indices into the original's flattened (C, H, W) ones."""
    if not agent.observation.is_image:
        return np.arange(agent.encoded_size)
    channels = agent.encoder.layers[-1].bias[...].shape[0]
    side = math.isqrt(agent.encoded_size // channels)
    order = np.arange(agent.encoded_size).reshape(channels, side, side)
    return order.transpose(1, 2, 0).ravel()


def _blocks(kernel: Mapping[str, nnx.Param], weight: np.ndarray, order, obs: np.ndarray | None):
    """Cuts weight [out, in] into our kernels [in_i, out], in the order in which the original concatenates."""
    start = 0
    for name in order:
        size = kernel[name][...].shape[0]
        block = weight[:, start : start + size]
        yield kernel[name], (block[:, obs] if name == "obs" and obs is not None else block).T
        start += size


def _linear(layer: networks.Linear, source: _Pending, name: str, order, obs=None, out=None):
    features = layer.bias[...].shape[0]
    inputs = sum(layer.kernel[key][...].shape[0] for key in order)
    weight, bias = source.take(f"{name}.weight", (features, inputs)), source.take(f"{name}.bias", (features,))
    if out is not None:
        weight, bias = weight[out], bias[out]
    yield from _blocks(layer.kernel, weight, order, obs)
    yield layer.bias, bias


def _gru(cell: networks.GRUCell, source: _Pending, name: str, suffix: str, order, obs=None):
    h_dim, gates = cell.kernel_h[...].shape
    inputs = sum(cell.kernel_i[key][...].shape[0] for key in order)
    yield from _blocks(cell.kernel_i, source.take(f"{name}.weight_ih{suffix}", (gates, inputs)), order, obs)
    yield cell.kernel_h, source.take(f"{name}.weight_hh{suffix}", (gates, h_dim)).T
    yield cell.bias_i, source.take(f"{name}.bias_ih{suffix}", (gates,))
    yield cell.bias_h, source.take(f"{name}.bias_hh{suffix}", (gates,))


def _normal(head: networks.Normal, source: _Pending, name: str):
    yield from _linear(head.mean, source, f"{name}_mean", ["x"])
    yield from _linear(head.var, source, f"{name}_std.0", ["x"])


def _norm(norm: networks.BatchNorm | None, source: _Pending, name: str, order=None):
    if norm is None:
        return
    shape = norm.scale[...].shape
    order = np.arange(shape[0]) if order is None else order
    yield norm.scale, source.take(f"{name}.weight", shape)[order]
    yield norm.bias, source.take(f"{name}.bias", shape)[order]
    if f"{name}.running_mean" in source.arrays:
        yield norm.mean, source.take(f"{name}.running_mean", shape)[order]
        yield norm.var, source.take(f"{name}.running_var", shape)[order]


def _encoder(encoder: networks.Encoder, source: _Pending, name: str):
    # The original's list of modules: layer, batch norm if there is one, ReLU.
    place = 0
    for layer, activation in zip(encoder.layers, encoder.activations, strict=True):
        if encoder.is_image:
            k, _, channels, features = layer.kernel[...].shape
            weight = source.take(f"{name}.{place}.weight", (features, channels, k, k))
            yield layer.kernel, weight.transpose(2, 3, 1, 0)
            yield layer.bias, source.take(f"{name}.{place}.bias", (features,))
        else:
            yield from _linear(layer, source, f"{name}.{place}", ["x"])
        yield from _norm(activation.norm, source, f"{name}.{place + 1}")
        place += 2 if activation.norm is None else 3


def _decoder(decoder, source: _Pending, name: str):
    if isinstance(decoder, networks.VectorDecoder):
        yield from _linear(decoder.hidden, source, f"{name}.dec.0", ["x"])
        yield from _norm(decoder.activation.norm, source, f"{name}.dec.1")
        yield from _normal(decoder.head, source, f"{name}.dec")
        return
    place = 0
    for layer, activation in zip(decoder.layers, [*decoder.activations, None], strict=True):
        channels, k, _, features = layer.kernel[...].shape
        weight = source.take(f"{name}.dec.{place}.weight", (channels, features, k, k))
        yield layer.kernel, weight.transpose(0, 2, 3, 1)
        yield layer.bias, source.take(f"{name}.dec.{place}.bias", (features,))
        if activation is not None:
            yield from _norm(activation.norm, source, f"{name}.dec.{place + 1}")
            place += 2 if activation.norm is None else 3
