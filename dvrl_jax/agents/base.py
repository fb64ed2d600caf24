"""What every agent can do with a belief, and the actor and critic that all agents share.

An agent is an NNX module with these verbs (shapes: `B` environments, `A` actions):

    initial(B)                                       the belief before the first observation
    see(obs)                             what the observation contributes to the step, once per environment
    add_action(seen, prev_action)        the step's inputs: that, and what the action contributes
    encode(obs, prev_action)             both
    draw(key, steps, B)                  the random numbers that `steps` belief updates need
    choose(belief, draws)                the trace: all draws and discrete choices of the next step, no gradient
    transition(h, inputs, trace)         the step of the recurrence, and nothing that only losses and heads need
    weigh(step, inputs, trace, obs)      the belief after the step, with the loss that trains it
    update(belief, inputs, obs, draws)   choose, transition and weigh: one more observation taken in
    summarise(belief)                    one vector per environment for actor and critic
    heads(belief)                        the policy and the value
    predict(last, times, key)            observations expected some steps ahead

`transition` is the only path along which gradients cross steps and segments. `see`, `add_action`, `transition`, `weigh`
and `summarise` take a tape besides, to which they hand their costly products, always in the same order (see `tape.py`).
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import distrax
import jax
import jax.numpy as jnp
from flax import nnx

from dvrl_jax import networks
from dvrl_jax.envs.base import ActionSpec, ObservationSpec
from dvrl_jax.errors import RunError
from dvrl_jax.tape import NO_TAPE, Tape

Array = jax.Array

GAUSSIAN_HEAD_GAIN = 0.01  # Initial factor on the weights of a continuous policy's mean.


class UpdateInfo(NamedTuple):
    """By-products of one belief update.

    Attributes:
        trace: pytree, what `transition` needs to take the step again; no gradient passes.
        encoding_loss: [B] loss that trains the belief itself (-ELBO for DVRL).
        metrics: [B] arrays by metric name.
    """

    trace: Any
    encoding_loss: Array
    metrics: dict[str, Array]


class Tapes(NamedTuple):
    """The tapes of one belief update and its summary."""

    see: Tape = NO_TAPE
    add_action: Tape = NO_TAPE
    transition: Tape = NO_TAPE
    weigh: Tape = NO_TAPE
    summarise: Tape = NO_TAPE


NO_TAPES = Tapes()


class Inputs(NamedTuple):
    """Inputs of one step, encoded once per environment.

    Attributes:
        drive: pytree of [B, ...], what observation and action contribute to the recurrence.
        phi_a: [B, E] the encoded previous action, None without action encoding.
    """

    drive: Any
    phi_a: Array | None


class Prediction(NamedTuple):
    """What predictions start from: a belief and the update that led to it.

    Attributes:
        belief: the belief after the last observation.
        h_prev: the `h` it was updated from. trace: the update's trace. prev_action: [B, A], which led to the
        observation and is assumed to be repeated.
    """

    belief: Any
    h_prev: Array
    trace: Any
    prev_action: Array


def bind(graphdef: nnx.GraphDef, *states: nnx.State) -> "Agent":
    """The agent with these weights and averages, for use inside one transformation (a jit, a scan, a vmap).

    The containers are copied, so that batch norm may update its averages there and leaves those outside alone.
    """
    return nnx.merge(graphdef, *jax.tree.map(lambda x: x, states))


def check(agent: "Agent", num_envs: int) -> None:
    """Makes sure that an agent's beliefs are as `Agent.initial` says.

    Raises:
        RunError: they are not.
    """
    belief = agent.initial(num_envs)
    h = getattr(belief, "h", None)
    if not hasattr(belief, "_replace") or not hasattr(h, "shape") or h.shape[:1] != (num_envs,):
        raise RunError(
            f"{type(agent).__name__}: initial returns {type(belief).__name__}, and must return a named tuple with the "
            f"field h, one array [{num_envs}, ...]; several recurrent arrays are put together into one"
        )


class Agent(nnx.Module, abc.ABC):
    """Encoders, actor and critic; subclasses add the belief.

    Attributes:
        name: what configurations call it (`algorithm`).
        settings: what may be set about it alone, with defaults: fields of the `model` group of its configurations.
        has_lineages: whether h is of particles, [B, K, ...], that know nothing of each other and of which some have no
        descendants. Learning then goes back through the others alone (see `lineages.py`). It takes traces that have
        `ancestors` [B, K], and a `transition` that lets h be inherited from those and then calls `advance`, which
        can be asked for some of the particles as well.
    """

    name: str | None = None
    settings: Mapping[str, Any] = {}
    has_lineages = False

    def __init__(self, config, observation: ObservationSpec, action: ActionSpec, *, rngs: nnx.Rngs):
        """Makes the networks for `config` (the `model` group of a configuration).

        Raises:
            ValueError: the networks do not fit the observation.
        """
        self.observation = observation
        self.action = action
        self.h_dim = config.h_dim
        self.detach_encoder = config.detach_encoder
        # Set for evaluation with few environments: batch norm then uses its running averages.
        self.use_running_average = False
        self.encoder = networks.Encoder(observation.shape, config.channels, config.batch_norm, rngs=rngs)
        self.encoded_size = 1
        for size in networks.encoded_shape(observation.shape, config.channels):
            self.encoded_size *= size
        # Sizes of the blocks that phi_o and phi_a feed in every layer that reads them.
        self.input_sizes = {"obs": self.encoded_size}
        self.action_sizes = {}
        if config.action_encoding > 0:
            self.action_sizes = {"action": config.action_encoding}
            self.action_encoder = networks.Linear({"x": action.size}, config.action_encoding, rngs=rngs)
            self.action_activation = networks.Activation(config.action_encoding, config.batch_norm)
        self.input_sizes |= self.action_sizes
        self.summary_norm = networks.BatchNorm(config.h_dim) if config.policy_batch_norm else None
        self.value_head = networks.Linear({"x": config.h_dim}, 1, rngs=rngs)
        gain = networks.RELU_GAIN * (1.0 if action.discrete else GAUSSIAN_HEAD_GAIN)
        self.policy_head = networks.Linear({"x": config.h_dim}, action.size, gain=gain, rngs=rngs)
        if not action.discrete:
            self.log_std = nnx.Param(jnp.zeros(action.size))

    def add_emission(self, sizes: Mapping[str, int], config, *, rngs: nnx.Rngs) -> None:
        """Makes the networks that foresee an observation, for agents that do: p(o), from inputs of these sizes."""
        self.emission_hidden = networks.Linear(sizes, self.encoded_size, rngs=rngs)
        self.emission_activation = networks.Activation(self.encoded_size, config.batch_norm)
        self.decoder = networks.make_decoder(self.observation.shape, config.channels, config.batch_norm, rngs=rngs)

    def encode(self, obs: Array, prev_action: Array, tapes: Tapes = NO_TAPES) -> Inputs:
        """Encodes obs [B, ...] (uint8 are pixels, 0..255) and prev_action [B, A]."""
        return self.add_action(self.see(obs, tapes.see), prev_action, tapes.add_action)

    def see(self, obs: Array, tape: Tape = NO_TAPE) -> Any:
        """What obs [B, ...], or of several steps [T, B, ...], adds to the recurrence (see `drive`)."""
        return self.drive({"obs": self.encoder(self.as_float(obs), self.use_running_average, tape)})

    def add_action(self, seen: Any, prev_action: Array, tape: Tape = NO_TAPE) -> Inputs:
        """The inputs of a step that has `seen` an observation after prev_action [B, A], or of several [T, B, A]."""
        phi_a = self.encode_action(prev_action, tape)
        if phi_a is None:
            return Inputs(seen, None)
        return Inputs(jax.tree.map(jnp.add, seen, self.drive({"action": phi_a})), phi_a)

    @abc.abstractmethod
    def drive(self, encoded: dict[str, Array]) -> Any:
        """Products of an encoded input, `obs` [B, F] or `action` [B, E], with the recurrence's kernels.

        It is asked for each input by itself, and what it returns, a pytree of [B, D], is added up: no bias belongs in
        it. Learning asks for several steps at once, [T, B, F] or [T, B, E], or for single images of many, [R, F].
        """

    def encode_action(self, prev_action: Array, tape: Tape = NO_TAPE) -> Array | None:
        """phi_a [B, E] of prev_action [B, A]; None without action encoding."""
        chex.assert_rank(prev_action, 2 + tape.steps)
        if not self.action_sizes:
            return None
        return self.action_activation(self.action_encoder(x=prev_action), self.use_running_average, tape)

    def decode(self, hidden: Array, tape: Tape = NO_TAPE) -> Any:
        """The decoder's output for the emission's hidden layer [..., E], with all axes but the last as one."""
        features = self.emission_activation(hidden, self.use_running_average, tape)
        return self.decoder(features.reshape(-1, self.encoded_size), self.use_running_average, tape)

    def emission_mean(self, emission: Any) -> Array:
        """Expected observation [R, ...] under the decoder's output of R rows: pixel probabilities, or means."""
        return jax.nn.sigmoid(self.decoder.to_images(emission)) if self.observation.is_image else emission[0]

    @staticmethod
    def as_float(obs: Array) -> Array:
        """Observations as floating point numbers; pixels, which are uint8, become 0..1."""
        if obs.dtype == jnp.uint8:
            return obs.astype(jnp.float32) / 255.0
        return obs if jnp.issubdtype(obs.dtype, jnp.floating) else obs.astype(jnp.float32)

    def initial_action(self, num_envs: int) -> Array:
        """The previous action at the start of an episode, [B, A]: action 0 (one-hot) or the zero vector."""
        action = jnp.zeros((num_envs, self.action.size))
        return action.at[:, 0].set(1.0) if self.action.discrete else action

    def action_vector(self, action: Array) -> Array:
        """Actions as network inputs [B, A]: one-hot if discrete ([B] int), unchanged if continuous."""
        return jax.nn.one_hot(action, self.action.size) if self.action.discrete else action

    def heads(self, belief: Any) -> tuple[distrax.Distribution, Array]:
        """Returns the policy (a distribution over B actions) and the value [B] for a belief."""
        features = self.policy_features(belief)
        return self.policy(features), self.value(features)

    def policy_features(self, belief: Any, tape: Tape = NO_TAPE) -> Array:
        """What actor and critic see, [B, H]: the belief's summary, batch-normalised if so configured.

        With a tape of several steps, of beliefs with one more axis in front: [T, B, H].
        """
        features = self.summarise(jax.lax.stop_gradient(belief) if self.detach_encoder else belief, tape)
        if self.summary_norm is not None:
            features = self.summary_norm(features, self.use_running_average, Tape(tape.steps))
        return features

    def policy(self, features: Array) -> distrax.Distribution:
        """Policy over actions [..., B]: categorical, or diagonal normal with a parameter for its deviation."""
        out = self.policy_head(x=features)
        if self.action.discrete:
            return distrax.Categorical(logits=out)
        std = jnp.broadcast_to(jnp.exp(self.log_std[...]), out.shape)
        return distrax.MultivariateNormalDiag(out, std)

    def value(self, features: Array) -> Array:
        """Value [..., B]."""
        return self.value_head(x=features)[..., 0]

    @abc.abstractmethod
    def initial(self, num_envs: int) -> Any:
        """The belief of `num_envs` fresh episodes: a named tuple with the recurrent state, one array, in field `h`.

        All zeros, which is also what `restart` makes of a belief when the next episode begins.
        """

    @staticmethod
    def restart(belief: Any, fresh: Array) -> Any:
        """A belief, or its h alone, with every array [B, ...] set to 0 where fresh [B]."""

        def zero(x):
            return jnp.where(fresh.reshape(fresh.shape + (1,) * (x.ndim - 1)), jnp.zeros_like(x), x)

        return jax.tree.map(zero, belief)

    @abc.abstractmethod
    def draw(self, key: Array, steps: int, num_envs: int) -> Any:
        """Draws what `steps` updates need: a pytree of arrays [steps, B, ...], () if nothing."""

    def update(
        self, belief: Any, inputs: Inputs, obs: Array, draws: Any, tapes: Tapes = NO_TAPES
    ) -> tuple[Any, UpdateInfo]:
        """Takes obs [B, ...] and its encoded inputs into the belief.

        Raises:
            RunError: `weigh` changes h.
        """
        trace = self.choose(belief, draws)
        step = self.transition(belief.h, inputs, trace, tapes.transition)
        after, info = self.weigh(step, inputs, trace, obs, tapes.weigh)
        if after.h is not step.h:
            raise RunError(f"{type(self).__name__}: weigh changes h, and must leave it as it is in the step")
        return after, info

    @abc.abstractmethod
    def choose(self, belief: Any, draws: Any) -> Any:
        """The trace of the next step: whatever draws and discrete choices `transition` depends on."""

    @abc.abstractmethod
    def transition(self, h: Array, inputs: Inputs, trace: Any, tape: Tape = NO_TAPE) -> Any:
        """One step from the recurrent state `h`: a named tuple with the next `h` and what `weigh` needs."""

    @abc.abstractmethod
    def weigh(self, step: Any, inputs: Inputs, trace: Any, obs: Array, tape: Tape = NO_TAPE) -> tuple[Any, UpdateInfo]:
        """The belief after a step that met obs [B, ...], with the step's h, and how well it foresaw it."""

    @abc.abstractmethod
    def summarise(self, belief: Any, tape: Tape = NO_TAPE) -> Array:
        """The belief as one vector per environment, [B, H]; learning asks for several steps at once, [T, B, H]."""

    @classmethod
    def predicts(cls, config) -> bool:
        """Whether such an agent, as `config` (the `model` group of a configuration) has it, can `predict`."""
        del config
        return cls.predict is not Agent.predict

    def predict(self, last: Prediction, times: tuple[int, ...], key: Array) -> dict[int, Array]:
        """Expected observations {dt: [B, ...]} for each dt in `times`: 0 is the reconstruction of the last one.

        An agent that predicts nothing has none.
        """
        del last, times, key
        return {}

    def look_ahead(
        self, step: Callable[["Agent", Array, Array], tuple[Array, Array]], h: Array, times: tuple[int, ...]
    ) -> dict[int, Array]:
        """The part of `predict` after the reconstruction: a loop, so that its length does not matter to the compiler.

        Args:
            step: of (agent, h, dt), returns the next h and the observation [B, ...] expected dt steps ahead.
            h: recurrent state after the last observation. times: as for `predict`.
        Returns:
            {dt: [B, ...]} for each dt > 0 in `times`.
        """
        last = max(times, default=0)
        if last == 0:
            return {}
        graphdef, state = nnx.split(self)
        _, expected = jax.lax.scan(lambda h, dt: step(bind(graphdef, state), h, dt), h, jnp.arange(1, last + 1))
        return {dt: expected[dt - 1] for dt in times if dt > 0}
