"""Several devices for one run: environments, and all that belongs to them, are divided over the devices.

Weights are on every device. XLA divides the program by how its arguments lie, so gradients and the statistics of batch
norm are those of the whole batch, and the numbers those of one device to rounding.

The devices may be those of several processes (`runs/hosts.py`). Each process then makes the whole state and puts its
devices' part of it there (`put`), and what one of them alone knows is made known to all (`from_first`, `largest`).
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvrl_jax.errors import ConfigError
from dvrl_jax.train_state import TrainState

AXIS = "env"


def are_several(num_devices: int) -> bool:
    """Whether a run with so many devices in each process has more than one."""
    return num_devices * jax.process_count() > 1


def check(config) -> None:
    """Raises ConfigError if a run with this configuration cannot be divided over the processes."""
    number = config.num_devices * jax.process_count()
    if config.num_seeds > 1:
        raise ConfigError(f"num_seeds = {config.num_seeds}: must be 1 with several processes")
    if config.num_envs % number:
        raise ConfigError(f"num_envs = {config.num_envs}: must be a multiple of {number}, the devices of all processes")


def mesh(num_devices: int) -> Mesh:
    """The first `num_devices` of each process, on one axis, process by process.

    Raises:
        ConfigError: there are not so many.
    """
    here = len(jax.local_devices())
    if num_devices > here:
        raise ConfigError(f"num_devices = {num_devices}: must be at most {here}, the devices that JAX sees here")
    of = lambda process: [device for device in jax.devices() if device.process_index == process][:num_devices]
    return Mesh(np.asarray([device for process in range(jax.process_count()) for device in of(process)]), AXIS)


def shardings(state: TrainState, num_devices: int) -> TrainState:
    """Where each array of a state lies: divided by environments, or on every device."""
    place, num_envs = mesh(num_devices), state.actor.is_first.shape[0]

    def divided(tree: Any, axis: int, more: int = 0) -> Any:
        """By that axis, where it is of environments, or of environments times particles, and `more` axes follow."""
        is_of_envs = lambda x: x.ndim > axis + more and x.shape[axis] and x.shape[axis] % num_envs == 0
        spec = lambda x: P(*[None] * axis, AXIS) if is_of_envs(x) else P()
        return jax.tree.map(lambda x: NamedSharding(place, spec(x)), tree)

    everywhere = jax.tree.map(lambda _: NamedSharding(place, P()), state)
    segments, running = state.window.segments, ("clipped", "length", "true")
    return everywhere._replace(
        actor=divided(state.actor, 0),
        window=everywhere.window._replace(
            segments=divided(segments, 2)._replace(
                carry=divided(segments.carry, 1),
                notes=divided(segments.notes, 2, more=1),  # Statistics of batch norm have features in that place.
            ),
        ),
        episodes=everywhere.episodes._replace(**{name: divided(getattr(state.episodes, name), 0) for name in running}),
    )


def put(state: TrainState, lies: TrainState) -> TrainState:
    """A whole state, laid out as `lies` (`shardings`) says. Of several processes each puts its devices' part.

    All have the same state, but for what is divided by environments: of that, another process's part may differ.
    """
    if jax.process_count() == 1:
        return jax.device_put(state, lies)

    def of_all(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(of_all, state, lies)


def fetch(tree: Any) -> Any:
    """A tree whose arrays this process has whole: those divided over processes are gathered, by all of them at once."""
    whole = lambda x: x.is_fully_addressable or x.is_fully_replicated
    gather = lambda x: x if whole(x) else multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(lambda x: gather(x) if isinstance(x, jax.Array) else x, tree)


def from_first(tree: Any) -> Any:
    """What the first process has, a tree of arrays; in all processes it has the same shapes. Every one must call it."""
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    # As bytes: they are summed, with zeros from all others, and -0.0 + 0.0 is 0.0.
    joined = np.concatenate([leaf.reshape(-1).view(np.uint8) for leaf in leaves])
    joined = multihost_utils.broadcast_one_to_all(joined)
    pieces = np.split(joined, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    found = [np.frombuffer(x.tobytes(), y.dtype).reshape(y.shape) for x, y in zip(pieces, leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


def largest(number: int) -> int:
    """The largest of the numbers that the processes call it with. Every one must call it."""
    return number if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(number))))
