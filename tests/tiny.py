"""Small things that several tests share: random numbers, a memory task, configurations, training without a command."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dvrl_jax.configs import mountain_hike_dvrl, mountain_hike_rnn
from dvrl_jax.envs import ActionSpec, Batched, Environment, ObservationSpec, Step
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import training

# Fields of `tiny_hike`.
HIKE = {"num_envs": 10, "num_steps": 2, "model.channels": (8, 8), "model.h_dim": 8, "model.z_dim": 5}
HIKE |= {"model.action_encoding": 4, "model.num_particles": 3}
HIKE_STEPS_PER_UPDATE = HIKE["num_envs"] * HIKE["num_steps"]


def normals(seed, *shape):
    """Standard normal numbers of this shape."""
    return np.random.default_rng(seed).normal(size=shape)


def tiny_config(algorithm: str, **fields):
    """A small vector configuration; `fields` are dotted names with `__` for the dot."""
    c = config_lib.with_settings([algorithm])
    c.algorithm = algorithm
    c.num_envs, c.num_steps, c.bptt_segments = 3, 2, 2
    c.model.channels, c.model.h_dim, c.model.z_dim, c.model.action_encoding = (8, 8), 8, 5, 4
    c.model.num_particles = 3
    if algorithm == "dvrl":
        c.loss.encoding_coef = 0.1
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config_lib.finalise(c)


def tiny_pong(algorithm: str):
    """A configuration of Pong with small networks."""
    return tiny_config(algorithm, env__name="Pong", model__channels=(8, 8, 8))


def tiny_hike(algorithm: str, **fields):
    """Mountain Hike with small networks and short segments."""
    c = (mountain_hike_dvrl if algorithm == "dvrl" else mountain_hike_rnn).get_config()
    small = HIKE | {"log.interval": 10, "checkpoint.interval": 0}
    c.update_from_flattened_dict(small | {name.replace("__", "."): value for name, value in fields.items()})
    return c


def train(workdir, config, **overrides):
    """One run of training, as train.py does it, in this process; dotted names of `overrides` with `__` for the dot."""
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    if config is not None:
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(overrides)
    run, settings = training.prepare(workdir, config, overrides)
    try:
        return training.train(run, settings)
    finally:
        run.close()


def untimed(lines):
    """Lines of metrics without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in ("wall_time", "obs.fps")} for line in lines]


def checkpoint_arrays(workdir):
    """Every array of a run's newest checkpoint, by name."""
    newest = max(
        (path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((newest / "state").absolute())
    return {name: np.asarray(array) for name, array in arrays.items()}


class Recall(Environment):
    """A cue of +1 or -1 is seen once; for the rest of the episode, naming it earns 1 and the other answer -1.

    Without memory nothing can be earned on average; with it, `LENGTH` - 1 per episode.
    """

    LENGTH = 6
    observation = ObservationSpec((2,), jnp.float32)
    action = ActionSpec(discrete=True, size=2)

    class State(NamedTuple):
        cue: jax.Array
        time: jax.Array

    def reset(self, key):
        state = self.State(jnp.where(jax.random.bernoulli(key), 1.0, -1.0), jnp.zeros((), jnp.int32))
        return state, self._observe(state)

    def step(self, key, state, action):
        del key
        right = (action == 1) == (state.cue > 0)
        reward = jnp.where(state.time == 0, 0.0, jnp.where(right, 1.0, -1.0))
        state = state._replace(time=state.time + 1)
        return Step(state, self._observe(state), reward, state.time == self.LENGTH, jnp.zeros((), bool))

    @staticmethod
    def _observe(state):
        shown = jnp.where(state.time == 0, state.cue, 0.0)
        return jnp.stack([shown, state.time / Recall.LENGTH])


def recall(num_envs: int) -> Batched:
    """A batch of `Recall`."""
    return Batched(Recall(), num_envs)
