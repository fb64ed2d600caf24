"""Advantage actor-critic: the losses, and the whole hot loop.

A *segment* is `num_steps` environment steps followed by one update of the weights. An update first *acts* for a
segment, without gradients, and keeps what was computed on the way. Then it *learns*: the encoder and the recurrence of
the segment run once more, then what each step foresaw and chose, and this is what is differentiated (see `tape.py` for
why the second pass is nearly free). From the beginning of the segment the gradient goes on through the earlier ones of
the window (`bptt.py`).

`make_learner` returns the pure functions that training consists of. Everything between two log lines, the
environments included, is one call of `Learner.run`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dvrl_jax import agents, envs
from dvrl_jax.agents import NO_TAPES, Agent, Tapes, UpdateInfo, bind
from dvrl_jax.bptt import Notes, Replay, Segment, Window, over_steps
from dvrl_jax.envs import BatchedEnvironment, EnvState
from dvrl_jax.fast.distinct import is_blank
from dvrl_jax.statistics import EpisodeStatistics, Metrics
from dvrl_jax.tape import Player, Recorder

Array = jax.Array

# --- Returns, losses, optimiser: the mathematics ---------------------------------------------------------------------


def n_step_returns(rewards: Array, dones: Array, bootstrap: Array, gamma: float) -> Array:
    """R_t = r_t + gamma * (1 - done_t) * R_{t+1}, with R_T the bootstrap value (Mnih et al., 2016).

    Args:
        rewards: [T, B]. dones: [T, B] bool. bootstrap: [B], value of the observation after the last step.
    Returns:
        returns [T, B]; no gradient passes.
    """
    chex.assert_equal_shape([rewards, dones])

    def step(following, inputs):
        reward, done = inputs
        following = reward + gamma * jnp.where(done, 0.0, following)
        return following, following

    _, returns = jax.lax.scan(step, bootstrap, (rewards, dones), reverse=True)
    return jax.lax.stop_gradient(returns)


class Losses(NamedTuple):
    """Scalar losses; `total` is the weighted sum that is minimised."""

    total: Array
    value: Array
    action: Array
    entropy: Array
    encoding: Array


def masked_mean(x: Array, mask: Array) -> Array:
    """Mean of x over the entries where mask (same shape) is True; 0 if there are none."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def a2c_losses(
    value: Array, log_prob: Array, entropy: Array, encoding_loss: Array, returns: Array, mask: Array, coefs
) -> Losses:
    """L = c_v mean (R-V)^2 - c_a mean stopgrad(R-V) log pi(a) - c_h mean H + c_enc mean(-ELBO).

    Args:
        value, log_prob, entropy, encoding_loss, returns: [T, B].
        mask: [T, B], which steps were valid; the means are over those.
        coefs: has `value_coef`, `action_coef`, `entropy_coef`, `encoding_coef`.
    """
    chex.assert_equal_shape([value, log_prob, entropy, encoding_loss, returns, mask])
    advantage = returns - value
    value_loss = masked_mean(jnp.square(advantage), mask)
    action_loss = -masked_mean(jax.lax.stop_gradient(advantage) * log_prob, mask)
    entropy_mean = masked_mean(entropy, mask)
    encoding = masked_mean(encoding_loss, mask)
    total = coefs.value_coef * value_loss + coefs.action_coef * action_loss
    total += coefs.encoding_coef * encoding - coefs.entropy_coef * entropy_mean
    return Losses(total, value_loss, action_loss, entropy_mean, encoding)


def make_optimizer(config) -> optax.GradientTransformation:
    """Clips the global gradient norm, then RMSProp (eps outside the square root, as in PyTorch) or Adam."""
    if config.name == "rmsprop":
        rule = optax.rmsprop(config.learning_rate, decay=config.alpha, eps=config.eps, eps_in_sqrt=False)
    else:
        rule = optax.adam(config.learning_rate, *config.betas, eps=config.eps)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)


# --- State -----------------------------------------------------------------------------------------------------------


