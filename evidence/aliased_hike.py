"""What can be reached on the aliased hike: mean returns of policies that plan as if the position were known.

    python -m evidence.aliased_hike

The planner of `planner.py` for a seen position gives the outlook G_t(p) of being sent to p at step t. What it is used
on differs:

    sees the position       max_a G_t(p + a) - 0.1 |a| at the true position p
    QMDP                    max_a sum_p b(p) G_t(p + a) - 0.1 |a| under the exact belief b (Littman et al., 1995)
    most probable place     as if the cell of largest b were the position
    mean of the belief      as if the mean of b were the position, which may lie where no hiker is
    standing still          a = 0

QMDP takes the position for known after the next step, and so never moves in order to find out where it is.
"""

import functools
import math
import platform

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dvrl_jax.envs import Batched, hike_grid
from dvrl_jax.envs import aliased_hike as task
from dvrl_jax.envs import mountain_hike as hike
from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, markdown
from evidence import planner

Array = jax.Array

DIRECTIONS = 16
POLICIES = ("sees the position", "QMDP", "most probable place", "mean of the belief", "standing still")


def expected_outlooks(outlook: Array, belief: Array, actions: np.ndarray, spacing: float) -> Array:
    """sum_p b(p) outlook(p + a) [N] for all actions [N, 2], with b and the outlook on the same cells [n, n]."""
    cells = np.floor(actions / spacing).astype(np.int32)
    fractions = actions / spacing - cells
    margin = int(np.abs(cells).max()) + 1
    padded = jnp.pad(outlook, margin, mode="edge")
    n = outlook.shape[0]

    @functools.cache
    def shifted(x, y):
        return jnp.sum(belief * padded[margin + x : margin + x + n, margin + y : margin + y + n])

    values = []
    for (x, y), (u, v) in zip(cells.tolist(), fractions.tolist(), strict=True):
        left = (1.0 - v) * shifted(x, y) + v * shifted(x, y + 1)
        right = (1.0 - v) * shifted(x + 1, y) + v * shifted(x + 1, y + 1)
        values.append((1.0 - u) * left + u * right)
    return jnp.stack(values)


@functools.partial(jax.jit, static_argnames=("policy", "spacing", "episodes"))
def play(policy: str, outlooks: Array, std: float, spacing: float, episodes: int, key: Array) -> Array:
    """Returns [episodes] of whole episodes by one of `POLICIES`, for outlooks [T, n, n] on cells of this side."""
    env, axis, actions = Batched(task.AliasedHike(std), episodes), _axis(spacing), planner.action_set(DIRECTIONS)
    plan = planner.Plan(axis, actions, outlooks, 0.0)
    places = jnp.stack(jnp.meshgrid(axis, axis, indexing="ij"), axis=-1)

    def choose(outlook, position, belief):
        if policy == "standing still":
            return jnp.zeros(2)
        if policy == "QMDP":
            values = expected_outlooks(outlook, belief, actions, spacing) - planner.cost(jnp.asarray(actions))
            return jnp.asarray(actions, jnp.float32)[jnp.argmax(values)]
        if policy == "most probable place":
            position = places.reshape(-1, 2)[jnp.argmax(belief)]
        elif policy == "mean of the belief":
            position = jnp.einsum("xy,xyd->d", belief, places)
        return planner.act(plan, outlook, position[None])[0]

    def step(carry, outlook):
        state, prior = carry
        weigh = lambda obs, prior: hike_grid.correct(prior, task.log_likelihood(obs, std, axis))
        belief = jax.vmap(weigh)(state.obs, prior)
        action = jax.vmap(functools.partial(choose, outlook))(state.inner.state.position, belief)
        prior = jax.vmap(lambda belief, action: hike_grid.predict(belief, action, axis))(belief, action)
        state = env.step(state, action)
        return (state, prior), state.reward

    first = hike_grid.first_belief(jnp.asarray(task.CORNERS), axis)
    start = (env.reset(key), jnp.broadcast_to(first, (episodes, *first.shape)))
    return jnp.sum(jax.lax.scan(step, start, outlooks)[1], axis=0)


def _axis(spacing: float) -> np.ndarray:
    """Centres of the planner's cells."""
    return (np.arange(round(2.0 * planner.EXTENT / spacing)) + 0.5) * spacing - planner.EXTENT


def measure(std: float, spacing: float, episodes: int, seed: int) -> dict[str, tuple[float, float]]:
    """Mean return and its standard error of each policy, all on the same starts and noise."""
    outlooks = planner.make_plan(0.0, spacing, DIRECTIONS, hike.EPISODE_LENGTH).outlook
    found = {}
    for policy in POLICIES:
        returns = np.asarray(play(policy, outlooks, std, spacing, episodes, jax.random.PRNGKey(seed)), np.float64)
        found[policy] = (float(returns.mean()), float(returns.std(ddof=1) / math.sqrt(episodes)))
    return found


def main() -> int:
    cells = 0.5 / FLAGS.spacing
    if abs(cells - round(cells)) > 1e-6:
        raise ConfigError(f"--spacing={FLAGS.spacing}: must be a whole fraction of 0.5, such as 0.05")
    try:
        noises = [float(noise) for noise in FLAGS.noise]
    except ValueError:
        noises = [math.nan]
    if not all(0 <= noise < math.inf for noise in noises):
        raise ConfigError(f"--noise={','.join(FLAGS.noise)}: must be numbers, at least 0, with commas between")
    rows = []
    for noise in noises:
        found = measure(noise, FLAGS.spacing, FLAGS.episodes, FLAGS.seed)
        rows += [[f"{noise:g}", policy, f"{mean:.2f} ± {error:.2f}"] for policy, (mean, error) in found.items()]
    print(f"{FLAGS.episodes:,} episodes each, cells of {FLAGS.spacing:g}; ", end="")
    print(f"{platform.processor() or platform.machine()}, {jax.default_backend()}\n")
    print(markdown.table(["noise", "policy", "return"], rows), end="")
    return 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_list("noise", ["0.1", "0.3"], "Noise of the distances in box units.")
    flags.DEFINE_integer("episodes", 400, "How many episodes each policy plays.", lower_bound=2)
    flags.DEFINE_float("spacing", 0.05, "Side of a cell in box units.", lower_bound=0.01, upper_bound=0.05)
    flags.DEFINE_integer("seed", 0, "Fixes starts and noise.", lower_bound=0, upper_bound=2**31 - 1)
    command_line.run(main)
