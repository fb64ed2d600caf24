"""A batch whose parts are stepped on a device each: for environments with a state of their own, such as EnvPool's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dvrl_jax.envs.batched import BatchedEnvironment, EnvState

Array = jax.Array


def own_places(mesh: Mesh) -> range:
    """Where on a mesh of one axis (`devices.mesh`) this process's devices are."""
    own = [place for place, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return range(own[0], own[-1] + 1)


class Divided(BatchedEnvironment):
    """Equal parts, one for each device of a mesh of one axis. `EnvState.inner` has that axis before the parts' own.

    Of several processes each has the parts of its own devices, `parts`. Where those of others are, `reset` has zeros.
    """

    def __init__(self, parts: Sequence[BatchedEnvironment], mesh: Mesh):
        self.parts, self.mesh, self.places = parts, mesh, own_places(mesh)
        one, (self.axis,) = parts[0], mesh.axis_names
        self.name, self.settings, self.painter = one.name, one.settings, one.painter
        self.num_envs, self.observation, self.action = mesh.size * one.num_envs, one.observation, one.action
        self.restorable, self.steps_per_second, self.wrapped = one.restorable, one.steps_per_second, one.wrapped

    def reset(self, key: Array) -> EnvState:
        keys = jax.random.split(key, self.mesh.size)[self.places.start : self.places.stop]
        states = [part.reset(key) for part, key in zip(self.parts, keys, strict=True)]
        nothing = jax.tree.map(jnp.zeros_like, states[0])
        before, after = self.places.start, self.mesh.size - self.places.stop
        states = [nothing] * before + states + [nothing] * after
        whole = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(state._replace(inner=()) for state in states))
        return whole._replace(inner=jax.tree.map(lambda *xs: jnp.stack(xs), *(state.inner for state in states)))

    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes actions as `BatchedEnvironment.step`: each device those of its part."""

        def own(state: EnvState, action: Array) -> EnvState:
            state = state._replace(inner=jax.tree.map(lambda x: x[0], state.inner))
            steps = [part.step for part in self.parts]
            state = jax.lax.switch(jax.lax.axis_index(self.axis) - self.places.start, steps, state, action)
            return state._replace(inner=jax.tree.map(lambda x: x[None], state.inner))

        over_parts = jax.shard_map(own, mesh=self.mesh, in_specs=P(self.axis), out_specs=P(self.axis), check_vma=False)
        return over_parts(state, action)