class Actor(NamedTuple):
    """What acting carries from step to step.

    Attributes:
        env: with the observation to act on next. belief: before that observation. prev_action: [B, A].
        fresh: [B], the next observation is the first of an episode: belief and previous action start anew.
    """

    env: EnvState
    belief: Any
    prev_action: Array
    fresh: Array


class TrainState(NamedTuple):
    """Everything training carries. `update` counts updates; `env_steps` counts valid steps (uint32).

    `skipped` counts the updates that were left out because something was not finite, `skipped_in_row` the latest such
    without a good one in between. The randomness of update i comes from `key` and i alone.
    """

    params: nnx.State
    batch_stats: nnx.State
    opt_state: optax.OptState
    actor: Actor
    window: Window
    episodes: EpisodeStatistics
    metrics: Metrics
    key: Array
    update: Array
    env_steps: Array
    skipped: Array
    skipped_in_row: Array


class Draws(NamedTuple):
    """Randomness of one segment: the belief's, for T + 1 updates, and a key per step to sample actions with.

    `action` [T, B, ...], if not None, are the actions to take instead of sampling.
    """

    belief: Any
    action_keys: Array
    action: Array | None = None


class Rollout(NamedTuple):
    """What acting for a segment leaves.

    Attributes:
        actor, batch_stats: after the segment.
        segment: for unrolling it again. weigh_notes, summary_notes: the notes that `segment` leaves out.
        action: [T, B, ...] taken. env: [T, B] outcomes of the steps; obs, final_obs and inner left out.
        bootstrap: [B], the value of the last observation.
    """

    actor: Actor
    batch_stats: nnx.State
    segment: Segment
    weigh_notes: tuple
    summary_notes: tuple
    action: Array
    env: EnvState
    bootstrap: Array


class Steps(NamedTuple):
    """What learning sees of each step, each [T, B]; `metrics` maps names to [T, B]."""

    value: Array
    log_prob: Array
    entropy: Array
    encoding_loss: Array
    metrics: dict[str, Array]


class Outcome(NamedTuple):
    """All that happened in one update: the rollout, each step as learned from, the losses and the returns [T, B]."""

    rollout: Rollout
    steps: Steps
    losses: Losses
    returns: Array


class Learner(NamedTuple):
    """The pure functions of training for one configuration; see `make_learner`."""

    init: Callable[[Array], TrainState]
    restart: Callable[[TrainState, EnvState], TrainState]
    run: Callable[[TrainState, Array], TrainState]
    roll_out: Callable[..., Rollout]
    gradient: Callable[..., tuple[nnx.State, Outcome]]
    draw: Callable[[Array], Draws]
    graphdef: nnx.GraphDef


# --- Steps of the loop that need no configuration ---------------------------------------------------------------------


def make_agent(config, env: BatchedEnvironment, key: Array) -> Agent:
    """Makes the agent that `config.algorithm` names, with fresh weights."""
    return agents.named()[config.algorithm](config.model, env.observation, env.action, rngs=nnx.Rngs(key))


def first_actor(agent: Agent, env: EnvState) -> Actor:
    """An actor with fresh beliefs for the episodes that `env` begins."""
    num_envs = env.done.shape[0]
    fresh = jnp.ones(num_envs, bool)
    return Actor(env, agent.initial(num_envs), agent.initial_action(num_envs), fresh)


def observe(agent: Agent, actor: Actor, draws: Any, tapes: Tapes = NO_TAPES) -> tuple[Any, UpdateInfo, Array]:
    """Updates the belief with the observation at hand, afresh where an episode starts.

    Returns (belief, by-products, the previous action [B, A] that was used).
    """
    belief = agent.restart(actor.belief, actor.fresh)
    first = agent.initial_action(actor.fresh.shape[0])
    prev_action = jnp.where(actor.fresh[:, None], first, actor.prev_action)
    inputs = agent.encode(actor.env.obs, prev_action, tapes)
    belief, info = agent.update(belief, inputs, actor.env.obs, draws, tapes)
    return belief, info, prev_action


