"""Playing with given weights, outside of training: evaluations, videos and probes are all made of these turns.

`play` goes on for ever and keeps what it is asked to; `watch` keeps everything, beliefs included, of some turns.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import distrax
import jax
import numpy as np
from flax import nnx

from dvrl_jax import a2c
from dvrl_jax.agents import Agent, bind
from dvrl_jax.agents.base import Prediction
from dvrl_jax.envs import BatchedEnvironment, EnvState
from dvrl_jax.runs import compilation

Array = jax.Array

STEPS_PER_CALL = 100


class Turn(NamedTuple):
    """One observation taken in and one action, for B environments.

    Attributes:
        before: what the environments showed. after: what they answered to the action.
        fresh: [B] bool, it was the first observation of an episode.
        last: the belief that took the observation in, ready to predict from.
        policy: of the B environments. value: [B]. action: [B] or [B, A].
    """

    before: EnvState
    fresh: Array
    last: Prediction
    policy: distrax.Distribution
    value: Array
    action: Array
    after: EnvState


class Watched(NamedTuple):
    """T turns of B environments, every array [T, B, ...]; entry t is what held when action t was chosen.

    Attributes:
        view: the true state, as `BatchedEnvironment.view` shows it.
        obs: the observation that the agent got. observed: bool, it was not blanked.
        fresh: bool, it was the first of an episode; belief and previous action started anew with it.
        belief: the agent's, after that observation: a named tuple, of DVRL `dvrl_jax.agents.dvrl.Belief`.
        value: V. policy: [T, B, A] action probabilities (discrete) or means (continuous). action: [T, B] or [T, B, A].
        reward: of the underlying game, for that action. valid: bool, False for a turn that does not count, because
            the environment only delivered an episode's first observation after it (see `EnvState`).
        game_over: bool, the action ended the game.
    """

    view: Any
    obs: Array
    observed: Array
    fresh: Array
    belief: Any
    value: Array
    policy: Array
    action: Array
    reward: Array
    valid: Array
    game_over: Array


def look(agent: Agent, actor: a2c.Actor, key: Array) -> Prediction:
    """Takes the observation at hand into the belief; the belief is in `Prediction.belief`."""
    draws = jax.tree.map(lambda x: x[0], agent.draw(key, 1, actor.fresh.shape[0]))
    h_prev = agent.restart(actor.belief, actor.fresh).h
    belief, info, prev_action = a2c.observe(agent, actor, draws)
    return Prediction(belief, h_prev, info.trace, prev_action)


def take_turn(
    agent: Agent, env: BatchedEnvironment, actor: a2c.Actor, key: Array, greedy: bool = False
) -> tuple[a2c.Actor, Turn]:
    """Looks, acts, and steps the environment; `greedy` takes the most probable action instead of sampling."""
    look_key, action_key = jax.random.split(key)
    last = look(agent, actor, look_key)
    policy, value = agent.heads(last.belief)
    action = policy.mode() if greedy else policy.sample(seed=action_key)
    state = env.step(actor.env, action)
    turn = Turn(actor.env, actor.fresh, last, policy, value, action, state)
    return a2c.Actor(state, last.belief, agent.action_vector(action), state.done | ~state.valid), turn


def play(
    agent: Agent,
    env: BatchedEnvironment,
    key: Array,
    keep: Callable[[Agent, Turn, Array], Any],
    greedy: bool = False,
    steps_per_call: int = STEPS_PER_CALL,
) -> Iterator[Any]:
    """Plays on and on; each item is what was kept of the next `steps_per_call` turns.

    Args:
        agent: with `use_running_average` set, if it uses batch norm.
        keep: of (agent, turn, key), which arrays to keep of a turn: a pytree.
    Yields:
        what `keep` returned, as NumPy arrays with a leading axis over turns.
    """
    graphdef, weights = nnx.split(agent)

    def step(weights: nnx.State, actor: a2c.Actor, key: Array) -> tuple[a2c.Actor, Any]:
        player = bind(graphdef, weights)
        turn_key, keep_key = jax.random.split(key)
        actor, turn = take_turn(player, env, actor, turn_key, greedy)
        return actor, keep(player, turn, keep_key)

    reset_key, turns_key = jax.random.split(key)
    actor = a2c.first_actor(agent, env.reset(reset_key))
    keys_of = lambda call: jax.random.split(jax.random.fold_in(turns_key, call), steps_per_call)
    # The weights are an argument: one program, compiled once, plays every checkpoint.
    many = lambda weights, actor, keys: jax.lax.scan(functools.partial(step, weights), actor, keys)
    with compilation.cached(env.restorable):
        program = jax.jit(many, compiler_options=compilation.options()).lower(weights, actor, keys_of(0)).compile()
    for call in itertools.count():
        actor, kept = program(weights, actor, keys_of(call))
        yield jax.tree.map(np.asarray, kept)


def seen(env: BatchedEnvironment, turn: Turn) -> Watched:
    """All of a turn, without the leading axis over turns."""
    before, after, policy = turn.before, turn.after, turn.policy
    return Watched(
        view=env.view(before),
        obs=before.obs,
        observed=before.observed,
        fresh=turn.fresh,
        belief=turn.last.belief,
        value=turn.value,
        policy=policy.probs if env.action.discrete else policy.loc,
        action=turn.action,
        reward=after.true_reward,
        valid=after.valid,
        game_over=after.game_over,
    )


def watch(
    agent: Agent,
    env: BatchedEnvironment,
    key: Array,
    steps: int,
    keep: Callable[[Agent, Turn, Array], Any] | None = None,
    greedy: bool = False,
) -> Any:
    """Plays for `steps` turns in all environments, from new games on, and keeps what happened and was believed.

    Args:
        agent: with `use_running_average` set, if it uses batch norm. env: with `keep_view`, unless `keep` is given.
        keep: of (agent, turn, key), which arrays to keep of each turn instead: a pytree of [B, ...]. It is compiled.
        greedy: take the most probable action instead of sampling.
    Returns:
        a `Watched`, or what `keep` returned, of NumPy arrays [steps, B, ...].
    Raises:
        ValueError: `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: must be at least 1")
    keep = keep or (lambda agent, turn, key: seen(env, turn))
    per_call = min(steps, STEPS_PER_CALL)
    stretches = itertools.islice(play(agent, env, key, keep, greedy, per_call), -(-steps // per_call))
    return jax.tree.map(lambda *x: np.concatenate(x)[:steps], *stretches)
