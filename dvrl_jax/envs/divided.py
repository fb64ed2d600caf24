"""A batch whose parts are stepped on a device each: for environments with a state of their own, such as EnvPool's."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dvrl_jax.envs.batched import BatchedEnvironment, EnvState

Array = jax.Array


class Divided(BatchedEnvironment):
    """Equal parts, one for each device of a mesh of one axis. `EnvState.inner` has that axis before the parts' own."""

    def __init__(self, parts: Sequence[BatchedEnvironment], mesh: Mesh):
        self.parts, self.mesh = parts, mesh
        one, (self.axis,) = parts[0], mesh.axis_names
        self.name, self.settings, self.painter = one.name, one.settings, one.painter
        self.num_envs, self.observation, self.action = len(parts) * one.num_envs, one.observation, one.action
        self.restorable, self.steps_per_second, self.wrapped = one.restorable, one.steps_per_second, one.wrapped

    def reset(self, key: Array) -> EnvState:
        states = [part.reset(key) for part, key in zip(self.parts, jax.random.split(key, len(self.parts)), strict=True)]
        whole = jax.tree.map(lambda *xs: jnp.concatenate(xs), *(state._replace(inner=()) for state in states))
        return whole._replace(inner=jax.tree.map(lambda *xs: jnp.stack(xs), *(state.inner for state in states)))

    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes actions as `BatchedEnvironment.step`: each device those of its part."""

        def own(state: EnvState, action: Array) -> EnvState:
            state = state._replace(inner=jax.tree.map(lambda x: x[0], state.inner))
            steps = [part.step for part in self.parts]
            state = jax.lax.switch(jax.lax.axis_index(self.axis), steps, state, action)
            return state._replace(inner=jax.tree.map(lambda x: x[None], state.inner))

        over_parts = jax.shard_map(own, mesh=self.mesh, in_specs=P(self.axis), out_specs=P(self.axis), check_vma=False)
        return over_parts(state, action)
