"""What every agent can do with a belief, and the actor and critic that all agents share.

An agent is an NNX module with these verbs (shapes: `B` environments, `A` actions):

    initial(B)                                the belief before the first observation
    encode_observation(obs)                   what the observation contributes to the step, once per environment
    add_context(seen, timestep)               the step's inputs: that, and what the previous action contributes
    draw(key, steps, B)                       the random numbers that `steps` belief updates need
    sample_trace(belief, noise)               all draws and discrete choices of the next step, no gradient
    advance(carry, inputs, trace)             the step of the recurrence, and nothing that only losses and heads need
    score(step, inputs, trace, timestep)      the belief after the step, with the losses that train it
    update(belief, timestep, noise)           all of these: one more observation taken in
    summarise(belief)                         one vector per environment for actor and critic
    heads(belief)                             the policy and the value
    predict(start, times, key)                observations expected some steps ahead

A belief has a `carry`, any pytree of floating point arrays [B, ...]. It is all that `advance` takes of the belief
before, and the only path along which gradients cross steps and segments.
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
from dvrl_jax.errors import ConfigError, RunError

Array = jax.Array

GAUSSIAN_HEAD_GAIN = 0.01  # Initial factor on the weights of a continuous policy's mean.


class Timestep(NamedTuple):
    """What an agent gets to see at one step.

    Attributes:
        obs: [B, ...]; uint8 are pixels, 0..255.
        prev_action: [B, A] one-hot or vector, which led to it; action 0 or the zero vector where an episode begins.
        prev_reward: [B], for that action; 0 where an episode begins.
        is_first: [B] bool, the observation is the first of an episode: the belief begins anew with it.
    """

    obs: Array
    prev_action: Array
    prev_reward: Array
    is_first: Array


class UpdateInfo(NamedTuple):
    """By-products of one belief update.

    Attributes:
        trace: pytree, what `advance` needs to take the step again; no gradient passes.
        losses: [B] each, that train the belief itself, by the names of `Agent.losses`.
        metrics: [B] arrays by metric name.
    """

    trace: Any
    losses: dict[str, Array]
    metrics: dict[str, Array]


class Inputs(NamedTuple):
    """Inputs of one step, encoded once per environment.

    Attributes:
        drive: pytree of [B, ...], what observation and action contribute to the recurrence.
        phi_a: [B, E] the encoded previous action, None without action encoding.
    """

    drive: Any
    phi_a: Array | None


class PredictionStart(NamedTuple):
    """What predictions start from: a belief and the update that led to it.

    Attributes:
        belief: the belief after the last observation.
        carry: the one that it was updated from. trace: the update's trace.
        timestep: what it took in; its previous action is assumed to be repeated.
    """

    belief: Any
    carry: Any
    trace: Any
    timestep: Timestep


def bind(graphdef: nnx.GraphDef, *states: nnx.State) -> "Agent":
    """The agent with these weights and averages, for use inside one transformation (a jit, a scan, a vmap).

    The containers are copied, so that batch norm may update its averages there and leaves those outside alone.
    """
    return nnx.merge(graphdef, *jax.tree.map(lambda x: x, states))


def select(condition: Array, yes: Any, no: Any) -> Any:
    """Per environment, from two pytrees of arrays [B, ...]: the first where `condition` [B] holds, else the second."""
    spread = lambda x: condition.reshape(condition.shape + (1,) * (x.ndim - 1))
    return jax.tree.map(lambda a, b: jnp.where(spread(b), a, b), yes, no)


class Agent(nnx.Module, abc.ABC):
    """Encoders, actor and critic; subclasses add the belief.

    Attributes:
        name: what configurations call it (`algorithm`).
        settings: what may be set about it alone, with defaults: fields of the `model` group of its configurations.
        losses: which losses train its belief besides the actor-critic's, with the default of each one's coefficient,
            `loss.<name>_coef`.
    """

    name: str | None = None
    settings: Mapping[str, Any] = {}
    losses: Mapping[str, float] = {"encoding": 0.0}
    second_value_head: networks.Linear | None = None

    def __init__(
        self,
        config,
        observation: ObservationSpec,
        action: ActionSpec,
        *,
        summary_size: int | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes the networks for `config` (the `model` group of a configuration).

        `summary_size` is the size of what `summarise` returns, h_dim by default.
        Raises:
            ValueError: the networks do not fit the observation.
        """
        self.observation = observation
        self.action = action
        self.h_dim = config.h_dim
        self.summary_size = summary_size or config.h_dim
        self.detach_encoder = config.detach_encoder
        self.reward_input = config.reward_input
        self.encoder = networks.Encoder(observation.shape, config.channels, config.batch_norm, rngs=rngs)
        self.encoded_size = 1
        for size in networks.encoded_shape(observation.shape, config.channels):
            self.encoded_size *= size
        # Sizes of the blocks that phi_o and phi_a feed in every layer that reads them.
        self.input_sizes = {"obs": self.encoded_size}
        self.action_sizes = {}
        if config.action_encoding > 0:
            self.action_sizes = {"action": config.action_encoding}
            inputs = {"x": action.size} | ({"reward": 1} if config.reward_input else {})
            self.action_encoder = networks.Linear(inputs, config.action_encoding, rngs=rngs)
            self.action_activation = networks.Activation(config.action_encoding, config.batch_norm)
        self.input_sizes |= self.action_sizes
        self.summary_norm = networks.BatchNorm(self.summary_size) if config.policy_batch_norm else None
        self.value_head = networks.Linear({"x": self.summary_size}, 1, rngs=rngs)
        gain = networks.RELU_GAIN * (1.0 if action.discrete else GAUSSIAN_HEAD_GAIN)
        self.policy_head = networks.Linear({"x": self.summary_size}, action.size, gain=gain, rngs=rngs)
        if not action.discrete:
            self.log_std = nnx.Param(jnp.zeros(action.size))

    @property
    def use_running_average(self) -> bool:
        """Whether batch norm, where there is any, uses its running averages: for evaluation with few environments."""
        return all(norm.use_running_average for norm in self._batch_norms())

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        for norm in self._batch_norms():
            norm.use_running_average = value

    def _batch_norms(self) -> list[networks.BatchNorm]:
        return [module for _, module in nnx.iter_modules(self) if isinstance(module, networks.BatchNorm)]

    # --- What a belief model says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def initial(self, num_envs: int) -> Any:
        """The belief of `num_envs` fresh episodes: a named tuple with a `carry`. It may depend on weights."""

    @abc.abstractmethod
    def drive(self, encoded: dict[str, Array]) -> Any:
        """Products of an encoded input, `obs` [B, F] or `action` [B, E], with the recurrence's kernels.

        It is asked for each input by itself, and what it returns, a pytree of [B, D], is added up: no bias belongs in
        it. Learning asks for several steps at once, [T, B, F] or [T, B, E], or for single images of many, [R, F].
        """

    def draw(self, key: Array, steps: int, num_envs: int) -> Any:
        """Draws what `steps` updates need: a pytree of arrays [steps, B, ...]; here, nothing."""
        del key, steps, num_envs
        return ()

    def sample_trace(self, belief: Any, noise: Any) -> Any:
        """The trace of the next step: whatever draws and discrete choices `advance` depends on; here, nothing."""
        del belief, noise
        return ()

    @abc.abstractmethod
    def advance(self, carry: Any, inputs: Inputs, trace: Any) -> Any:
        """One step of the recurrence: a named tuple with the next `carry` and what `score` needs."""

    @abc.abstractmethod
    def score(self, step: Any, inputs: Inputs, trace: Any, timestep: Timestep) -> tuple[Any, UpdateInfo]:
        """The belief after a step, with the step's carry, and how well it foresaw what it met."""

    @abc.abstractmethod
    def summarise(self, belief: Any) -> Array:
        """The belief as one vector per environment, [B, S]; learning asks for several steps at once, [T, B, S]."""

    # --- Updating a belief -------------------------------------------------------------------------------------------

    @staticmethod
    def as_float(obs: Array) -> Array:
        """Observations as floating point numbers; pixels, which are uint8, become 0..1."""
        if obs.dtype == jnp.uint8:
            return obs.astype(jnp.float32) / 255.0
        return obs if jnp.issubdtype(obs.dtype, jnp.floating) else obs.astype(jnp.float32)

    def encode_observation(self, obs: Array) -> Any:
        """What obs [B, ...], or of several steps [T, B, ...], adds to the recurrence (see `drive`)."""
        return self.drive({"obs": self.encoder(self.as_float(obs))})

    def encode_action(self, timestep: Timestep) -> Array | None:
        """phi_a [..., E] of the previous action [..., A], and reward [...] if it is an input; None without encoding."""
        if not self.action_sizes:
            return None
        chex.assert_axis_dimension(timestep.prev_action, -1, self.action.size)
        inputs = {"x": timestep.prev_action}
        if self.reward_input:
            inputs["reward"] = timestep.prev_reward[..., None]
        return self.action_activation(self.action_encoder(**inputs))

    def add_context(self, seen: Any, timestep: Timestep) -> Inputs:
        """The inputs of a step that has `seen` its observation: adds the previous action's part; [B] or [T, B] steps.

        An agent may override it to take in the previous reward in its own way. The observation belongs in `seen`.
        """
        phi_a = self.encode_action(timestep)
        if phi_a is None:
            return Inputs(seen, None)
        return Inputs(jax.tree.map(jnp.add, seen, self.drive({"action": phi_a})), phi_a)

    def encode(self, timestep: Timestep) -> Inputs:
        """The inputs of a step."""
        return self.add_context(self.encode_observation(timestep.obs), timestep)

    def restart(self, belief: Any, is_first: Array) -> Any:
        """A belief, begun anew where is_first [B]."""
        return select(is_first, self.initial(is_first.shape[0]), belief)

    def restart_carry(self, carry: Any, is_first: Array) -> Any:
        """A belief's carry, begun anew where is_first [B]."""
        return select(is_first, self.initial(is_first.shape[0]).carry, carry)

    def update(self, belief: Any, timestep: Timestep, noise: Any) -> tuple[Any, UpdateInfo]:
        """Takes a time step into a belief that has been restarted where an episode begins.

        Raises:
            RunError: `score` changes the carry, or returns other losses than `losses` names.
        """
        inputs = self.encode(timestep)
        trace = self.sample_trace(belief, noise)
        step = self.advance(belief.carry, inputs, trace)
        return self.check_score(step, self.score(step, inputs, trace, timestep))

    def check_score(self, step: Any, scored: tuple[Any, UpdateInfo]) -> tuple[Any, UpdateInfo]:
        """What `score` returned for a step: with its carry, and the losses that the agent says. Raises RunError."""
        if any(a is not b for a, b in zip(*map(jax.tree.leaves, (scored[0].carry, step.carry)), strict=True)):
            raise RunError(f"{type(self).__name__}: score changes the carry, and must leave it as it is in the step")
        if set(scored[1].losses) != set(self.losses):
            named = [", ".join(sorted(names)) or "none" for names in (scored[1].losses, self.losses)]
            raise RunError(
                f"{type(self).__name__}: score returns the losses {named[0]}, and its class names {named[1]}"
            )
        return scored

    # --- Actor and critic --------------------------------------------------------------------------------------------

    def initial_action(self, num_envs: int) -> Array:
        """The previous action at the start of an episode, [B, A]: action 0 (one-hot) or the zero vector."""
        action = jnp.zeros((num_envs, self.action.size))
        return action.at[:, 0].set(1.0) if self.action.discrete else action

    def action_vector(self, action: Array) -> Array:
        """Actions as network inputs [B, A]: one-hot if discrete ([B] int), unchanged if continuous."""
        return jax.nn.one_hot(action, self.action.size) if self.action.discrete else action

    def heads(self, belief: Any) -> tuple[distrax.Distribution, Array]:
        """Returns the policy (a distribution over B actions) and the value [B] for a belief."""
        features = self.features(belief)
        return self.policy(features), self.value(features)

    def features(self, belief: Any) -> Array:
        """What actor and critic see, [B, S], or of several steps [T, B, S]: the summary, batch-normalised if set so."""
        features = self.summarise(jax.lax.stop_gradient(belief) if self.detach_encoder else belief)
        return features if self.summary_norm is None else self.summary_norm(features)

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

    def add_second_value(self, *, rngs: nnx.Rngs) -> None:
        """Makes a second value head (see `lambda_discrepancy.py`)."""
        self.second_value_head = networks.Linear({"x": self.summary_size}, 1, rngs=rngs)

    def values(self, features: Array) -> Array:
        """Value [..., B]; of both heads, [2, ..., B], where there is a second one."""
        first = self.value(features)
        if self.second_value_head is None:
            return first
        return jnp.stack([first, self.second_value_head(x=features)[..., 0]])

    # --- Foreseeing observations -------------------------------------------------------------------------------------

    def add_emission(self, sizes: Mapping[str, int], config, *, rngs: nnx.Rngs) -> None:
        """Makes the networks that foresee an observation, for agents that do: p(o), from inputs of these sizes."""
        self.emission_hidden = networks.Linear(sizes, self.encoded_size, rngs=rngs)
        self.emission_activation = networks.Activation(self.encoded_size, config.batch_norm)
        self.decoder = networks.make_decoder(self.observation, config.channels, config.batch_norm, rngs=rngs)
        self.min_emission_var = config.min_emission_std**2

    def decode(self, hidden: Array) -> Any:
        """The decoder's output for the emission's hidden layer [..., E], with all axes but the last as one.

        A normal's variance is the network's, to which `model.min_emission_std` squared is added: the density of an
        observation that hardly changes would grow without bound, and with it the ELBO and its gradient.
        """
        emission = self.decoder(self.emission_activation(hidden).reshape(-1, self.encoded_size))
        if self.observation.likelihood != "normal" or self.min_emission_var == 0:
            return emission
        mean, var = emission
        return mean, var + self.min_emission_var

    def emission_mean(self, emission: Any) -> Array:
        """Expected observation [R, ...] under the decoder's output of R rows: probabilities, or means."""
        if self.observation.likelihood == "bernoulli":
            return jax.nn.sigmoid(self.decoder.to_images(emission))
        if self.observation.likelihood == "categorical":
            return jax.nn.softmax(emission)
        return emission[0].reshape(-1, *self.observation.shape)

    @classmethod
    def predicts(cls, config) -> bool:
        """Whether such an agent, as `config` (the `model` group of a configuration) has it, can `predict`."""
        del config
        return cls.predict is not Agent.predict

    def predict(self, start: PredictionStart, times: tuple[int, ...], key: Array) -> dict[int, Array]:
        """Expected observations {dt: [B, ...]} for each dt in `times`: 0 is the reconstruction of the last one.

        An agent that predicts nothing has none.
        """
        del start, times, key
        return {}

    def look_ahead(
        self, step: Callable[["Agent", Any, Array], tuple[Any, Array]], carry: Any, times: tuple[int, ...]
    ) -> dict[int, Array]:
        """The part of `predict` after the reconstruction: a loop, so that its length does not matter to the compiler.

        Args:
            step: of (agent, carry, dt), returns the next carry and the observation [B, ...] expected dt steps ahead.
            carry: after the last observation. times: as for `predict`.
        Returns:
            {dt: [B, ...]} for each dt > 0 in `times`.
        """
        last = max(times, default=0)
        if last == 0:
            return {}
        graphdef, state = nnx.split(self)
        _, expected = jax.lax.scan(lambda x, dt: step(bind(graphdef, state), x, dt), carry, jnp.arange(1, last + 1))
        return {dt: expected[dt - 1] for dt in times if dt > 0}

    # --- What a configuration of it must be, and what work it makes --------------------------------------------------

    @classmethod
    def check(cls, config) -> None:
        """Raises ConfigError if the fields of a configuration that are about this agent do not fit together."""
        if config.model.reward_input and config.model.action_encoding == 0:
            raise ConfigError("model.reward_input = True: must be False where model.action_encoding is 0")
        if config.log.save_reconstruction_interval and not cls.predicts(config.model):
            raise ConfigError(
                f"log.save_reconstruction_interval = {config.log.save_reconstruction_interval}: must be 0 for "
                f"{cls.describe(config)}, which predicts nothing"
            )
        if not cls.losses and config.loss.encoding_coef:
            raise ConfigError(
                f"loss.encoding_coef = {config.loss.encoding_coef}: must be 0 for {cls.describe(config)}, which has no "
                "loss of its own"
            )
        if config.model.detach_encoder and not any(config.loss[f"{name}_coef"] for name in cls.losses):
            coefs = " or ".join(f"loss.{name}_coef" for name in cls.losses) or "a loss of its own"
            raise ConfigError(
                f"model.detach_encoder = True: must be False without {coefs}, where nothing else would train the belief"
            )

    @classmethod
    def describe(cls, config) -> str:
        """What messages call it, as `config` (a whole configuration) has it."""
        del config
        return cls.name or cls.__name__

    @classmethod
    def rows_per_env(cls, config) -> int:
        """How many rows its products have for each environment, as `config` (the `model` group) has it: the particles.

        It decides how a process that trains it is set up (`runs/process.py`, `runs/compilation.py`).
        """
        del config
        return 1


def check(agent: Agent, num_envs: int) -> None:
    """Makes sure that an agent's beliefs are as `Agent.initial` says.

    Raises:
        RunError: they are not.
    """
    name, belief = type(agent).__name__, agent.initial(num_envs)
    if not hasattr(belief, "_replace") or not hasattr(belief, "carry"):
        raise RunError(
            f"{name}: initial returns {type(belief).__name__}, and must return a named tuple with a `carry`: the "
            f"arrays [{num_envs}, ...] that the recurrence starts from"
        )
    for path, x in jax.tree_util.tree_leaves_with_path(belief.carry):
        if jnp.shape(x)[:1] != (num_envs,) or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            place = "carry" + jax.tree_util.keystr(path)
            found = f"{jnp.result_type(x)}{list(jnp.shape(x))}"
            raise RunError(f"{name}: initial returns {place} as {found}, and must return float32[{num_envs}, ...]")
