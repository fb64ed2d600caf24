"""One game with everything a picture of the belief needs, step by step. Drawing it is in `pictures/`."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dvrl_jax import particle_filter as pf
from dvrl_jax.agents import Agent, PredictionStart
from dvrl_jax.envs import BatchedEnvironment
from dvrl_jax.viewing import playing

Array = jax.Array

TIMES = (0, 1, 5, 10)  # The reconstruction, and how many steps ahead predictions look.
STEPS_PER_CALL = 25


class Recording(NamedTuple):
    """One game of T steps. Every array has time first; entry t is what held when action t was chosen.

    Attributes:
        view: [T, ...] the true state, as `BatchedEnvironment.view` shows it.
        obs: [T, ...] the observation that the agent got. observed: [T] bool, it was not blanked.
        predictions: {dt: [T, ...]}, observations expected dt steps later if the last action is repeated; dt = 0 is the
            reconstruction. Empty for an agent that predicts nothing.
        particles: [T, K, ...] what each particle alone reconstructs; None for images (there would be too much of it),
            for beliefs without particles, and for agents that predict nothing.
        weights: [T, K] normalised weights; None for beliefs without particles.
        value: [T]. policy: [T, A] action probabilities (discrete) or means (continuous).
        action: [T] or [T, A]. reward: [T], of the underlying game, for that action.
        belief: the agent's, of arrays [T, ...], such as `dvrl_jax.agents.dvrl.Belief`.
    """

    view: np.ndarray
    obs: np.ndarray
    observed: np.ndarray
    predictions: dict[int, np.ndarray]
    particles: np.ndarray | None
    weights: np.ndarray | None
    value: np.ndarray
    policy: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    belief: Any = None

    @property
    def effective_sample_size(self) -> np.ndarray:
        """[T], between 1 and K (see `particle_filter`)."""
        return np.asarray(pf.effective_sample_size(self.weights))


def particles_alone(agent: Agent, start: PredictionStart, key: Array) -> Array:
    """Reconstructions [B, K, ...] of each particle alone: predictions as if it had all the weight."""
    num_particles = start.belief.log_weight.shape[-1]

    def alone(k):
        log_weight = jnp.where(jnp.arange(num_particles) == k, 0.0, -jnp.inf)
        belief = start.belief._replace(log_weight=jnp.broadcast_to(log_weight, start.belief.log_weight.shape))
        return agent.predict(start._replace(belief=belief), (0,), key)[0]

    return jax.vmap(alone, out_axes=1)(jnp.arange(num_particles))


def record(
    agent: Agent,
    env: BatchedEnvironment,
    key: Array,
    greedy: bool = False,
    max_steps: int = 1000,
    times: tuple[int, ...] = TIMES,
) -> Recording:
    """Plays the first environment's game to its end, or for `max_steps`, and records it.

    Args:
        agent: with `use_running_average` set, if it uses batch norm. env: made with `keep_view`.
        greedy: take the most probable action instead of sampling. times: which predictions to make.
    Raises:
        ValueError: `max_steps` is less than 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps = {max_steps}: must be at least 1")

    def keep(agent: Agent, turn: playing.Turn, key: Array) -> dict[str, Any]:
        start = turn.start
        seen = playing.seen(env, turn)._asdict() | {"predictions": agent.predict(start, times, key)}
        del seen["is_first"]
        # Beliefs made of weighted particles say so by this field.
        if hasattr(start.belief, "log_weight"):
            seen["weights"] = pf.normalised_weights(start.belief.log_weight)
            if not env.observation.is_image and 0 in agent.predict(start, (0,), key):
                seen["particles"] = particles_alone(agent, start, key)
        return jax.tree.map(lambda x: x[0], seen)

    parts: list[dict[str, Any]] = []
    stretches = playing.play_turns(agent, env, key, keep, greedy, STEPS_PER_CALL)
    for part in itertools.islice(stretches, -(-max_steps // STEPS_PER_CALL)):
        parts.append(part)
        if part["game_over"].any():
            break
    everything = jax.tree.map(lambda *x: np.concatenate(x)[:max_steps], *parts)
    over = everything.pop("game_over")
    counts = everything.pop("valid")
    if over.any():
        counts &= np.arange(len(over)) <= np.argmax(over)
    # Calls that only delivered a new episode's first frame are no steps of the game.
    everything = jax.tree.map(lambda x: x[counts], everything)
    return Recording(**{"particles": None, "weights": None} | everything)