def choose(condition: Array, yes: Any, no: Any) -> Any:
    """The first of two pytrees where the condition [] holds, else the second."""
    if jax.default_backend() == "gpu":
        # A conditional would wait until the processor, which launches its code, knows the condition.
        condition = jax.lax.optimization_barrier(condition)
        return jax.tree.map(lambda yes, no: jnp.where(condition, yes, no), yes, no)
    # On a CPU a choice per array would repeat all that the condition takes in each one's code.
    return jax.lax.cond(condition, lambda: yes, lambda: no)


def all_finite(tree: Any) -> Array:
    """Whether every number in a tree of arrays is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def recover(actor: Actor, skipped: Array) -> Actor:
    """After a skipped update: belief and previous action start anew where they hold a number that is not finite.

    After a good one, a log weight of -inf is a weight of 0 and stays.
    """
    memory = (actor.belief, actor.prev_action)
    broken = skipped & ~jax.vmap(all_finite)(memory)
    belief, prev_action = Agent.restart(memory, broken)
    return Actor(actor.env, belief, prev_action, actor.fresh | broken)


def measure(grads: nnx.State, outcome: Outcome) -> dict[str, Array]:
    """The metrics of one update, by the names under which they are logged."""
    steps, env = outcome.steps, outcome.rollout.env
    mask = env.valid
    measured = {f"loss.{name}": value for name, value in outcome.losses._asdict().items()}
    measured |= {name: masked_mean(x, mask) for name, x in steps.metrics.items()}
    measured["obs.avg_nr_observed"] = masked_mean(env.observed.astype(jnp.float32), mask)
    measured["gradient.norm"] = optax.tree.norm(grads)
    return measured


# --- The loop --------------------------------------------------------------------------------------------------------


def make_learner(config, env: BatchedEnvironment) -> Learner:
    """Builds training for a configuration and an environment.

    Returns a `Learner` of functions: `init(key)` makes the state, `restart` gives it new episodes, `run(state, n)` does
    n updates (n is data: one compiled program serves all; fewer, if too many in a row are skipped), `roll_out` acts for
    a segment, `gradient` is the gradient across the window, and `draw` makes a segment's randomness.

    Raises:
        RunError: the agent's beliefs are not as `Agent` says.
    """
    num_envs, num_steps, gamma = env.num_envs, config.num_steps, config.loss.gamma
    optimizer = make_optimizer(config.optimizer)
    abstract_agent = nnx.eval_shape(lambda: make_agent(config, env, jax.random.key(0)))
    graphdef, _, _ = nnx.split(abstract_agent, nnx.Param, nnx.BatchStat)

    def agent_of(params, batch_stats) -> Agent:
        return bind(graphdef, params, batch_stats)

    abstract = nnx.split(abstract_agent, nnx.Param, nnx.BatchStat)[1:]
    agent_verbs = agent_of(*abstract)
    jax.eval_shape(lambda *states: agents.check(agent_of(*states), num_envs), *abstract)

    # A GPU takes all particles at once with as many kernels as a few of them.
    by_lineages = agent_verbs.has_lineages and jax.default_backend() != "gpu"

    def replay_with(batch_stats: nnx.State) -> Replay:
        return Replay(lambda params: agent_of(params, batch_stats), by_lineages)

    def draw(key: Array) -> Draws:
        belief_key, action_key = jax.random.split(key)
        belief = agent_verbs.draw(belief_key, num_steps + 1, num_envs)
        return Draws(belief, jax.random.split(action_key, num_steps))

    def act(params: nnx.State, carry: tuple[Actor, nnx.State], draws: Draws):
        """One step: update the belief, choose an action, step the environment."""
        actor, batch_stats = carry
        agent = agent_of(params, batch_stats)
        tapes = Tapes(*(Recorder() for _ in Tapes._fields))
        belief, info, prev_action = observe(agent, actor, draws.belief, tapes)
        policy = agent.policy(agent.policy_features(belief, tapes.summarise))
        action = policy.sample(seed=draws.action_keys) if draws.action is None else draws.action
        outcome = env.step(actor.env, action)
        # A step that ends an episode, or a call that delivered a new episode's first frame.
        fresh = outcome.done | ~outcome.valid
        notes = Notes(*(tape.notes for tape in tapes))
        obs, kept_notes = actor.env.obs, notes._replace(weigh=(), summarise=())
        kept = (actor.belief.h, obs, is_blank(obs), prev_action, actor.fresh, info.trace, kept_notes)
        actor = Actor(outcome, belief, agent.action_vector(action), fresh)
        outcome = outcome._replace(inner=(), obs=(), final_obs=())
        return (actor, nnx.state(agent, nnx.BatchStat)), (kept, notes.weigh, notes.summarise, action, outcome)

    def roll_out(params: nnx.State, batch_stats: nnx.State, actor: Actor, draws: Draws) -> Rollout:
        """Acts for one segment; no gradient is taken of this."""
        step_draws = draws._replace(belief=jax.tree.map(lambda x: x[:-1], draws.belief))
        (end, batch_stats), (kept, *rest) = over_steps(
            lambda carry, x: act(params, carry, x), (actor, batch_stats), step_draws
        )
        # The value of the latest observation, by one more belief update that leaves no trace.
        agent = agent_of(params, batch_stats)
        belief, _, _ = observe(agent, end, jax.tree.map(lambda x: x[-1], draws.belief))
        bootstrap = agent.value(agent.policy_features(belief))
        return Rollout(end, batch_stats, Segment(*kept), *rest, bootstrap)

    def segment_loss(
        params: nnx.State, h: Array, seen: Any, batch_stats: nnx.State, rollout: Rollout
    ) -> tuple[Array, Outcome]:
        """The loss of a segment, as a function of the weights, the recurrent state h before it and what was `seen`."""
        segment = rollout.segment

        def weigh(_, x):
            step, inputs, trace, obs, notes = x
            belief, info = agent_of(params, batch_stats).weigh(step, inputs, trace, obs, Player(notes))
            return None, (belief, info.encoding_loss, info.metrics)

        inputs, steps = replay_with(batch_stats).recur(params, h, seen, segment)
        xs = (steps, inputs, segment.trace, segment.obs, rollout.weigh_notes)
        _, (beliefs, *weighed) = over_steps(weigh, None, xs)
        # Summaries of beliefs depend on no other step: all steps at once.
        agent = agent_of(params, batch_stats)
        features = agent.policy_features(beliefs, Player(rollout.summary_notes, steps=1))
        policy = agent.policy(features)
        judged = agent.value(features), policy.log_prob(rollout.action), policy.entropy()
        steps = Steps(*judged, *weighed)
        reward = config.loss.reward_scale * rollout.env.reward
        returns = n_step_returns(reward, rollout.env.done, rollout.bootstrap, gamma)
        losses = a2c_losses(*steps[:4], returns, rollout.env.valid, config.loss)
        return losses.total, Outcome(rollout, steps, losses, returns)

    def learn(params, batch_stats, rollout: Rollout, window: Window) -> tuple[nnx.State, Outcome]:
        """Gradient of the loss of the segment just acted, through it and all earlier ones of the window.

        `window` holds them all, the newest in place `length`, behind the earlier ones.
        """
        replay, segment = replay_with(batch_stats), rollout.segment
        grads, outcome = jax.grad(segment_loss, argnums=(0, 1, 2), has_aux=True)(
            params, segment.h[0], replay.see(params, segment), batch_stats, rollout
        )
        return replay.go_back(params, window, *grads), outcome

    def gradient(params, batch_stats, actor: Actor, window: Window, draws: Draws) -> tuple[nnx.State, Outcome]:
        """Acts for a segment and learns from it; `window` holds the earlier ones."""
        rollout = roll_out(params, batch_stats, actor, draws)
        return learn(params, batch_stats, rollout, window.put(rollout.segment))

    def update(state: TrainState) -> TrainState:
        """One segment and one step of the optimiser.

        If the loss, the gradient or what they would make of the weights is not finite, the step of the optimiser is
        skipped: weights, optimiser, batch-norm averages and averaged metrics stay as they were. The environments have
        moved on all the same. The window starts anew, because no gradient may be sent through the segment just
        played; beliefs start anew (see `recover`) only where they are broken, since what the others remember is true.
        """
        draws = draw(jax.random.fold_in(state.key, state.update))
        rollout = roll_out(state.params, state.batch_stats, state.actor, draws)
        # Put there before it is learned from: what is behind the earlier segments disturbs nobody, and as nobody reads
        # the window of before any more, XLA need not copy it.
        window = state.window.put(rollout.segment)
        grads, outcome = learn(state.params, state.batch_stats, rollout, window)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learned = (optax.apply_updates(state.params, updates), rollout.batch_stats, opt_state)
        finite = all_finite((outcome.losses.total, optax.tree.norm(grads), learned))
        known = (state.params, state.batch_stats, state.opt_state)
        (params, batch_stats, opt_state), skipped_in_row = choose(
            finite, (learned, 0), (known, state.skipped_in_row + 1)
        )
        good = skipped_in_row == 0
        return TrainState(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            actor=recover(rollout.actor, ~good),
            window=window._replace(length=jnp.where(good, window.counted().length, 0)),
            episodes=state.episodes.add(rollout.env),
            metrics=state.metrics.add(measure(grads, outcome), good),
            key=state.key,
            update=state.update + 1,
            env_steps=state.env_steps + jnp.sum(rollout.env.valid, dtype=jnp.uint32),
            skipped=state.skipped + ~good,
            skipped_in_row=skipped_in_row,
        )

    def run(state: TrainState, num_updates: Array) -> TrainState:
        last = state.update + num_updates
        may_go_on = lambda state: (state.update < last) & (state.skipped_in_row < config.max_skipped_updates)
        return jax.lax.while_loop(may_go_on, update, state)

    @jax.jit
    def restart(state: TrainState, env_state: EnvState) -> TrainState:
        """Fresh beliefs and an empty window for the episodes that `env_state` begins; all else continues."""
        actor = first_actor(agent_verbs, env_state)
        draws = jax.eval_shape(draw, state.key)
        rollout = jax.eval_shape(roll_out, state.params, state.batch_stats, actor, draws)
        seen = jax.eval_shape(replay_with(state.batch_stats).see, state.params, rollout.segment)
        _, outcome = jax.eval_shape(segment_loss, state.params, actor.belief.h, seen, state.batch_stats, rollout)
        window = Window.empty(rollout.segment, config.bptt_segments)
        metrics = state.metrics or Metrics.empty(jax.eval_shape(measure, state.params, outcome))
        state = state._replace(actor=actor, window=window, metrics=metrics, episodes=state.episodes.restart())
        return jax.tree.map(jnp.copy, state)  # No two leaves may share a buffer: `run`'s argument is donated.

    @jax.jit
    def untrained(agent_key: Array, train_key: Array) -> TrainState:
        """Fresh weights and counters at 0, without environments."""
        _, params, batch_stats = nnx.split(make_agent(config, env, agent_key), nnx.Param, nnx.BatchStat)
        return TrainState(
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            actor=(),
            window=(),
            episodes=EpisodeStatistics.empty(num_envs),
            metrics=(),
            key=train_key,
            update=jnp.zeros((), jnp.int32),
            env_steps=jnp.zeros((), jnp.uint32),
            skipped=jnp.zeros((), jnp.int32),
            skipped_in_row=jnp.zeros((), jnp.int32),
        )

    def init(key: Array) -> TrainState:
        """Fresh weights, fresh episodes, counters at 0. Not to be compiled: it resets the environments.

        Raises:
            RunError: the environment is not as its interface says.
        """
        agent_key, env_key, train_key = jax.random.split(key, 3)
        env_state = env.reset(env_key)
        envs.check(env, env_state)
        return restart(untrained(agent_key, train_key), env_state)

    return Learner(init, restart, run, roll_out, gradient, draw, graphdef)
