"""The lambda-discrepancy: how far two value heads are apart, of which each learns by another TD(lambda).

Allen et al., *Mitigating Partial Observability in Sequential Decision Processes via the Lambda Discrepancy*, NeurIPS
2024. TD(lambda) for different lambda agree where the state is Markov and in general not where it is aliased. So their
difference, minimised through the summary, trains a memory. With `loss.lambda_discrepancy_coef` it is a loss of any
agent.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


def lambda_returns(
    rewards: Array, dones: Array, values: Array, bootstrap: Array, gamma: float, trace: float, end_values: Array
) -> Array:
    """TD(lambda) returns R_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda R_{t+1}), with R_T = V_T (Sutton, 1988).

    Args:
        rewards, values: [T, B], values V of the states before the steps. dones: [T, B] bool. bootstrap: [B], V_T.
        trace: lambda, from 0 (one step) to 1 (up to the segment's end).
        end_values: [T, B], what stands for both V_{t+1} and R_{t+1} where done_t.
    Returns:
        returns [T, B]; no gradient passes.
    """
    chex.assert_equal_shape([rewards, dones, values, end_values])

    def step(following, inputs):
        reward, done, next_value, end_value = inputs
        mixed = (1.0 - trace) * next_value + trace * following
        following = reward + gamma * jnp.where(done, end_value, mixed)
        return following, following

    next_values = jnp.concatenate([values[1:], bootstrap[None]])
    _, returns = jax.lax.scan(step, bootstrap, (rewards, dones, next_values, end_values), reverse=True)
    return jax.lax.stop_gradient(returns)


def losses(
    values: Array, rollout: Any, rewards: Array, auxiliary: dict[str, Array], loss: Any
) -> tuple[Array, dict[str, Array]]:
    """What the two heads learn.

    Args:
        values: [2, T, B] of both heads. rollout: an `acting.Rollout` with both heads' values. rewards: [T, B].
        auxiliary: other losses [T, B] by name. loss: the `loss` group of a configuration.
    Returns:
        the first head's TD(lambda) returns [T, B]; and `auxiliary` with two more: the second head's squared TD(lambda)
        error, and the squared difference of the heads.
    """
    steps, envs = rewards.shape
    # Of one head's shape, and 0, where cut-off episodes have no end value.
    end_values = jnp.broadcast_to(rollout.end_value.reshape(steps, -1, envs), (steps, 2, envs))
    first, second = (
        lambda_returns(rewards, rollout.env.done, *both, loss.gamma, trace, end_values[:, head])
        for head, (trace, *both) in enumerate(zip(loss.td_lambdas, values, rollout.bootstrap, strict=True))
    )
    return first, auxiliary | {
        "second_value": jnp.square(second - values[1]),
        "lambda_discrepancy": jnp.square(values[0] - values[1]),
    }
