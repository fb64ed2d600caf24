"""Advantage actor-critic: returns, losses, optimiser, and the update of the weights.

An update first *acts* for a segment of `num_steps` environment steps (`acting.py`), without gradients. Then it
*learns*: the segment's recurrence runs once more, then what each step foresaw and chose, and this is differentiated
(see `notes.py` for why the second pass is nearly free). From the beginning of the segment the gradient continues
through the earlier ones of the window (`bptt.py`).
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dvrl_jax import choices, lambda_discrepancy
from dvrl_jax.acting import Actor, Rollout
from dvrl_jax.agents import Agent, bind, select
from dvrl_jax.bptt import Backpropagation
from dvrl_jax.notes import replayed
from dvrl_jax.train_state import TrainState

Array = jax.Array


def n_step_returns(rewards: Array, dones: Array, bootstrap: Array, gamma: float, end_values: Array | float = 0.0):
    """R_t = r_t + gamma * R_{t+1}, with R_T the bootstrap value (Mnih et al., 2016).

    Args:
        rewards: [T, B]. dones: [T, B] bool. bootstrap: [B], value of the observation after the last step.
        end_values: [T, B], what stands for R_{t+1} where done_t: 0, or the value of a cut-off episode's last
        observation.
    Returns:
        returns [T, B]; no gradient passes.
    """
    chex.assert_equal_shape([rewards, dones])

    def step(following, inputs):
        reward, done, end_value = inputs
        following = reward + gamma * jnp.where(done, end_value, following)
        return following, following

    xs = (rewards, dones, jnp.broadcast_to(jnp.asarray(end_values, rewards.dtype), rewards.shape))
    _, returns = jax.lax.scan(step, bootstrap, xs, reverse=True)
    return jax.lax.stop_gradient(returns)


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean of x over the entries where mask (same shape) is True; 0 if there are none."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def a2c_losses(
    value: Array, log_prob: Array, entropy: Array, auxiliary: dict[str, Array], returns: Array, mask: Array, coefs
) -> dict[str, Array]:
    """L = c_v mean (R-V)^2 - c_a mean stopgrad(R-V) log pi(a) - c_h mean H + sum_i c_i mean l_i.

    Args:
        value, log_prob, entropy, returns: [T, B]. auxiliary: the belief's losses [T, B] by name ("encoding": -ELBO).
        mask: [T, B], which steps were transitions; the means are over those.
        coefs: has `value_coef`, `action_coef`, `entropy_coef`, and `<name>_coef` for each auxiliary loss.
    Returns:
        scalars by name: `total`, which is minimised, `value`, `action`, `entropy`, and the auxiliary ones.
    """
    chex.assert_equal_shape([value, log_prob, entropy, returns, mask, *auxiliary.values()])
    advantage = returns - value
    losses = {
        "value": masked_mean(jnp.square(advantage), mask),
        "action": -masked_mean(jax.lax.stop_gradient(advantage) * log_prob, mask),
        "entropy": masked_mean(entropy, mask),
    }
    total = coefs.value_coef * losses["value"] + coefs.action_coef * losses["action"]
    for name, loss in auxiliary.items():
        losses[name] = masked_mean(loss, mask)
        total += getattr(coefs, f"{name}_coef") * losses[name]
    return losses | {"total": total - coefs.entropy_coef * losses["entropy"]}


def make_optimizer(config) -> optax.GradientTransformation:
    """Clips the global gradient norm, then RMSProp (eps outside the square root, as in PyTorch) or Adam."""
    if config.name == "rmsprop":
        rule = optax.rmsprop(config.learning_rate, decay=config.alpha, eps=config.eps, eps_in_sqrt=False)
    else:
        rule = optax.adam(config.learning_rate, *config.betas, eps=config.eps)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)


class Outcome(NamedTuple):
    """What happened in one update.

    Attributes:
        rollout: what was acted. losses: scalars, see `a2c_losses`. returns: [T, B].
        metrics: [T, B] each, by name, what the agent measured of its belief.
    """

    rollout: Rollout
    losses: dict[str, Array]
    returns: Array
    metrics: dict[str, Array]


def segment_loss(
    params: nnx.State, carry: Any, seen: Any, way: Backpropagation, rollout: Rollout, config
) -> tuple[Array, Outcome]:
    """The loss of a segment, as a function of the weights, the carry before it and what was `seen` in it."""
    segment = rollout.segment

    def score(_, x):
        step, inputs, trace, timestep, notes = x
        belief, info = replayed(way.agent_of(params).score, notes)(step, inputs, trace, timestep)
        return None, (belief, info.losses, info.metrics)

    _, inputs, steps = way.recur(params, carry, seen, segment)
    xs = (steps, inputs, segment.trace, segment.timesteps, rollout.score_notes)
    _, (beliefs, auxiliary, metrics) = choices.current().over_steps(score, None, xs)
    # Summaries of beliefs depend on no other step: all steps at once.
    agent = way.agent_of(params)
    features = replayed(agent.features, rollout.summary_notes)(beliefs)
    policy = agent.policy(features)
    rewards = config.loss.reward_scale * rollout.env.reward
    if config.loss.lambda_discrepancy_coef:
        returns, auxiliary = lambda_discrepancy.losses(agent.values(features), rollout, rewards, auxiliary, config.loss)
    else:
        returns = n_step_returns(rewards, rollout.env.done, rollout.bootstrap, config.loss.gamma, rollout.end_value)
    judged = (agent.value(features), policy.log_prob(rollout.action), policy.entropy())
    losses = a2c_losses(*judged, auxiliary, returns, rollout.env.valid, config.loss)
    return losses["total"], Outcome(rollout, losses, returns, metrics)


def measure(grads: nnx.State, outcome: Outcome) -> dict[str, Array]:
    """The metrics of one update, by the names under which they are logged."""
    mask = outcome.rollout.env.valid
    measured = {f"loss.{name}": value for name, value in outcome.losses.items()}
    measured |= {name: masked_mean(x, mask) for name, x in outcome.metrics.items()}
    measured["obs.avg_nr_observed"] = masked_mean(outcome.rollout.env.observed.astype(jnp.float32), mask)
    measured["gradient.norm"] = optax.tree.norm(grads)
    return measured


def all_finite(tree: Any) -> Array:
    """Whether no number in a tree of arrays is NaN or inf."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def recover(agent: Agent, actor: Actor, skipped: Array) -> Actor:
    """After a skipped update: belief and previous action start anew where they hold NaN or inf.

    After a good one, a log weight of -inf is a weight of 0 and stays.
    """
    memory = (actor.belief, actor.prev_action)
    broken = skipped & ~jax.vmap(all_finite)(memory)
    num_envs = broken.shape[0]
    belief, prev_action = select(broken, (agent.initial(num_envs), agent.initial_action(num_envs)), memory)
    return Actor(actor.env, belief, prev_action, actor.is_first | broken)


