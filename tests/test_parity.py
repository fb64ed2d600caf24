"""Every number of the golden files, computed again: belief updates, heads, losses, returns, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dvrl_jax import choices
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents import Timestep
from dvrl_jax.agents.original_weights import translate
from tests.golden import Golden

LOSSES = ("total", "value", "action", "entropy", "encoding")  # In the order of the files.


@pytest.fixture(scope="module")
def golden(golden_path):
    return Golden(golden_path)


def assert_close(actual, expected, name, tolerance=1e-4, rounding=0.0):
    """Largest difference, relative to the largest value of the expected array, after allowing for `rounding`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape} instead of {expected.shape}"
    scale = max(np.max(np.abs(expected), initial=0.0), 1e-8)
    error = max(np.max(np.abs(actual - expected), initial=0.0) - rounding, 0.0) / scale
    assert error <= tolerance, f"{name}: off by {error:.2e} of its largest value"


def belief_updates(golden):
    """Runs all recorded steps one by one; returns every quantity that the file holds, stacked over the steps."""
    agent, data = golden.agent, golden.data
    num_envs = golden.env.num_envs
    belief = agent.initial(num_envs)
    is_first = jnp.zeros(num_envs, bool)
    outputs = []
    for t in range(len(data["reward"])):
        belief = agent.restart(belief, is_first)
        obs, action = golden.env.obs[t], jnp.asarray(data["action"][t])
        timestep = Timestep(obs, jnp.asarray(data["prev_action"][t]), jnp.zeros(num_envs), is_first)
        inputs = agent.encode(timestep)
        out = {}
        if golden.is_dvrl:
            noise = type(golden.draws(0).noise)(jnp.asarray(data["u"][t, :, 0]), jnp.asarray(data["eps_z"][t]))
            ancestors, h_before = pf.systematic_ancestors(belief.log_weight, noise.u), belief.h
            belief, info = agent.update(belief, timestep, noise)
            step = agent.advance(h_before, inputs, info.trace)
            prior_mean, prior_var = agent.prior_of(step.h_prev, inputs)
            emission = agent.emission_of(step.phi_z, step.h_prev, inputs)
            prior_loss = pf.normal_log_prob(step.z, step.proposal_mean, step.proposal_var)
            prior_loss -= pf.normal_log_prob(step.z, prior_mean, prior_var)
            out = {
                "ancestors": ancestors,
                "proposal_mean": step.proposal_mean,
                "proposal_var": step.proposal_var,
                "prior_mean": prior_mean,
                "prior_var": prior_var,
                "z": belief.z,
                "phi_z": belief.phi_z,
                "log_weight": belief.log_weight,
                "prior_loss": prior_loss,
                "emission_loss": -agent.emission_log_prob(obs, emission),
                "encoding_loss": info.losses["encoding"],
            }
        else:
            belief, info = agent.update(belief, timestep, ())
            out = {"encoding_loss": info.losses["encoding"].mean()[None]}
        policy, value = agent.heads(belief)
        taken = action[..., 0].astype(jnp.int32) if golden.env.action.discrete else action
        out |= {
            "h": belief.h,
            "policy_features": agent.features(belief),
            "value": value[:, None],
            "action_log_prob": policy.log_prob(taken)[:, None],
            "entropy": policy.entropy().mean(),
        }
        outputs.append(out)
        is_first = jnp.asarray(data["not_done"][t] == 0)
    return {name: np.stack([out[name] for out in outputs]) for name in outputs[0]}


def test_belief_updates_and_heads(golden):
    outputs = belief_updates(golden)
    inputs = {"obs", "prev_action", "u", "eps_z", "action", "reward", "not_done", "config"}
    recorded = {name for name in golden.data if "/" not in name} - inputs
    assert recorded == set(outputs)
    for name, actual in outputs.items():
        assert_close(actual, golden.data[name], name)


def run_segments(golden):
    """The path that training takes: two segments, the second backpropagated through both."""
    learner, state = golden.learner, golden.state()
    gradient = jax.jit(learner.gradient)
    actor, window = state.actor, state.window
    # The recording's first episodes begin with a zero belief and the recorded previous action.
    prev_action = jnp.asarray(golden.data["prev_action"][0])
    actor = actor._replace(is_first=jnp.zeros_like(actor.is_first), prev_action=prev_action)
    for segment in range(2):
        grads, outcome = gradient(state.params, state.batch_stats, actor, window, segment, golden.draws(segment))
        yield jax.tree.map(np.asarray, (grads, outcome))
        actor, window = outcome.rollout.actor, window.put(outcome.rollout.segment, segment)


def norm(leaves):
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves))


def test_segments_losses_and_gradients(golden, golden_path):
    """Losses, returns and gradients.

    Some gradients are zero but for rounding: those of a bias before batch norm, and what passes a batch norm whose
    batch is constant (all observations blank), which multiplies rounding errors by 1/sqrt(eps) per layer. The
    recorded float32 numbers hold such errors too. What rounding does to each array is measured, by computing it in
    float64 as well, and allowed for (ten times, for it is random, and differs from compiler to compiler; and ten units
    in the last place of the whole gradient). It is measured with every blank image encoded by itself, as the original
    does: with blank images taken together, as in training, a constant batch has a hundredth of these errors.
    """
    data = golden.data
    tolerance = 1e-3 if golden.is_image and golden.sizes["batch_norm"] else 1e-4
    results = rounded = exact = list(run_segments(golden))
    if golden.sizes["batch_norm"]:
        with jax.enable_x64(True):
            exact = list(run_segments(Golden(golden_path, np.float64)))
        use = dataclasses.replace(choices.current(), distinct=False)
        rounded = list(run_segments(Golden(golden_path, use=use)))
    for segment, (grads, outcome) in enumerate(results):
        name = f"segment{segment}"
        assert set(outcome.losses) == set(LOSSES)
        for loss, expected in zip(LOSSES, data[f"{name}/loss"], strict=True):
            assert_close(outcome.losses[loss], expected, f"{name}/loss.{loss}")
        assert_close(outcome.returns[..., None], data[f"{name}/returns"], f"{name}/returns")
        assert_close(outcome.rollout.bootstrap[:, None], data[f"bootstrap{segment}/value"], f"bootstrap{segment}/value")
        roundings = jax.tree.map(lambda a, b: a - b, rounded[segment][0], exact[segment][0])
        total_rounding = 10 * norm(jax.tree.leaves(roundings))
        grad_norm = norm(jax.tree.leaves(grads))
        least = 10 * np.finfo(np.float32).eps * grad_norm
        if total_rounding < 0.1 * grad_norm:
            assert_close(grad_norm, data[f"{name}/grad_norm"], f"{name}/grad_norm", tolerance, total_rounding)
        else:  # Of the one where hardly anything but blanks was seen, rounding is most.
            assert name == "segment1" and golden_path.stem == "dvrl_image84_bn"
        expected = translate(golden.agent, golden.params(f"{name}/grad/"), missing=0.0)
        leaves = map(jax.tree.leaves, (grads, expected, roundings))
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(grads)]
        for path, actual, reference, rounding in zip(paths, *leaves, strict=True):
            allowance = least + 10 * np.max(np.abs(rounding))
            assert_close(actual, reference, f"{name}/grad{path}", tolerance, allowance)
