"""Configurations, environments, agents and training as functions: what `import dvrl_jax` offers to a notebook."""

import functools
import importlib
import inspect
import operator
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from dvrl_jax import acting, choices, envs
from dvrl_jax.agents import Agent, bind
from dvrl_jax.envs import BatchedEnvironment, Environment
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.learner import Learner, make_learner
from dvrl_jax.runs import compilation, loop
from dvrl_jax.runs import config as config_lib
from dvrl_jax.train_state import TrainState
from dvrl_jax.viewing import evaluation

Array = jax.Array


def make_config(name: str, *arguments: str, **fields: Any) -> ConfigDict:
    """A checked configuration, from `dvrl_jax/configs` or else from a folder `configs` on sys.path.

    Args:
        name: of the file, for example "mountain_hike_dvrl". arguments: passed to it, such as the game for "atari_dvrl".
        fields: values to set, with `__` for the dot in a field's name: `model__num_particles=30`.
    Raises:
        ConfigError: there is no such configuration or field, or a value is impossible.
    """
    if not name.isidentifier() or name.startswith("_"):
        raise ConfigError(f"{name}: is not the name of a configuration, such as 'mountain_hike_dvrl'")
    module = _import(name)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{name}: configs/{name}.py has no function get_config")
    said = ", ".join(map(str, arguments)) or "no argument"
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError as error:
        raise ConfigError(f"{name}: {said}: {error}") from None
    if not all(isinstance(argument, str) for argument in arguments):
        raise ConfigError(f"{name}: {said}: arguments of a configuration are texts")
    config = module.get_config(*arguments)
    config_lib.check_made(config, f"{name}: get_config")
    # Values may name another environment or belief model than the file: both have their settings.
    values = {field.replace("__", "."): value for field, value in fields.items()}
    return config_lib.from_fields(config_lib.flatten(config) | values)


