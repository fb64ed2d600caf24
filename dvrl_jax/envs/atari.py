"""Atari games, emulated in C++ by EnvPool and stepped from inside the compiled program.

EnvPool delivers a new episode one call late: after a `done`, the next call ignores its action and returns the new
episode's first frame with reward 0. `EnvState.valid` is False for that call.

Emulator state cannot be saved: a resumed run starts new games.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dvrl_jax import memory
from dvrl_jax.envs.base import ActionSpec, ObservationSpec
from dvrl_jax.envs.batched import BatchedEnvironment, EnvState
from dvrl_jax.errors import ConfigError

Array = jax.Array

FRAME_SIZE = 84
STICKY_ACTIONS = 0.25
MAX_NOOPS = 30
FRAMES_PER_SECOND = 60  # Of the console.
BYTES_PER_GAME = 1_000_000  # What an emulator takes, measured with 128 of them.
MAX_FRAMES = 108_000  # Of the emulator, half an hour: a longer game is cut off, as is usual for Atari.


def make_pool(game: str, num_envs: int, seed: int, frame_skip: int, first_core: int = -1):
    """Returns EnvPool's own pool of games with the original's wrappers; `seed` fixes every emulator's randomness.

    Its threads are tied to a core each, from `first_core` on (and from core 0 on after the last one); -1 ties none.
    """
    import envpool

    return envpool.make_gymnasium(
        f"{game}-v5",
        num_envs=num_envs,
        seed=seed,
        thread_affinity_offset=first_core,
        stack_num=1,
        frame_skip=frame_skip,
        max_episode_steps=MAX_FRAMES // frame_skip,
        noop_max=MAX_NOOPS,
        use_fire_reset=True,
        episodic_life=True,
        reward_clip=True,
        repeat_action_probability=STICKY_ACTIONS,
        full_action_space=False,
        img_height=FRAME_SIZE,
        img_width=FRAME_SIZE,
        gray_scale=True,
    )


class Atari(BatchedEnvironment):
    """`num_envs` copies of one game: grey 84x84 frames, clipped rewards, a life an episode, sticky actions.

    For several seeds of one program it has as many pools of games. `EnvState.inner` is (place, handle, done): which
    pool is the seed's, EnvPool's handle, which must be threaded from call to call, and the `done` of the last call,
    which tells a late reset.
    """

    settings = {"frame_skip": 4, "first_core": -1}
    observation = ObservationSpec((FRAME_SIZE, FRAME_SIZE, 1), jnp.uint8)
    restorable = False

    @classmethod
    def check(cls, config) -> None:
        if config.env.frame_skip > MAX_FRAMES:
            said = f"at most {MAX_FRAMES:,}, the frames after which a game of Atari is cut off"
            raise ConfigError(f"env.frame_skip = {config.env.frame_skip}: must be {said}")

    @classmethod
    def from_config(cls, config, num_envs: int, seed: int) -> "Atari":
        return cls.for_seeds(config, num_envs, [seed])

    @classmethod
    def for_seeds(cls, config, num_envs: int, seeds: Sequence[int]) -> "Atari":
        return cls(config.name, num_envs, seeds, config.frame_skip, config.first_core)

    @classmethod
    def observation_of(cls, config) -> ObservationSpec:
        return cls.observation

    def __init__(self, game: str, num_envs: int, seed: int | Sequence[int], frame_skip: int = 4, first_core: int = -1):
        seeds = [seed] if isinstance(seed, int) else seed
        needed, there = len(seeds) * num_envs * BYTES_PER_GAME, memory.free_of_host()
        if there is not None and needed > there:
            raise ValueError(f"they need {memory.gigabytes(needed)} of memory, and {memory.gigabytes(there)} are free")
        self.num_envs, self.steps_per_second = num_envs, FRAMES_PER_SECOND / frame_skip
        self._pools = [make_pool(game, num_envs, each, frame_skip, first_core) for each in seeds]
        self._calls = [pool.xla() for pool in self._pools]  # (handle, recv, send, step) each.
        self.action = ActionSpec(discrete=True, size=int(self._pools[0].action_space.n))
        self._place, self._step_pool = 0, self._make_step()

    def _make_step(self) -> Callable:
        """A step of one pool's games: (place [], handle, actions [B]) -> EnvPool's (handle, outcome).

        Under `vmap` over seeds there is no vmapped step: the pools are called one by one.
        """

        def of_pool(recv, send, handle, action):
            return recv(send(handle, action, jnp.arange(self.num_envs, dtype=jnp.int32)))

        steps = [functools.partial(of_pool, recv, send) for _, recv, send, _ in self._calls]
        if len(steps) == 1:
            return lambda place, *arguments: steps[0](*arguments)
        step = jax.custom_batching.custom_vmap(lambda place, *arguments: jax.lax.switch(place, steps, *arguments))

        @step.def_vmap
        def of_all(axis_size, in_batched, place, handle, action):
            del in_batched  # All of them: each seed has its own.
            each = [jax.lax.switch(place[i], steps, handle[i], action[i]) for i in range(axis_size)]
            outcomes = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
            return outcomes, jax.tree.map(lambda _: True, outcomes)

        return step

    def of_seed(self, place: int) -> "Atari":
        other = copy.copy(self)
        other._place = place
        return other

    def reset(self, key: Array) -> EnvState:
        """Starts new games. The key is not used: EnvPool has its own generators, seeded when it is made."""
        if not isinstance(key, jax.core.Tracer):  # Not where only shapes are asked for.
            self._pools[self._place].async_reset()
        handle, recv, *_ = self._calls[self._place]
        handle, (obs, *_) = jax.jit(recv)(jnp.asarray(handle))
        return EnvState.begin((jnp.int32(self._place), handle, jnp.zeros(self.num_envs, bool)), _to_nhwc(obs))

    def step(self, state: EnvState, action: Array) -> EnvState:
        """Takes actions [B] int32; obs are uint8 [B, 84, 84, 1]. After the end of an episode none is taken."""
        place, handle, was_done = state.inner
        handle, outcome = self._step_pool(place, handle, action.astype(jnp.int32))
        obs, reward, terminated, truncated, info = outcome
        done, obs = terminated | truncated, _to_nhwc(obs)
        return EnvState(
            inner=(place, handle, done),
            obs=obs,
            reward=jnp.where(was_done, 0.0, reward),
            done=done & ~was_done,
            truncated=truncated & ~terminated & ~was_done,
            valid=~was_done,
            true_reward=jnp.where(was_done, 0.0, info["reward"].astype(jnp.float32)),
            game_over=(info["terminated"].astype(bool) | truncated) & ~was_done,
            observed=jnp.ones(self.num_envs, bool),
            final_obs=obs,  # The last frame comes with the `done`.
        )


def _to_nhwc(obs: Array) -> Array:
    return jnp.moveaxis(obs, 1, -1)
