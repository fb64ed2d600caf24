"""Why a run's agent learns or does not: what its gradient is made of, and what its actor and critic get to see.

    python -m evidence.causes --workdir=saved_runs/3 --checkpoint=latest

Plays on from a checkpoint with the weights as they are, a whole episode first and then `--updates` segments with
training's own windows, and averages over those. Prints a table and writes `causes-<update>.json` to the run's folder.

The gradient is linear in the losses' coefficients, so a loss's part of it is the gradient with the others' set to 0.
"""

import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from dvrl_jax import a2c, envs
from dvrl_jax import particle_filter as pf
from dvrl_jax.acting import Actor
from dvrl_jax.agents import Agent, bind
from dvrl_jax.errors import RunError
from dvrl_jax.learner import make_learner
from dvrl_jax.runs import command_line, markdown, process
from dvrl_jax.train_state import TrainState
from dvrl_jax.viewing import evaluation, playing

Array = jax.Array

LOSSES = ("value_coef", "action_coef", "entropy_coef", "encoding_coef")
SATURATED = 0.99  # A unit beyond this counts as saturated; its range is from -1 to 1.
REDRAWS = 32  # How often the latest belief update is repeated with other draws.


def gradients_by_loss(config, env, params, batch_stats, actor, window, place, draws) -> tuple[dict, a2c.Outcome]:
    """The gradient of one update and each loss's share of it.

    Returns ({loss: gradient}, what happened); the gradients' sum is the gradient that training takes.
    """

    def gradient(coefs: Array) -> tuple[nnx.State, a2c.Outcome]:
        loss = types.SimpleNamespace(**config.loss.to_dict() | dict(zip(LOSSES, coefs, strict=True)))
        varied = types.SimpleNamespace(**dict(config.items()) | {"loss": loss})
        return make_learner(varied, env).gradient(params, batch_stats, actor, window, place, draws)

    rows = np.diag([float(config.loss[name]) for name in LOSSES]).astype(np.float32)
    grads, outcomes = jax.lax.map(gradient, jnp.asarray(rows))
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    return {name: jax.tree.map(lambda x, i=i: x[i], grads) for i, name in enumerate(LOSSES)}, first(outcomes)


def gradient_numbers(grads: dict[str, nnx.State], max_norm: float) -> dict[str, Array]:
    """Norms of each loss's gradient and of their sum, and the share of each in the step that is taken.

    The share is (g_i . g) / (g . g) with g the sum: the shares add up to 1.
    """
    total = jax.tree.map(lambda *xs: sum(xs), *grads.values())
    norm = optax.tree.norm(total)
    numbers = {"gradient": norm, "gradient kept by clipping": jnp.minimum(1.0, max_norm / norm)}
    for name, grad in grads.items():
        loss = name.removesuffix("_coef")
        numbers[f"gradient of {loss} loss"] = optax.tree.norm(grad)
        numbers[f"share of {loss} loss"] = optax.tree.vdot(grad, total) / jnp.square(norm)
    return numbers


def view_numbers(agent: Agent, actor: Actor, key: Array) -> dict[str, Array]:
    """What actor and critic see, and how much of it is noise.

    `features, spread` is the standard deviation between environments of what actor and critic see, averaged over its
    numbers; `policy mean` and `value` are what they make of it. The rows "by draws" repeat the latest update with other
    draws, those "by order" put the particles in another order.
    """
    keys = jax.random.split(key, REDRAWS)
    start = jax.vmap(lambda key: playing.observe(agent, actor, key))(keys)

    def see(belief: Any) -> tuple[Array, Array, Array]:
        features = agent.features(belief)
        return features, agent.policy(features).mean(), agent.value(features)

    def spreads(seen: tuple[Array, ...], axis: int) -> list[Array]:
        return [jnp.mean(jnp.std(x, axis)) for x in seen]

    names = ("features", "policy mean", "value")
    seen = jax.vmap(see)(start.belief)
    numbers = {f"{name}, spread": x for name, x in zip(names, spreads(seen, 1), strict=True)}
    numbers |= {f"{name}, spread by draws": x for name, x in zip(names, spreads(seen, 0), strict=True)}
    numbers["features, saturated"] = jnp.mean(jnp.abs(seen[0]) > SATURATED)
    numbers["state h, saturated"] = jnp.mean(jnp.abs(start.belief.h) > SATURATED)
    if hasattr(agent, "log_std"):
        numbers["policy, standard deviation"] = jnp.mean(jnp.exp(agent.log_std[...]))
    if not hasattr(start.belief, "log_weight"):
        return numbers
    one = jax.tree.map(lambda x: x[0], start.belief)
    orders = jax.vmap(lambda key: jax.random.permutation(key, one.log_weight.shape[1]))(keys)
    shuffled = jax.vmap(lambda order: see(jax.tree.map(lambda x: x[:, order], one)))(orders)
    numbers |= {f"{name}, spread by order": x for name, x in zip(names, spreads(shuffled, 0), strict=True)}
    weights = pf.normalised_weights(one.log_weight)
    numbers["particles"] = jnp.float32(weights.shape[1])
    numbers["effective sample size"] = jnp.mean(pf.effective_sample_size(weights))
    return numbers


