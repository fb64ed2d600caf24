"""Configurations, environments, agents and training as functions: what `import dvrl_jax` offers to a notebook."""

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

from dvrl_jax import a2c, envs
from dvrl_jax.agents import Agent, bind
from dvrl_jax.envs import BatchedEnvironment, Environment
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.runs import compilation, reporting
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import evaluation

Train = Callable[..., tuple[a2c.TrainState, list[dict[str, Any]]]]


def make_config(name: str, *arguments: str, **fields: Any) -> ConfigDict:
    """A checked configuration from `configs/`.

    Args:
        name: of the file, for example "mountain_hike_dvrl". arguments: passed to it, such as the game for "atari_dvrl".
        fields: values to set, with `__` for the dot in a field's name: `model__num_particles=30`.
    Raises:
        ConfigError: there is no such configuration or field, or a value is impossible.
    """
    if not name.isidentifier() or name.startswith("_"):
        raise ConfigError(f"{name}: is not the name of a configuration, such as 'mountain_hike_dvrl'")
    module = _import(name, f"{name}: ")
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
    return config_lib.from_fields(config_lib.flatten(config) | values, default_config())


def default_config() -> ConfigDict:
    """The configuration that has every field.

    Raises:
        ConfigError: `configs/` is not there to be imported.
    """
    return _import("default").get_config()


def _import(name: str, said_first: str = "") -> ModuleType:
    """The module `configs/<name>.py`; messages begin with what is `said_first`.

    Raises:
        ConfigError: it is not there to be imported.
    """
    try:
        return importlib.import_module(f"configs.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("configs", f"configs.{name}"):
            raise
        message = f"there is no configs/{name}.py on sys.path; run in the repository's root, or set PYTHONPATH to it"
        raise ConfigError(said_first + message) from None


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
        ConfigError: `configs/` is not there to be imported.
    """
    path = Path(path)
    config = evaluation.read_run_config(path, default_config())
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
    return a2c.make_agent(config, env, jax.random.PRNGKey(seed))


def make_train(config: ConfigDict, env: Environment | BatchedEnvironment) -> Train:
    """Returns `train(seed=0, num_updates=..., state=None)`, which trains in `env` (`config.num_envs` copies of one).

    An update is `config.num_steps` steps in each environment. `train` returns the final `TrainState` and a list of
    metrics, one dict per `config.log.interval` updates under the names of metrics.jsonl. With a `state` that it
    returned before, it continues from there; that state's buffers are donated and cannot be used again.

    Raises:
        TypeError: by `train`, if `num_updates` is no whole number.
        ValueError: by `train`, if `state` has been continued from before.
        RunError: by `train`, after `config.max_skipped_updates` updates in a row that were not finite. This and a
            KeyboardInterrupt (Ctrl-C) have what there was until then: `error.state` and `error.history`.
    """
    env = envs.as_batch(env, config.num_envs)
    learner = a2c.make_learner(config, env)
    program = compilation.jit(learner.run, config)

    def train(seed: int = 0, num_updates: int = 1000, state: a2c.TrainState | None = None):
        num_updates = operator.index(num_updates)
        if state is None:
            with compilation.cached(True):
                state = learner.init(jax.random.PRNGKey(seed))
        elif any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(state)):  # JAX may keep some.
            raise ValueError("state: has been continued from before; give train the state that it returned last")
        history, end = [], int(state.update) + num_updates
        try:
            with compilation.cached(env.restorable):
                while (update := int(state.update)) < end:
                    count = min(end - update, config.log.interval - update % config.log.interval)
                    state = program(state, jnp.int32(count))
                    if int(state.skipped_in_row) >= config.max_skipped_updates:
                        raise RunError(reporting.why_stopped(state))
                    if int(state.update) % config.log.interval == 0:
                        line = {"update": int(state.update), "env_steps": int(state.env_steps)}
                        history.append(line | state.episodes.summary() | state.metrics.means())
                        state = state._replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics))
        except (KeyboardInterrupt, RunError) as error:
            error.state, error.history = state, history
            raise
        return state, history

    return train


def trained_agent(config: ConfigDict, env: Environment | BatchedEnvironment, state: a2c.TrainState) -> Agent:
    """The agent with a state's weights, ready to play: batch norm uses its running averages."""
    abstract = nnx.eval_shape(lambda: make_agent(config, env))
    graphdef, _, _ = nnx.split(abstract, nnx.Param, nnx.BatchStat)
    agent = bind(graphdef, *jax.tree.map(jnp.copy, (state.params, state.batch_stats)))
    agent.use_running_average = True
    return agent
