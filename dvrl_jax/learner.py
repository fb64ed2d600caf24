"""Training for one configuration, as pure functions: how a state begins, and the calls that it goes through.

The mathematics of an update is in `a2c.py`, `acting.py` and `bptt.py`. Everything between two log lines, the
environments included, is one call of `Learner.run`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dvrl_jax import agents, choices, envs
from dvrl_jax.a2c import Outcome, make_optimizer, measure, segment_loss, update
from dvrl_jax.acting import Actor, Draws, Rollout, first_actor, make_agent, roll_out
from dvrl_jax.agents import Agent, bind
from dvrl_jax.bptt import Backpropagation, Window
from dvrl_jax.choices import Choices
from dvrl_jax.envs import BatchedEnvironment, EnvState
from dvrl_jax.statistics import EpisodeStatistics, Metrics
from dvrl_jax.train_state import TrainState

Array = jax.Array


def _with_choices(method):
    """A method of `Learner`, traced with its choices in use."""

    @functools.wraps(method)
    def traced(self, *arguments):
        with self.choices.in_use():
            return method(self, *arguments)

    return traced


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """Training for one configuration, as pure functions. `make_learner` makes one.

    Attributes:
        config: a whole configuration, checked. env: where it acts. optimizer: for the weights.
        agent: of arrays without values. graphdef: of the agent, see `agents.bind`.
        choices: how it is computed. way_back: fields of `Backpropagation` besides the agent.
    """

    config: Any
    env: BatchedEnvironment
    optimizer: optax.GradientTransformation
    agent: Agent
    graphdef: nnx.GraphDef
    choices: Choices
    way_back: dict[str, Any]

    def draw(self, key: Array) -> Draws:
        """The randomness of a segment."""
        belief_key, action_key = jax.random.split(key)
        noise = self.agent.draw(belief_key, self.config.num_steps + 1, self.env.num_envs)
        return Draws(noise, jax.random.split(action_key, self.config.num_steps))

    @_with_choices
    def roll_out(self, params: nnx.State, batch_stats: nnx.State, actor: Actor, draws: Draws) -> Rollout:
        """Acts for a segment (see `acting.roll_out`)."""
        truncated = self.config.loss.bootstrap_truncated
        return roll_out(self.graphdef, self.env, params, batch_stats, actor, draws, truncated)

    @_with_choices
    def learn(
        self, params: nnx.State, batch_stats: nnx.State, rollout: Rollout, window: Window, place: Array
    ) -> tuple[nnx.State, Outcome]:
        """Gradient of the loss of the segment just acted, through it and all earlier ones of the window.

        `window` holds them all, the newest in `place`, behind the earlier ones.
        """
        way, loss, inputs = self._loss(params, batch_stats, rollout)
        grads, outcome = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
        return way.through_window(params, window, place, *grads), outcome

    def _loss(self, params: nnx.State, batch_stats: nnx.State, rollout: Rollout):
        """The way back through a window, the loss of its newest segment, and what that is a function of."""
        way = Backpropagation(lambda params: bind(self.graphdef, params, batch_stats), **self.way_back)
        inputs = (params, rollout.segment.carry, way.encode(params, rollout.segment))
        return way, functools.partial(segment_loss, way=way, rollout=rollout, config=self.config), inputs

    def gradient(
        self, params: nnx.State, batch_stats: nnx.State, actor: Actor, window: Window, place: Array, draws: Draws
    ) -> tuple[nnx.State, Outcome]:
        """Acts for a segment and learns from it; `window` holds the earlier ones, and it has that `place` in it."""
        rollout = self.roll_out(params, batch_stats, actor, draws)
        return self.learn(params, batch_stats, rollout, window.put(rollout.segment, place), place)

    @_with_choices
    def update(self, state: TrainState) -> TrainState:
        """One segment and one step of the optimiser (see `a2c.update`)."""
        return update(self, state)

    def run(self, state: TrainState, num_updates: Array) -> TrainState:
        """`num_updates` updates, which is data: one compiled program serves any number."""
        return jax.lax.fori_loop(0, num_updates, lambda _, state: self.update(state), state)

    def init(self, key: Array, env: BatchedEnvironment | None = None) -> TrainState:
        """Fresh weights, fresh episodes, counters at 0.

        `env`: whose episodes these are, where one seed of several has environments of its own (`of_seed`).
        Raises:
            RunError: the environment is not as `BatchedEnvironment` says.
        """
        agent_key, env_key, train_key = jax.random.split(key, 3)
        env = env or self.env
        env_state = env.reset(env_key)
        envs.check(env, env_state)
        return self.restart(self._untrained(agent_key, train_key), env_state)

    @functools.partial(jax.jit, static_argnums=0)
    @_with_choices
    def restart(self, state: TrainState, env_state: EnvState) -> TrainState:
        """Fresh beliefs and an empty window for the episodes that `env_state` begins; all else continues."""
        actor = first_actor(bind(self.graphdef, state.params, state.batch_stats), env_state)

        def first_segment(params, batch_stats, draws):
            rollout = self.roll_out(params, batch_stats, actor, draws)
            _, loss, inputs = self._loss(params, batch_stats, rollout)
            return rollout.segment, measure(params, loss(*inputs)[1])

        segment, measured = jax.eval_shape(first_segment, state.params, state.batch_stats, self.draw(state.key))
        # Where nothing is carried, no gradient crosses segments.
        capacity = self.config.bptt_segments if jax.tree.leaves(segment.carry) else 1
        window = Window.empty(segment, capacity)
        metrics = state.metrics or Metrics.empty(measured)
        state = state._replace(actor=actor, window=window, metrics=metrics, episodes=state.episodes.restart())
        return jax.tree.map(jnp.copy, state)  # No two leaves may share a buffer: `run`'s argument is donated.

    @functools.partial(jax.jit, static_argnums=0)
    def _untrained(self, agent_key: Array, train_key: Array) -> TrainState:
        """Fresh weights and counters at 0, without environments."""
        agent = make_agent(self.config, self.env, agent_key)
        _, params, batch_stats = nnx.split(agent, nnx.Param, nnx.BatchStat)
        none = jnp.zeros((), jnp.int32)
        return TrainState(
            params=params,
            batch_stats=batch_stats,
            opt_state=self.optimizer.init(params),
            actor=(),
            window=(),
            episodes=EpisodeStatistics.empty(self.env.num_envs),
            metrics=(),
            key=train_key,
            update=none,
            env_steps=jnp.zeros((), jnp.uint32),
            skipped=none,
            skipped_in_row=none,
        )


def make_learner(config, env: BatchedEnvironment, use: Choices | None = None) -> Learner:
    """Training for a configuration in an environment; `use` are the choices, by default the back end's fastest.

    Raises:
        RunError: the agent's beliefs are not as `Agent` says.
    """
    use = use or choices.current()
    agent = nnx.eval_shape(lambda: make_agent(config, env, jax.random.key(0)))
    graphdef, *weights = nnx.split(agent, nnx.Param, nnx.BatchStat)
    jax.eval_shape(lambda *states: agents.check(bind(graphdef, *states), env.num_envs), *weights)
    return Learner(config, env, make_optimizer(config.optimizer), agent, graphdef, use, _fast_ways(use, agent))


def _fast_ways(use: Choices, agent: Agent) -> dict[str, Any]:
    """Those ways back through a window that are in use and fit the agent, as fields of `Backpropagation`."""
    found = {}
    if use.lineages:
        from dvrl_jax.fast import lineages

        if lineages.apply_to(agent):
            found["through_recurrence"] = lineages.through_recurrence
    if use.distinct:
        from dvrl_jax.fast import distinct

        if distinct.apply_to(agent):
            found["through_encoder"] = distinct.through_encoder
    return found