def update(learner, state: TrainState) -> TrainState:
    """One segment and one step of the optimiser; `learner` is a `learner.Learner`.

    If the loss, the gradient or what they would make of the weights has a NaN or inf, the optimiser's step is skipped:
    weights, optimiser, batch-norm averages and averaged metrics stay as they were. The environments have moved on all
    the same. No later gradient goes through the segment just played; beliefs start anew (see `recover`) only where they
    are broken, since what the others remember is true.
    """
    place = state.update % state.window.capacity
    draws = learner.draw(jax.random.fold_in(state.key, state.update))
    rollout = learner.roll_out(state.params, state.batch_stats, state.actor, draws)
    # Put there before it is learned from: what is behind the earlier segments disturbs nobody, and as nobody reads the
    # window of before any more, XLA need not copy it.
    window = state.window.put(rollout.segment, place)
    grads, outcome = learner.learn(state.params, state.batch_stats, rollout, window, place)
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    learned = (optax.apply_updates(state.params, updates), rollout.batch_stats, opt_state)
    good = all_finite((outcome.losses["total"], optax.tree.norm(grads), learned))
    known = (state.params, state.batch_stats, state.opt_state)
    (params, batch_stats, opt_state), skipped_in_row = choices.current().select(
        good, (learned, 0), (known, state.skipped_in_row + 1)
    )
    return TrainState(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        actor=recover(bind(learner.graphdef, params, batch_stats), rollout.actor, ~good),
        window=window.cut(place, ~good),
        episodes=state.episodes.add(rollout.env),
        metrics=state.metrics.add(measure(grads, outcome), good),
        key=state.key,
        update=state.update + 1,
        env_steps=state.env_steps + jnp.sum(rollout.env.valid, dtype=jnp.uint32),
        skipped=state.skipped + ~good,
        skipped_in_row=skipped_in_row,
    )
