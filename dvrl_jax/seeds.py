"""Several seeds in one compiled program: the state of training with one more axis, and the program that takes it.

The axis has a place for each seed, and spare ones where the local devices divide the places among them. On a CPU each
device trains its seeds one after the other, so that each one's numbers are those that it has alone; on a GPU all of
them at once (`Choices.seeds_together`).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvrl_jax import choices
from dvrl_jax.learner import Learner
from dvrl_jax.train_state import TrainState

Array = jax.Array
AXIS = "seed"


def _devices(num_seeds: int) -> list[jax.Device]:
    """The devices that share the seeds. Where those are trained together there are no spare places."""
    devices = jax.local_devices()[:num_seeds]
    while choices.current().seeds_together and num_seeds % len(devices):
        devices.pop()
    return devices


def _mesh(num_seeds: int) -> Mesh:
    return Mesh(np.asarray(_devices(num_seeds)), AXIS)


def places(num_seeds: int) -> int:
    """How long the axis is: at least `num_seeds`, and a multiple of the number of devices that share it."""
    devices = len(_devices(num_seeds))
    return devices * math.ceil(num_seeds / devices)


def stack(states: Sequence[TrainState]) -> TrainState:
    """The states of some seeds as one, each array with an axis of `places` before the others, over the devices.

    Spare places hold copies of the last state.
    """
    spare = places(len(states)) - len(states)
    stacked = jax.tree.map(lambda *xs: np.stack([*xs, *xs[-1:] * spare]), *jax.device_get(list(states)))
    return jax.device_put(stacked, NamedSharding(_mesh(len(states)), P(AXIS)))


def member(state: TrainState, place: int) -> TrainState:
    """The state of the seed in one place; the state itself if it is that of a single seed."""
    return state if state.update.ndim == 0 else jax.tree.map(lambda x: x[place], state)


def counters(state: TrainState) -> list[TrainState]:
    """What log lines are made of, of each place, on the host: a state without weights, environments and window."""
    finished = state.episodes._replace(clipped=(), length=(), true=())
    small = state._replace(params=(), batch_stats=(), opt_state=(), actor=(), window=(), key=(), episodes=finished)
    small = jax.device_get(small)
    return [member(small, place) for place in range(small.update.size)]


def run(learner: Learner, num_seeds: int) -> Callable[[TrainState, Array], TrainState]:
    """`Learner.run` for several seeds: of their stacked states, and the numbers of updates to do, [places].

    On a GPU, where all are trained at once, each does as many as the one that does most.
    """
    over_seeds = _together if learner.choices.seeds_together else _in_turn
    run = lambda state, num_updates: over_seeds(learner, state, num_updates)
    mesh = _mesh(num_seeds)
    return jax.shard_map(run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)


def _in_turn(learner: Learner, state: TrainState, num_updates: Array) -> TrainState:
    return jax.lax.map(lambda x: learner.run(*x), (state, num_updates))


def _together(learner: Learner, state: TrainState, num_updates: Array) -> TrainState:
    """The place in the window, and with it the length of loops, comes from `update`, which all seeds share."""
    axes = TrainState(**(dict.fromkeys(TrainState._fields, 0) | {"update": None}))
    shared = state._replace(update=jnp.max(state.update))
    after = jax.vmap(learner.run, in_axes=(axes, None), out_axes=axes)(shared, jnp.max(num_updates))
    return after._replace(update=jnp.broadcast_to(after.update, state.update.shape))