def _import(name: str) -> ModuleType:
    """The module `<name>.py` of `dvrl_jax/configs`, or else of a folder `configs` on sys.path.

    Raises:
        ConfigError: it is not there to be imported.
    """
    known = config_lib.shipped()
    if name in known:
        return importlib.import_module(f"dvrl_jax.configs.{name}")
    try:
        return importlib.import_module(f"configs.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("configs", f"configs.{name}"):
            raise
        close = config_lib.suggestion(name, known)
        message = (
            f"there is no configs/{name}.py in dvrl_jax or on sys.path{close} (configurations are {', '.join(known)})"
        )
        raise ConfigError(f"{name}: {message}") from None


class Run(NamedTuple):
    """A run of train.py: its configuration, and the agent of its checkpoint at `update`, ready to play."""

    config: ConfigDict
    agent: Agent
    update: int


def load_run(path: str | Path, checkpoint: str | int = "best") -> Run:
    """Reads a run's directory, and changes nothing in it.

    Args:
        path: of the directory. checkpoint: "best" (by `result.true`), "latest", or an update number.
    Raises:
        RunError: there is no run, or no such checkpoint, or it is damaged; the message says what there is.
    """
    path = Path(path)
    config = evaluation.read_run_config(path)
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it will only read, which is what is wanted.
    try:
        agent, update = evaluation.load_agent(path, config, make_env(config, num_envs=1), str(checkpoint))
    finally:
        logging.set_verbosity(before)
    return Run(config, agent, update)


def make_env(
    config: ConfigDict, num_envs: int | None = None, seed: int | None = None, keep_view: bool = False
) -> BatchedEnvironment:
    """The environments of a configuration, `config.num_envs` with `config.seed` if not said otherwise.

    `keep_view` is needed for `record` where observations are blanked.
    """
    num_envs = config.num_envs if num_envs is None else num_envs
    return envs.make_env(config.env, num_envs, config.seed if seed is None else seed, keep_view)


def make_agent(config: ConfigDict, env: Environment | BatchedEnvironment, seed: int = 0) -> Agent:
    """The agent of a configuration with fresh weights."""
    return acting.make_agent(config, env, jax.random.PRNGKey(seed))


class Train:
    """Training of a configuration in an environment, to be called; `make_train` makes one."""

    def __init__(self, config: ConfigDict, env: BatchedEnvironment):
        compilation.check_settings()
        self.config, self.env = config, env
        self._learner = make_learner(config, env)
        self._program = compilation.jit(self._learner.run, config)

    def __call__(
        self, seed: int = 0, num_updates: int = 1000, state: TrainState | None = None
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """Trains for `num_updates` updates of `config.num_steps` steps in each environment.

        With a `state` that it returned before, it continues from there; that state's buffers are donated and cannot be
        used again.

        Returns:
            the final `TrainState`, and metrics: one dict per `config.log.interval` updates, under the names of
            metrics.jsonl.
        Raises:
            TypeError: `num_updates` is no whole number.
            ValueError: `state` has been continued from before.
            RunError: `config.max_skipped_updates` updates in a row were skipped. This and a KeyboardInterrupt (Ctrl-C)
                have what there was until then: `error.state` and `error.history`.
        """
        num_updates = operator.index(num_updates)
        if state is None:
            with compilation.cached(True):
                state = self._learner.init(jax.random.PRNGKey(seed))
        elif any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state)):  # JAX may keep some.
            raise ValueError("state: has been continued from before; give train the state that it returned last")
        history, end = [], int(state.update) + num_updates
        held = _Held(self._program, state)
        try:
            with compilation.cached(self.env.restorable):
                for call in loop.train(held, state, self.config, lambda state: end - int(state.update)):
                    held.state = call.state
                    line = call.lines[0]
                    if "final" not in line:
                        history.append(line)
        except (KeyboardInterrupt, RunError) as error:
            error.state, error.history = held.state, history
            raise
        return held.state, history

    def pure(self, key: Array, num_updates: int) -> tuple[TrainState, dict[str, Array]]:
        """The same as one pure function, for `jit` and `vmap`: `jax.jit(jax.vmap(lambda k: train.pure(k, 500)))(keys)`.

        No loop in it has a length that depends on the key. Nothing stops it when updates are skipped.

        Args:
            key: fixes all randomness. num_updates: a Python integer.
        Returns:
            the final `TrainState`, and metrics under the names of metrics.jsonl: arrays [L], an entry per
            `config.log.interval` updates; `result.*` are NaN before any episode has finished.
        Raises:
            RunError: the environment is no function of its state, as Atari, whose emulators are EnvPool's.
        """
        if not self.env.restorable:
            raise RunError(f"{self.config.env.name}: is no pure function, so it cannot be trained by `pure`")
        learner, every = self._learner_for_seeds, self.config.log.interval

        def to_next_line(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
            state = learner.run(state, every)
            line = {"update": state.update, "env_steps": state.env_steps, "updates.skipped": state.skipped}
            line |= state.episodes.results() | state.metrics.averages()
            return state._replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics)), line

        lines, rest = divmod(operator.index(num_updates), every)
        state, metrics = jax.lax.scan(to_next_line, learner.init(key), None, length=lines)
        # The update is compiled a second time for a rest.
        return learner.run(state, rest) if rest else state, metrics

    @functools.cached_property
    def _learner_for_seeds(self) -> Learner:
        return make_learner(self.config, self.env, choices.current().for_seeds())


class _Held:
    """A program that remembers the state that it returned last, for whoever is interrupted."""

    def __init__(self, program: Callable, state: TrainState):
        self.program, self.state = program, state

    def __call__(self, state: TrainState, num_updates: Array) -> TrainState:
        self.state = self.program(state, num_updates)
        return self.state


def make_train(config: ConfigDict, env: Environment | BatchedEnvironment) -> Train:
    """Training in an environment, or in `config.num_envs` copies of one: `state, metrics = train(seed=0)`.

    `num_seeds` and `num_devices` count for `train.py` alone; here `Train.pure` can be vmapped and sharded.
    """
    return Train(config, envs.as_batch(env, config.num_envs))


def trained_agent(config: ConfigDict, env: Environment | BatchedEnvironment, state: TrainState) -> Agent:
    """The agent with a state's weights, ready to play: batch norm uses its running averages."""
    abstract = nnx.eval_shape(lambda: make_agent(config, env))
    graphdef, _, _ = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    agent = bind(graphdef, *jax.tree.map(jnp.copy, (state.params, state.batch_stats)))
    agent.use_running_average = True
    return agent
