"""Playing whole games with trained weights, one game per environment so that short games do not count more often."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dvrl_jax import a2c, checkpoints, compilation, envs, pictures, recording, runs
from dvrl_jax import config as config_lib
from dvrl_jax.agents import Agent, bind
from dvrl_jax.envs import Environment

Array = jax.Array

STEPS_PER_CALL = 100
MAX_STEPS = 200_000  # Longer than any game: EnvPool cuts games off, and a life cannot go on for ever.


class Games(NamedTuple):
    """Results of whole games: unclipped returns and lengths in transitions, one entry per game."""

    returns: np.ndarray
    lengths: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Mean, standard error, median and range of the returns, mean length, and everything game by game."""
        count = len(self.returns)
        error = float(np.std(self.returns, ddof=1) / np.sqrt(count)) if count > 1 else None
        return {
            "episodes": count,
            "mean": float(np.mean(self.returns)),
            "standard_error": error,
            "median": float(np.median(self.returns)),
            "min": float(np.min(self.returns)),
            "max": float(np.max(self.returns)),
            "mean_length": float(np.mean(self.lengths)),
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
        }


def read_run_config(path: Path, default: ConfigDict) -> ConfigDict:
    """The configuration of the run in a directory.

    Raises:
        RunError: there is no run in it, or its configuration is damaged.
    """
    fields = runs.read_config(path)
    if fields is None:
        raise runs.RunError(f"{path}: holds no run (there is no config.json)")
    try:
        return config_lib.finalise(config_lib.merge(default, fields))
    except config_lib.ConfigError as error:
        raise runs.RunError(f"{path / 'config.json'}: {error}") from None


def load_agent(path: Path, config: ConfigDict, env: Environment, checkpoint: str) -> tuple[Agent, int]:
    """Restores the agent of a run, with batch norm on its running averages.

    Args:
        checkpoint: "best" (by `result.true`), "latest", or an update number.
    Returns:
        (agent, update number of the checkpoint).
    Raises:
        RunError: there is no such checkpoint, or it does not fit.
    """
    saver = checkpoints.Checkpoints(path / "checkpoints", keep=1, read_only=True)
    step = saver.find(checkpoint)
    agent = a2c.make_agent(config, env, jax.random.PRNGKey(0))
    graphdef, params, batch_stats = nnx.split(agent, nnx.Param, nnx.BatchStat)
    agent = nnx.merge(graphdef, *saver.restore_weights(step, params, batch_stats))
    agent.use_running_average = True
    return agent, step


def play(agent: Agent, env: Environment, key: Array, greedy: bool = False) -> Games:
    """Plays one whole game in each of the environments.

    Args:
        greedy: take the most probable action instead of sampling.
    Raises:
        RunError: a game has not ended after MAX_STEPS calls; its return would not be that of a whole game.
    """
    graphdef, weights = nnx.split(agent)
    reset_key, draw_key = jax.random.split(key)

    def step(carry, key):
        actor, total, length, over = carry
        player = bind(graphdef, weights)
        belief_key, action_key = jax.random.split(key)
        draws = jax.tree.map(lambda x: x[0], player.draw(belief_key, 1, env.num_envs))
        belief, _, _ = a2c.observe(player, actor, draws)
        policy, _ = player.heads(belief)
        action = policy.mode() if greedy else policy.sample(seed=action_key)
        state = env.step(actor.env, action)
        counts = state.transition & ~over
        total = total + jnp.where(counts, state.true_reward, 0.0)
        actor = a2c.Actor(state, belief, player.action_vector(action), state.done | ~state.transition)
        return (actor, total, length + counts, over | (state.game_over & counts)), None

    start = a2c.first_actor(agent, env.reset(reset_key))
    zeros = jnp.zeros(env.num_envs)
    carry = (start, zeros, jnp.zeros(env.num_envs, jnp.int32), jnp.zeros(env.num_envs, bool))
    keys = jax.random.split(draw_key, STEPS_PER_CALL)
    with compilation.cached(env.restorable):
        program = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0]).lower(carry, keys).compile()
    for call in range(MAX_STEPS // STEPS_PER_CALL):
        carry = program(carry, jax.random.split(jax.random.fold_in(draw_key, call), STEPS_PER_CALL))
        if bool(jnp.all(carry[3])):
            break
    _, total, length, over = carry
    if not bool(jnp.all(over)):
        unfinished = int(jnp.sum(~over))
        raise runs.RunError(f"{unfinished} of {env.num_envs} games have not ended after {MAX_STEPS:,} steps")
    return Games(np.asarray(total, np.float64), np.asarray(length))


def evaluate(
    path: Path, default: ConfigDict, episodes: int, greedy: bool, checkpoint: str, seed: int
) -> dict[str, Any]:
    """Plays `episodes` games with a run's checkpoint; returns and stores the summary in the run's directory.

    The file is `evaluation-<update>.json`.
    """
    config = read_run_config(path, default)
    env = envs.make_env(config.env, episodes, seed)
    agent, update = load_agent(path, config, env, checkpoint)
    games = play(agent, env, jax.random.PRNGKey(seed), greedy)
    summary = {"update": update, "greedy": greedy, "seed": seed} | games.summary()
    (path / f"evaluation-{update}.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def draw(
    path: Path, default: ConfigDict, video: Path, max_steps: int, greedy: bool, checkpoint: str, seed: int
) -> recording.Recording:
    """Plays one game with a run's checkpoint, writes its picture to `video`, and returns what it shows."""
    config = read_run_config(path, default)
    env = envs.make_env(config.env, 1, seed, keep_view=True)
    painter = pictures.painter_for(config.env.name, env)
    agent, _ = load_agent(path, config, env, checkpoint)
    recorded = recording.record(agent, env, jax.random.PRNGKey(seed), greedy, max_steps)
    pictures.write(video, painter, recorded)
    return recorded
