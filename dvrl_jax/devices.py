"""Several devices for one run: environments, and all that belongs to them, are divided over the devices.

Weights are on every device. XLA divides the program by how its arguments lie, so gradients and the statistics of batch
norm are those of the whole batch, and the numbers those of one device to rounding.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dvrl_jax.errors import ConfigError
from dvrl_jax.train_state import TrainState

AXIS = "env"


def mesh(num_devices: int) -> Mesh:
    """The first of the local devices, on one axis.

    Raises:
        ConfigError: there are not so many.
    """
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise ConfigError(
            f"num_devices = {num_devices}: must be at most {len(devices)}, the devices that JAX sees here"
        )
    return Mesh(np.asarray(devices[:num_devices]), AXIS)


def shardings(state: TrainState, num_devices: int) -> TrainState:
    """Where each array of a state lies: divided by environments, or on every device."""
    place, num_envs = mesh(num_devices), state.actor.is_first.shape[0]

    def divided(tree: Any, axis: int) -> Any:
        """By that axis, where it is of environments, or of environments times particles."""
        is_of_envs = lambda x: x.ndim > axis and x.shape[axis] and x.shape[axis] % num_envs == 0
        spec = lambda x: P(*[None] * axis, AXIS) if is_of_envs(x) else P()
        return jax.tree.map(lambda x: NamedSharding(place, spec(x)), tree)

    everywhere = jax.tree.map(lambda _: NamedSharding(place, P()), state)
    segments, running = state.window.segments, ("clipped", "length", "true")
    return everywhere._replace(
        actor=divided(state.actor, 0),
        window=everywhere.window._replace(
            segments=divided(segments, 2)._replace(carry=divided(segments.carry, 1)),
        ),
        episodes=everywhere.episodes._replace(**{name: divided(getattr(state.episodes, name), 0) for name in running}),
    )
