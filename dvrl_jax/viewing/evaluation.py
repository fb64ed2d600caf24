"""Playing whole games with trained weights, one game per environment so that short games do not count more often."""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dvrl_jax import acting, envs
from dvrl_jax.agents import Agent
from dvrl_jax.envs import BatchedEnvironment, wrappers
from dvrl_jax.errors import RunError
from dvrl_jax.runs import checkpoints, run_directory
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import pictures, playing, recording

Array = jax.Array

MAX_STEPS = 200_000  # Longer than any game: EnvPool cuts games off, and a life cannot go on for ever.


class Games(NamedTuple):
    """Results of whole games: unclipped returns and lengths in steps, one entry per game."""

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


def read_run_config(path: Path) -> ConfigDict:
    """The configuration of the run in a directory, to play with: emulators are tied to no cores.

    Raises:
        RunError: there is no run in it, or its configuration is damaged.
    """
    config = config_lib.of_run(path, {"env.first_core": -1})
    if config is None:
        raise RunError(f"{path}: holds no run (there is no config.json)")
    if config.num_seeds > 1:
        raise RunError(f"{path}: holds several seeds; name one of them, such as {path / f'seed{config.seed}'}")
    return config


def load_agent(path: Path, config: ConfigDict, env: BatchedEnvironment, checkpoint: str) -> tuple[Agent, int]:
    """Restores the agent of a run, with batch norm on its running averages.

    Args:
        checkpoint: "best" (by `result.true`), "latest", or an update number.
    Returns:
        (agent, update number of the checkpoint).
    Raises:
        RunError: there is no such checkpoint, or it does not fit.
    """
    agent = acting.make_agent(config, env, jax.random.PRNGKey(0))
    graphdef, params, batch_stats = nnx.split(agent, nnx.Param, nnx.BatchStat)
    while True:
        saver = checkpoints.Checkpoints(path / "checkpoints", keep=1, read_only=True)
        step = saver.find(checkpoint)
        try:
            weights = saver.restore_weights(step, params, batch_stats)
            break
        except RunError:
            if (path / "checkpoints" / str(step)).exists():
                raise  # Else training has just replaced it by another one.
    agent = nnx.merge(graphdef, *weights)
    agent.use_running_average = True
    return agent, step


def newest_checkpoint(path: Path) -> int:
    """Update number of the newest checkpoint of a run that has one."""
    return checkpoints.Checkpoints(path / "checkpoints", keep=1, read_only=True).find("latest")


def play_games(agent: Agent, env: BatchedEnvironment, key: Array, greedy: bool = False) -> Games:
    """Plays one whole game in each of the environments.

    Args:
        greedy: take the most probable action instead of sampling.
    Raises:
        RunError: a game has not ended after MAX_STEPS calls; its return would not be that of a whole game.
    """

    def keep(agent: Agent, turn: playing.Turn, key: Array) -> tuple[Array, Array, Array]:
        del agent, key
        state = turn.after
        return state.true_reward, state.valid, state.game_over & state.valid

    total, length, over = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64), np.zeros(env.num_envs, bool)
    stretches = playing.play_turns(agent, env, key, keep, greedy)
    for rewards, valid, ends in itertools.islice(stretches, MAX_STEPS // playing.STEPS_PER_CALL):
        for reward, is_valid, end in zip(rewards, valid, ends, strict=True):
            counts = is_valid & ~over
            total += np.where(counts, reward, 0.0)
            length += counts
            over |= end
        if over.all():
            return Games(total, length)
    raise RunError(f"{np.sum(~over)} of {env.num_envs} games have not ended after {MAX_STEPS:,} steps")


def check_video(path: Path, video: Path) -> None:
    """Makes sure that a picture of the run in `path` can be drawn and be written to `video`, before games are played.

    Raises:
        RunError: it cannot.
    """
    pictures.check_path(video)
    config = read_run_config(path)
    wrapped = wrappers.in_use(config.env)
    if pictures.find_painter(envs.find(config.env.name), config_lib.sees_images(config), wrapped) is None:
        raise pictures.no_picture(config.env.name, wrapped)


def evaluate(path: Path, episodes: int, greedy: bool, checkpoint: str, seed: int) -> dict[str, Any]:
    """Plays `episodes` games with a run's checkpoint and returns the summary (`Games.summary`, and of what it is).

    Raises:
        RunError: there is no run, or no such checkpoint, or it is damaged, or a game does not end.
    """
    config = read_run_config(path)
    env = envs.make_env(config.env, episodes, seed)
    agent, update = load_agent(path, config, env, checkpoint)
    games = play_games(agent, env, jax.random.PRNGKey(seed), greedy)
    return {"update": update, "greedy": greedy, "seed": seed} | games.summary()


def store(path: Path, summary: dict[str, Any]) -> None:
    """Writes a summary to `evaluation-<update>[-greedy]-<n>games-seed<seed>.json` in the run's directory.

    Raises:
        RunError: it cannot be written.
    """
    kind = "-greedy" if summary["greedy"] else ""
    file = path / f"evaluation-{summary['update']}{kind}-{summary['episodes']}games-seed{summary['seed']}.json"
    run_directory.replace(file, json.dumps(summary, indent=1) + "\n")


def write_video(
    path: Path, video: Path, max_steps: int, greedy: bool, checkpoint: str, seed: int
) -> recording.Recording:
    """Plays one game with a run's checkpoint, writes its picture to `video`, and returns what it shows.

    Raises:
        RunError: nobody can draw it, or the file cannot be written (see `check_video`).
    """
    config = read_run_config(path)
    env = envs.make_env(config.env, 1, seed, keep_view=True)
    painter = pictures.painter_for(env)
    agent, _ = load_agent(path, config, env, checkpoint)
    recorded = recording.record(agent, env, jax.random.PRNGKey(seed), greedy, max_steps)
    pictures.write(video, painter, recorded)
    return recorded
