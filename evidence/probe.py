"""What a run's agent remembers of its position on Mountain Hike, read out by linear regression.

    python -m evidence.probe --workdir=saved_runs/3

The agent plays whole episodes with its own policy. A linear map from its state to the true position is fitted on half
of them and judged on the other half, beside the exact filter (`kalman.py`) on the same observations and actions, which
nothing can beat. Prints a table and writes `probe-<update>.json` to the run's directory.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dvrl_jax import envs
from dvrl_jax import particle_filter as pf
from dvrl_jax.agents import Agent
from dvrl_jax.envs import BatchedEnvironment
from dvrl_jax.envs import mountain_hike as hike
from dvrl_jax.errors import RunError
from dvrl_jax.runs import command_line, markdown, process
from dvrl_jax.viewing import evaluation, playing
from evidence import kalman

Array = jax.Array

PENALTIES = (1e-6, 1e-4, 1e-2, 1.0)  # Of the ridge regression, on features of unit variance.
LEAST_SPREAD = 1e-4  # A feature whose standard deviation is a smaller part of its size is taken as constant.
VALIDATION = 0.25  # Share of the episodes to fit on that chooses among them.
HEADS, EXACT = "what actor and critic see", "exact filter"


class Episodes(NamedTuple):
    """Whole episodes; entry t is what held when action t was chosen. Arrays [T, E, ...].

    Attributes:
        position: [T, E, 2] true, where the latest observation was read. obs, action: [T, E, 2]. reward: [T, E].
        features: {name: [T, E, D]} the agent's state after that observation.
        reconstruction: [T, E, 2] what the agent takes that observation's mean to be; None if it decodes nothing.
    """

    position: np.ndarray
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    features: dict[str, np.ndarray]
    reconstruction: np.ndarray | None


def features_of(agent: Agent, belief: Any) -> dict[str, Array]:
    """The agent's state in the forms that are probed, each [B, D]."""
    if not hasattr(belief, "log_weight"):
        return {"state h": belief.h}
    mean = lambda x: pf.weighted_mean(x, belief.log_weight)
    if not hasattr(belief, "z"):
        return {HEADS: agent.features(belief), "particles' mean h": mean(belief.h)}
    return {
        HEADS: agent.features(belief),
        "particles' mean [h, phi_z]": mean(jnp.concatenate([belief.h, belief.phi_z], axis=-1)),
        "particles' mean z": mean(belief.z),
    }


def play(agent: Agent, env: BatchedEnvironment, key: Array) -> Episodes:
    """Plays one episode in each of the environments, actions sampled as in training."""

    def keep(agent: Agent, turn: playing.Turn, key: Array) -> Episodes:
        return Episodes(
            position=env.view(turn.before),
            obs=turn.before.obs,
            action=turn.action,
            reward=turn.after.true_reward,
            features=features_of(agent, turn.start.belief),
            reconstruction=agent.predict(turn.start, (0,), key).get(0),
        )

    return playing.watch(agent, env, key, hike.EPISODE_LENGTH, keep)


# --- Regression ------------------------------------------------------------------------------------------------------


class Linear(NamedTuple):
    """y = (x - mean) / scale @ weights + offset."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    offset: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Estimates [..., 2] from features [..., D]."""
        return (x - self.mean) / self.scale @ self.weights + self.offset


def ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> Linear:
    """Linear regression of y [N, 2] on x [N, D], in float64.

    W = (X'X / N + penalty I)^-1 X'Y / N, with X standardised and Y centred.
    """
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean, offset = x.mean(axis=0), y.mean(axis=0)
    scale, size = x.std(axis=0), np.sqrt(np.square(x).mean(axis=0))
    # What hardly varies, such as a saturated unit, is of no use to the agent's heads, and is not blown up here.
    scale = np.where(scale > LEAST_SPREAD * size, scale, np.maximum(size, 1.0) / LEAST_SPREAD)
    standard = (x - mean) / scale
    gram = standard.T @ standard / len(x) + penalty * np.eye(x.shape[1])
    return Linear(mean, scale, np.linalg.solve(gram, standard.T @ (y - offset) / len(x)), offset)


def fit(x: np.ndarray, y: np.ndarray) -> tuple[Linear, float]:
    """Regression of y [T, E, 2] on x [T, E, D] and its penalty, chosen on the last `VALIDATION` of the episodes."""
    cut = x.shape[1] - max(1, round(VALIDATION * x.shape[1]))
    rows = lambda a: a.reshape(-1, a.shape[-1])

    def error(penalty: float) -> float:
        return float(np.mean(np.square(ridge(rows(x[:, :cut]), rows(y[:, :cut]), penalty)(x[:, cut:]) - y[:, cut:])))

    penalty = min(PENALTIES, key=error)
    return ridge(rows(x), rows(y), penalty), penalty


# --- The probe -------------------------------------------------------------------------------------------------------


