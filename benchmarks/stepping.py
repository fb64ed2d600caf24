"""What adapting costs: an environment of Gymnax stepped through `Batched`, and by `vmap` and `scan` directly, in turns.

    python -m benchmarks.stepping --ids=CartPole-v1,Breakout-MinAtar --num_envs=64

Both play the same random actions and begin new episodes by themselves; prints medians and their ratio in Markdown.
"""

import statistics
import time
from collections.abc import Callable

import gymnax
import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.throughput import machine
from dvrl_jax import envs
from dvrl_jax.runs import command_line, markdown

FLAGS = flags.FLAGS

Array = jax.Array
IDS = ["CartPole-v1", "Pendulum-v1", "MemoryChain-bsuite", "Breakout-MinAtar", "SpaceInvaders-MinAtar"]


def adapted(name: str, num_envs: int) -> Callable[[Array, Array], tuple[Array, Array]]:
    """A function of a key and actions [T, B, ...]: the last observations [B, ...] and the sum of rewards [B]."""
    env = envs.Batched(envs.Gymnax(*gymnax.make(name)), num_envs)

    def play(key, actions):
        def step(carry, action):
            state, total = carry
            state = env.step(state, action)
            return (state, total + state.reward), None

        return jax.lax.scan(step, (env.reset(key), jnp.zeros(num_envs)), actions)[0]

    return lambda key, actions: (lambda state, total: (state.obs, total))(*play(key, actions))


def direct(name: str, num_envs: int) -> Callable[[Array, Array], tuple[Array, Array]]:
    """The same by Gymnax's own `reset` and `step`; real actions are clipped and scaled as by `Gymnax`."""
    env, params = gymnax.make(name)
    act = envs.Gymnax(env, params).to_gymnax

    def play(key, actions):
        def step(carry, action):
            keys, state, obs, total = carry
            keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            advance = lambda key, state, action: env.step(key, state, act(action), params)
            obs, state, reward, *_ = jax.vmap(advance)(step_keys, state, action)
            return (keys, state, obs, total + reward), None

        keys = jax.random.split(key, num_envs)
        obs, state = jax.vmap(env.reset, in_axes=(0, None))(keys, params)
        _, _, obs, total = jax.lax.scan(step, (keys, state, obs, jnp.zeros(num_envs)), actions)[0]
        return obs, total

    return play


def seconds(play: Callable, key: Array, actions: Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(play(key, actions))
    return time.perf_counter() - start


def measure(name: str) -> list[str]:
    """A row of the table: medians of both in steps per second, and how much longer a step takes when adapted."""
    spec = envs.Gymnax(*gymnax.make(name)).action
    shape = (FLAGS.steps, FLAGS.num_envs)
    key = jax.random.PRNGKey(0)
    actions = jax.random.randint(key, shape, 0, spec.size)
    if not spec.discrete:
        actions = jax.random.normal(key, (*shape, spec.size))
    ways = [jax.jit(way(name, FLAGS.num_envs)) for way in (adapted, direct)]
    for play in ways:
        seconds(play, key, actions)
    times = [[seconds(play, key, actions) for play in ways] for _ in range(FLAGS.repeats)]
    ours, theirs = map(statistics.median, zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    rate = lambda time: f"{FLAGS.steps * FLAGS.num_envs / time:,.0f}"
    return [name, rate(ours), rate(theirs), f"{ratio:.2f}"]


def main() -> int:
    rows = [measure(name) for name in FLAGS.ids]
    print(machine())
    print(markdown.table(["environment", "adapted (steps/s)", "directly (steps/s)", "time, ratio"], rows), end="")
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("ids", IDS, "Which environments.")
    flags.DEFINE_integer("num_envs", 64, "How many of each at once.", lower_bound=1)
    flags.DEFINE_integer("steps", 2000, "Steps in a measurement.", lower_bound=1)
    flags.DEFINE_integer("repeats", 9, "Measurements of each way.", lower_bound=1)
    command_line.run(main)
