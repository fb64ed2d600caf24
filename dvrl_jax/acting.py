"""Acting: an agent updates its belief, chooses an action and steps the environments. Nothing here is differentiated.

Training acts for a segment at a time (`roll_out`) and keeps what learning needs. Playing and evaluation use the same
`observe`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import agents, choices
from dvrl_jax.agents import Agent, Timestep, UpdateInfo, bind
from dvrl_jax.bptt import RecurrenceNotes, Segment
from dvrl_jax.envs import BatchedEnvironment, EnvState
from dvrl_jax.networks import name_layers
from dvrl_jax.notes import Notes, recorded

Array = jax.Array


class Actor(NamedTuple):
    """What acting carries from step to step.

    Attributes:
        env: with the observation to act on next. belief: before that observation. prev_action: [B, A].
        is_first: [B], that observation is the first of an episode: belief and previous action start anew.
    """

    env: EnvState
    belief: Any
    prev_action: Array
    is_first: Array


class Draws(NamedTuple):
    """Randomness of one segment.

    Attributes:
        noise: the beliefs', for T + 1 updates. action_keys: [T], to sample actions with.
        action: [T, B, ...], if not None, the actions to take instead of sampling.
    """

    noise: Any
    action_keys: Array
    action: Array | None = None


class Rollout(NamedTuple):
    """What acting for a segment leaves.

    Attributes:
        actor, batch_stats: after the segment.
        segment: for taking its recurrence again. score_notes, summary_notes: what else was noted, of T steps.
        action: [T, B, ...] taken. env: [T, B] outcomes of the steps; observations and inner states left out.
        bootstrap: [B], value of the last observation. end_value: [T, B], stands in the return where an episode ends.
        Of two value heads [2, B] and [T, 2, B].
    """

    actor: Actor
    batch_stats: nnx.State
    segment: Segment
    score_notes: Notes
    summary_notes: Notes
    action: Array
    env: EnvState
    bootstrap: Array
    end_value: Array


def make_agent(config, env: BatchedEnvironment, key: Array) -> Agent:
    """Makes the agent that `config.algorithm` names, with fresh weights."""
    agent = agents.named()[config.algorithm](config.model, env.observation, env.action, rngs=nnx.Rngs(key))
    if config.loss.lambda_discrepancy_coef:
        agent.add_second_value(rngs=nnx.Rngs(jax.random.fold_in(key, 1)))
    name_layers(agent)
    return agent


def first_actor(agent: Agent, env: EnvState) -> Actor:
    """An actor with fresh beliefs for the episodes that `env` begins."""
    num_envs = env.done.shape[0]
    is_first = jnp.ones(num_envs, bool)
    return Actor(env._replace(final_obs=()), agent.initial(num_envs), agent.initial_action(num_envs), is_first)


def timestep_of(agent: Agent, actor: Actor) -> Timestep:
    """What the agent gets to see next."""
    first_action = agent.initial_action(actor.is_first.shape[0])
    prev_action = jnp.where(actor.is_first[:, None], first_action, actor.prev_action)
    return Timestep(actor.env.obs, prev_action, jnp.where(actor.is_first, 0.0, actor.env.reward), actor.is_first)


def observe(agent: Agent, actor: Actor, noise: Any) -> tuple[Any, UpdateInfo]:
    """Updates the belief with the observation at hand, anew where an episode begins."""
    return agent.update(agent.restart(actor.belief, actor.is_first), timestep_of(agent, actor), noise)


def value_of(agent: Agent, actor: Actor, noise: Any) -> Array:
    """The value [B] ([2, B] of two heads) of the observation at hand, by a belief update that leaves no trace."""
    belief, _ = observe(agent, actor, noise)
    return agent.values(agent.features(belief))


def act(
    graphdef: nnx.GraphDef,
    env: BatchedEnvironment,
    params: nnx.State,
    carry: tuple[Actor, nnx.State],
    draws: Draws,
    next_noise: Any | None,
) -> tuple[tuple[Actor, nnx.State], tuple[Segment, dict[str, Any]]]:
    """One step: update the belief, choose an action, step the environments.

    `draws` are one step's. With `next_noise`, where an episode is cut off the value of its last observation is kept.

    Returns:
        the carry (actor, batch_stats); and of the step, without leading axis, a segment and other fields of `Rollout`.
    """
    actor, batch_stats = carry
    agent = bind(graphdef, params, batch_stats)
    timestep, belief = timestep_of(agent, actor), agent.restart(actor.belief, actor.is_first)

    seen, encode_notes = recorded(agent.encode_observation)(timestep.obs)
    inputs, context_notes = recorded(agent.add_context)(seen, timestep)
    trace = agent.sample_trace(belief, draws.noise)
    step, advance_notes = recorded(agent.advance)(belief.carry, inputs, trace)
    scored, score_notes = recorded(agent.score)(step, inputs, trace, timestep)
    belief, _ = agent.check_score(step, scored)
    features, summary_notes = recorded(agent.features)(belief)
    action = agent.policy(features).sample(seed=draws.action_keys) if draws.action is None else draws.action

    outcome = env.step(actor.env, action)
    # A transition that ends an episode, or a call that delivered a new episode's first observation.
    is_first = outcome.done | ~outcome.valid
    after = Actor(outcome._replace(final_obs=()), belief, agent.action_vector(action), is_first)
    end_value = jnp.zeros_like(outcome.reward)
    if next_noise is not None:
        last = after._replace(env=outcome._replace(obs=outcome.final_obs), is_first=jnp.zeros_like(is_first))
        value = value_of(bind(graphdef, params, batch_stats), last, next_noise)
        end_value = jnp.where(outcome.truncated, value, 0.0)
    rest = {"score_notes": score_notes, "summary_notes": summary_notes, "action": action, "end_value": end_value}
    rest["env"] = outcome._replace(inner=(), obs=(), final_obs=())
    segment = Segment((), timestep, trace, RecurrenceNotes(encode_notes, context_notes, advance_notes))
    return (after, nnx.state(agent, nnx.BatchStat)), (segment, rest)


def roll_out(
    graphdef: nnx.GraphDef,
    env: BatchedEnvironment,
    params: nnx.State,
    batch_stats: nnx.State,
    actor: Actor,
    draws: Draws,
    bootstrap_truncated: bool = False,
) -> Rollout:
    """Acts for one segment.

    Where an episode ends, its return ends with 0; with `bootstrap_truncated`, where it was cut off without having
    terminated, with the value of its last observation, by one more belief update (whose noise is the next step's).
    """
    cut = lambda *ends: jax.tree.map(lambda x: x[slice(*ends)], draws.noise)
    xs = (draws._replace(noise=cut(-1)), cut(1, None) if bootstrap_truncated else None)
    step = lambda carry, x: act(graphdef, env, params, carry, *x)
    (end, batch_stats), (segment, rest) = choices.current().over_steps(step, (actor, batch_stats), xs)
    # The value of the latest observation, which the next segment takes in again, with new weights, as its first.
    last_noise = jax.tree.map(lambda x: x[-1], draws.noise)
    return Rollout(
        actor=end,
        batch_stats=batch_stats,
        segment=segment._replace(carry=actor.belief.carry),
        bootstrap=value_of(bind(graphdef, params, batch_stats), end, last_noise),
        **rest,
    )