def errors(estimate: np.ndarray, position: np.ndarray) -> dict[str, float]:
    """Root mean squared error per coordinate in box units, and its standard error over episodes; arrays [T, E, 2]."""
    squared = np.square(estimate.astype(np.float64) - position).mean(axis=0)
    x, y = squared.mean(axis=0)
    episodes = squared.mean(axis=1)
    rmse = float(np.sqrt(episodes.mean()))
    # d sqrt(m) = dm / (2 sqrt(m)); episodes are independent, the steps of one are not.
    spread = float(np.std(episodes, ddof=1) / np.sqrt(len(episodes)))
    error = spread / (2.0 * rmse) if rmse > 0 else 0.0
    return {"rmse_x": float(np.sqrt(x)), "rmse_y": float(np.sqrt(y)), "rmse": rmse, "standard_error": error}


def estimates(played: Episodes, observation_std: float) -> list[dict[str, Any]]:
    """Errors of all estimates on the second half of the episodes; what is fitted is fitted on the first half."""
    half = played.position.shape[1] // 2
    seen, held_out = (jax.tree.map(lambda x, part=part: x[:, part], played) for part in (np.s_[:half], np.s_[half:]))
    found = []

    def add(name: str, estimate: np.ndarray, **more: Any) -> None:
        estimate = np.broadcast_to(estimate, held_out.position.shape)
        found.append({"name": name} | more | errors(estimate, held_out.position))

    def regress(name: str, x: np.ndarray, x_held_out: np.ndarray) -> None:
        linear, penalty = fit(x, seen.position)
        spread = float(np.median(x.std(axis=(0, 1), dtype=np.float64)))
        add(name, linear(x_held_out), features=x.shape[-1], spread=spread, penalty=penalty)

    add("constant mean", seen.position.mean(axis=(0, 1)))
    add("mean of the step", seen.position.mean(axis=1, keepdims=True))
    add("last reading", held_out.obs / hike.OBSERVATION_SCALE)
    regress("last reading, regressed", seen.obs, held_out.obs)
    for name, x in seen.features.items():
        regress(name, x, held_out.features[name])
    if played.reconstruction is not None:
        add("reconstruction", held_out.reconstruction / hike.OBSERVATION_SCALE)
    add(EXACT, np.asarray(kalman.track(held_out.obs, held_out.action, observation_std)))
    return found


def probe(path: Path, episodes: int, checkpoint: str, seed: int) -> dict[str, Any]:
    """Plays `episodes` episodes with a run's checkpoint; returns and stores what its state says about its position.

    The file is `probe-<update>.json`.
    Raises:
        RunError: there is no run, no such checkpoint, or the run is of another task.
    """
    config = evaluation.read_run_config(path)
    if config.env.name != "MountainHike":
        raise RunError(f"{path}: is a run of {config.env.name}; only Mountain Hike has an exact filter to compare")
    if changed := envs.in_use(config.env):
        value = config.env[changed[0]]
        raise RunError(f"{path}: changes observations (env.{changed[0]} = {value}), which the filter does not know")
    env = envs.make_env(config.env, episodes, seed)
    agent, update = evaluation.load_agent(path, config, env, checkpoint)
    played = play(agent, env, jax.random.PRNGKey(seed))
    returns = played.reward.sum(axis=0, dtype=np.float64)
    result = {
        "update": update,
        "env_steps": update * config.num_envs * config.num_steps,
        "algorithm": config.algorithm,
        "observation_std": config.env.observation_std,
        "seed": seed,
        "episodes": episodes,
        "held_out": episodes - episodes // 2,
        "mean_return": float(returns.mean()),
        "standard_error": float(returns.std(ddof=1) / np.sqrt(episodes)),
        "estimates": estimates(played, config.env.observation_std),
    }
    file = path / f"probe-{update}.json"
    try:
        file.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from None
    return result


def table(result: dict[str, Any]) -> str:
    """What `probe` returned, as Markdown."""
    rows = []
    for one in result["estimates"]:
        cells = (f"{one['rmse_x']:.4f}", f"{one['rmse_y']:.4f}", f"{one['rmse']:.4f} ± {one['standard_error']:.4f}")
        fitted = (str(one["features"]), f"{one['spread']:.2g}") if "features" in one else ("-", "-")
        rows.append([one["name"], *fitted, *cells])
    return markdown.table(["estimate from", "numbers", "spread", "error x", "error y", "error"], rows)


def main() -> int:
    process.share_gpu()
    path = Path(FLAGS.workdir)
    result = probe(path, FLAGS.episodes, FLAGS.checkpoint, FLAGS.seed)
    print(f"checkpoint of update {result['update']:,}, noise {result['observation_std']:g}")
    print(f"{result['episodes']} episodes, return {result['mean_return']:.2f} +- {result['standard_error']:.2f}")
    print(f"root mean squared error of the position in box units, on {result['held_out']} held-out episodes:\n")
    print(table(result), end="")
    return 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_integer("episodes", 400, "How many episodes to play; half of them are fitted on.", lower_bound=8)
    flags.DEFINE_string("checkpoint", "best", "'best' (by result.true), 'latest', or an update number.")
    seed = "Fixes episodes and draws; other than in training and evaluation."
    flags.DEFINE_integer("seed", 2_000_000, seed, lower_bound=0, upper_bound=2**31 - 1)
    command_line.run(main)