def variance_numbers(agent: Agent, actor: Actor, key: Array) -> dict[str, Array]:
    """Median standard deviations of proposal, prior and emission (of vectors only); {} without a latent z."""
    if not hasattr(actor.belief, "z"):
        return {}
    start = playing.observe(agent, actor, key)
    inputs = agent.encode(start.timestep)
    step = agent.advance(start.carry, inputs, start.trace)
    _, prior_var = agent.prior_of(step.h_prev, inputs)
    numbers = {"proposal of z, deviation": step.proposal_var, "prior of z, deviation": prior_var}
    if agent.observation.likelihood == "normal" and not agent.observation.is_image:
        numbers["emission, deviation"] = agent.emission_of(step.phi_z, step.h_prev, inputs)[1]
    return {name: jnp.median(jnp.sqrt(var)) for name, var in numbers.items()}


def causes(path: Path, updates: int, checkpoint: str, seed: int) -> dict[str, Any]:
    """All numbers of a run's checkpoint, means over `updates` segments; also stored as `causes-<update>.json`.

    Raises:
        RunError: there is no run, no such checkpoint, or the run is of another task.
    """
    config = evaluation.read_run_config(path)
    if config.env.name != "MountainHike":
        raise RunError(f"{path}: is a run of {config.env.name}; this reads policies of Mountain Hike")
    env = envs.make_env(config.env, config.num_envs, seed)
    agent, update = evaluation.load_agent(path, config, env, checkpoint)
    agent.use_running_average = False  # As training sees it.
    graphdef, params, batch_stats = nnx.split(agent, nnx.Param, nnx.BatchStat)
    learner = make_learner(config, env)
    state = learner.init(jax.random.PRNGKey(seed))

    def advance(carry: tuple, x: tuple) -> tuple[tuple, dict[str, Array]]:
        (actor, window), (place, key) = carry, x
        draw_key, view_key, variance_key = jax.random.split(key, 3)
        draws = learner.draw(draw_key)
        grads, outcome = gradients_by_loss(config, env, params, batch_stats, actor, window, place, draws)
        numbers = gradient_numbers(grads, config.optimizer.max_grad_norm)
        after = outcome.rollout.actor
        numbers |= view_numbers(bind(graphdef, params, batch_stats), after, view_key)
        numbers |= variance_numbers(bind(graphdef, params, batch_stats), after, variance_key)
        return (after, window.put(outcome.rollout.segment, place)), numbers

    # Let the environments get through an episode before anything is measured.
    def warm_up(actor: Actor, key: Array) -> tuple[Actor, None]:
        return learner.roll_out(params, batch_stats, actor, learner.draw(key)).actor, None

    @jax.jit
    def measure(state: TrainState) -> dict[str, Array]:
        warm_keys, keys = (jax.random.split(jax.random.fold_in(state.key, i), n) for i, n in enumerate((15, updates)))
        actor, _ = jax.lax.scan(warm_up, state.actor, warm_keys)
        _, numbers = jax.lax.scan(advance, (actor, state.window), (jnp.arange(updates) % config.bptt_segments, keys))
        return jax.tree.map(jnp.mean, numbers)

    result = {
        "update": update,
        "env_steps": update * config.num_envs * config.num_steps,
        "algorithm": config.algorithm,
        "seed": seed,
        "updates": updates,
        "numbers": {name: float(x) for name, x in measure(state).items()},
    }
    file = path / f"causes-{update}.json"
    try:
        file.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({error.strerror})") from None
    return result


def main() -> int:
    process.share_gpu()
    result = causes(Path(FLAGS.workdir), FLAGS.updates, FLAGS.checkpoint, FLAGS.seed)
    print(f"checkpoint of update {result['update']:,}, means over {result['updates']} updates' worth of steps\n")
    print(
        markdown.table(["what", "mean"], [[name, f"{x:.4g}"] for name, x in sorted(result["numbers"].items())]), end=""
    )
    return 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_integer("updates", 60, "How many updates' worth of steps to average over.", lower_bound=1)
    flags.DEFINE_string("checkpoint", "best", "'best' (by result.true), 'latest', or an update number.")
    seed = "Fixes episodes and draws; other than in training and evaluation."
    flags.DEFINE_integer("seed", 3_000_000, seed, lower_bound=0, upper_bound=2**31 - 1)
    command_line.run(main)
