"""Breaks one line at a time and sees whether a test notices: python -m tests.reliability.mutants [--only=TEXT]

Each mutant is a piece of text of one of the files below (in `TESTS`) with something else in its place. It is put into a
copy of the project, where the fast tests of that file run until the first one fails. A mutant that survives must be
explained below, in its last field, else the script fails. Text that is no longer in the file fails too.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
FILTER, DISTINCT = "dvrl_jax/particle_filter.py", "dvrl_jax/fast/distinct.py"
LINEAGES, WINDOW, A2C = "dvrl_jax/fast/lineages.py", "dvrl_jax/bptt.py", "dvrl_jax/a2c.py"
ACTING, CHOICES, LOOP = "dvrl_jax/acting.py", "dvrl_jax/choices.py", "dvrl_jax/runs/loop.py"
NETWORKS, BASE = "dvrl_jax/networks.py", "dvrl_jax/agents/base.py"
DVRL, RNN, PARTICLES = (f"dvrl_jax/agents/{name}.py" for name in ("dvrl", "rnn", "particles"))
PLAYING, GAMES = "dvrl_jax/viewing/playing.py", "dvrl_jax/viewing/evaluation.py"
# The tests that guard a file, the quickest first.
TESTS = {
    FILTER: ["tests/test_particle_filter.py"],
    DISTINCT: ["tests/test_distinct.py"],
    LINEAGES: ["tests/test_lineages.py"],
    WINDOW: [
        "tests/test_bptt.py::test_gradient_equals_autodiff_through_the_unrolled_window[rnn-gaussian-2]",
        "tests/test_bptt.py::test_window_fills_and_starts_anew[rnn-gaussian]",
        "tests/reliability/test_numerical_faults.py::test_after_a_skipped_update_the_window_is_empty_and_fills_again[rnn]",
        "tests/test_bptt.py",
        "tests/test_lineages.py",
        "tests/test_distinct.py",
        "tests/test_parity.py",
    ],
    A2C: [
        "tests/reliability/test_losses.py",
        "tests/test_bptt.py::test_gradient_equals_autodiff_through_the_unrolled_window[rnn-gaussian-2]",
        "tests/test_bptt.py::test_window_fills_and_starts_anew[rnn-gaussian]",
        "tests/test_update.py",
        "tests/reliability/test_numerical_faults.py::test_after_a_skipped_update_the_window_is_empty_and_fills_again[rnn]",
        "tests/test_gpu.py::test_an_update_that_is_not_finite_is_skipped",
        "tests/test_atari.py::test_training_gradient_ignores_whatever_a_late_reset_brings[rnn]",
        "tests/test_bptt.py",
        "tests/test_distinct.py",
        "tests/test_lineages.py",
        "tests/reliability/test_numerical_faults.py",
        "tests/test_parity.py",
        "tests/test_agents.py",
    ],
    ACTING: [
        "tests/test_update.py",
        "tests/test_bptt.py::test_gradient_equals_autodiff_through_the_unrolled_window[rnn-gaussian-2]",
        "tests/test_playing.py",
        "tests/test_atari.py::test_training_gradient_ignores_whatever_a_late_reset_brings[rnn]",
        "tests/test_bptt.py",
        "tests/test_parity.py",
        "tests/test_agents.py",
    ],
    CHOICES: ["tests/test_gpu.py", "tests/reliability/test_numerical_faults.py"],
    LOOP: [
        "tests/reliability/test_numerical_faults.py::test_training_goes_no_further_than_too_many_skipped_updates",
        "tests/test_api.py::test_training_that_diverges_stops_and_says_why",
    ],
    NETWORKS: ["tests/test_networks.py", "tests/test_agents.py"],
    BASE: ["tests/test_agents.py"],
    DVRL: ["tests/test_update.py", "tests/test_agents.py"],
    PARTICLES: ["tests/test_update.py", "tests/test_agents.py"],
    RNN: ["tests/test_agents.py"],
    PLAYING: ["tests/test_playing.py"],
    GAMES: ["tests/test_playing.py", "tests/test_api.py::test_a_run_is_read_with_its_particles"],
}


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    explanation: str = ""  # Why no test can notice.


# A piece of each file, what is put in its place and, where no test can notice, why.
PAIRS: dict[str, list[tuple[str, ...]]] = {
    FILTER: [
        # Normalised weights.
        ("top = jnp.max(log_weights", "top = jnp.min(log_weights"),
        ("jnp.where(jnp.isneginf(top), 0.0, log_weights)", "log_weights"),
        ("return jax.nn.softmax(safe, axis=-1)", "return jax.nn.softmax(safe, axis=0)"),
        ("return jax.nn.softmax(safe, axis=-1)", "return jnp.exp(safe)"),
        # Resampling.
        ("normalised_weights(jax.lax.stop_gradient(log_weights))", "jax.lax.stop_gradient(log_weights)"),
        ("normalised_weights(jax.lax.stop_gradient(log_weights))", "normalised_weights(log_weights[::-1])"),
        ("jnp.cumsum(normalised_weights", "jnp.asarray(normalised_weights"),
        ("    cumulative = cumulative / cumulative[:, -1:]  #", "    #"),
        ("(u[:, None] + jnp.arange(num_particles)) / num_particles", "(u[:, None] + jnp.arange(num_particles)) / 10"),
        ("(u[:, None] + jnp.arange(num_particles)) /", "(0.5 + u[:, None] * 0 + jnp.arange(num_particles)) /"),
        ("(u[:, None] + jnp.arange(num_particles)) /", "(u[:, None] + jnp.arange(num_particles) + 1) /"),
        ("jnp.minimum(positions, 1.0 - jnp.finfo(positions.dtype).epsneg)", "positions"),
        ("1.0 - jnp.finfo(positions.dtype).epsneg", "1.0"),
        ("1.0 - jnp.finfo(positions.dtype).epsneg", "0.999"),
        ("cumulative[:, None, :] <= positions", "cumulative[:, None, :] < positions"),
        ("cumulative[:, None, :] <= positions", "cumulative[:, None, :] >= positions"),
        ("positions[:, :, None], axis=-1, dtype", "positions[:, :, None], axis=-2, dtype"),
        ("(u + jnp.arange(num_particles))", "(u[:, :1] + jnp.arange(num_particles))"),
        ("return _owners(log_weights, u)", "return _owners(log_weights, u[:, :1] + 0 * u)"),
        ("jnp.log(expected - certain)", "jnp.log(expected)"),
        ("num_particles * alpha * jnp.exp(chosen)", "alpha * jnp.exp(chosen)"),
        ("inherited + log_weights, axis=-1)", "log_weights, axis=-1)"),
        ("dtype=jnp.int32)\n\n\ndef resample", "dtype=jnp.int16)\n\n\ndef resample"),
        ("ancestors[:, :, None], axis=1, mode", "ancestors[:, :1, None], axis=1, mode"),
        ("ancestors[:, :, None], axis=1, mode", "ancestors[:, ::-1, None], axis=1, mode"),
        # Killed particles.
        ("return num_particles - jnp.sum(has_child", "return jnp.sum(has_child"),
        ("jnp.arange(num_particles), axis=1)", "jnp.arange(num_particles), axis=2)"),
        ("jnp.arange(num_particles), axis=1)", "jnp.arange(1, num_particles + 1), axis=1)"),
        # Normal densities.
        ("mean + jnp.sqrt(var) * noise", "mean + var * noise"),
        ("mean + jnp.sqrt(var) * noise", "mean - jnp.sqrt(var) * noise"),
        ("jnp.square(x - mean) / var", "jnp.square(x - mean) / jnp.square(var)"),
        ("jnp.square(x - mean) / var", "jnp.square(x + mean) / var"),
        ("/ var + jnp.log(var)", "/ var - jnp.log(var)"),
        ("/ var + jnp.log(var)", "/ var + 2 * jnp.log(var)"),
        ("-0.5 * (quadratic + x.shape[-1]", "-0.5 * (quadratic + x.shape[0]"),
        ("math.log(2.0 * math.pi))", "math.log(math.pi))"),
        ("-0.5 * (quadratic", "0.5 * (quadratic"),
        # Softplus and Bernoulli densities.
        ("jnp.maximum(x, 0.0) + jnp.log", "jnp.log"),
        ("jnp.maximum(x, 0.0) + jnp.log", "jnp.minimum(x, 0.0) + jnp.log"),
        ("jnp.exp(-jnp.abs(x))", "jnp.exp(jnp.abs(x))"),
        ("jax.nn.sigmoid(*primals) * tangents[0]", "jnp.tanh(*primals) * tangents[0]"),
        ("jax.nn.sigmoid(*primals) * tangents[0]", "jax.nn.sigmoid(*primals)"),
        ("x * logits - softplus(logits)", "x * logits - softplus(-logits)"),
        ("x * logits - softplus(logits)", "(1 - x) * logits - softplus(logits)"),
        ("per_pixel = per_pixel * mask", "pass"),
        ("axis=(-3, -2, -1))", "axis=(-2, -1))"),
        # Weights.
        ("prior_log_prob - proposal_log_prob + emission", "proposal_log_prob - prior_log_prob + emission"),
        ("proposal_log_prob + emission_log_prob", "proposal_log_prob - emission_log_prob"),
        ("logsumexp(log_weights, axis=-1) - math.log", "logsumexp(log_weights, axis=-1) + math.log"),
        ("math.log(log_weights.shape[-1])", "math.log(log_weights.shape[0])"),
        ("jax.nn.logsumexp(log_weights, axis=-1)", "jnp.max(log_weights, axis=-1)"),
        ("1.0 / jnp.sum(jnp.square(weights", "jnp.sum(jnp.square(weights"),
        ("jnp.sum(jnp.square(weights", "jnp.sum((weights"),
        ("normalised_weights(log_weights), values)", "normalised_weights(-log_weights), values)"),
        ("normalised_weights(log_weights), values)", "jnp.exp(log_weights), values)"),
    ],
    DISTINCT: [
        ("blank & (jnp.cumsum(blank, axis=1) == 1)", "blank"),
        ("jnp.where(self.first[..., None], total, grads)", "grads"),
        ("jnp.where(self.blank[..., None], grads, 0.0)", "grads"),
        ("(number >= step) & (number < last)", "(number >= step)"),
        ("self.ends - begin <= room", "self.ends - begin < room"),
        ("self.ends[following - 1] - begin", "self.ends[following - 1]"),
        ("jnp.sum(self.blank, axis=1, keepdims=True), 1)", "1, 1)"),
        ("& used[:, None] & used", "& used[:, None]"),
        ("alike[:, None] / envs", "alike[:, None]"),
        ("(begin,), (room,)", "(step,), (room,)"),
        ("obs == 0", "obs >= 0"),
        ("rows.of_images(g), 0.0)", "0.0, 0.0)"),
        ("jax.tree.map(jnp.add, grads, vjp(grad)[0])", "jax.tree.map(jnp.subtract, grads, vjp(grad)[0])"),
        ("last = (place + 1) * num_steps", "last = place * num_steps"),
        ("begin = (window.first * num_steps, grads)", "begin = (num_steps, grads)"),
    ],
    LINEAGES: [
        ("jnp.any(h_grad != 0.0", "jnp.all(h_grad != 0.0"),
        ("used = row < size", "used = row <= size"),
        ("jnp.where(used, row, row[0])", "jnp.where(used, row, 0)"),
        ("row // particles, row % particles", "row // envs, row % particles"),
        ("parent = trace.ancestors[:, 0]", "parent = particle"),
        ("(inputs, moves.is_first[step])", "(inputs, ~moves.is_first[step])"),
        ("moves.h[env, parent][:, None]", "moves.h[env, particle][:, None]"),
        ("jnp.where(used[:, None], h_grad[env, particle], 0.0)", "h_grad[env, particle]"),
        ("return begin + room, Back", "return begin + room + 1, Back"),
        ("jnp.add, back.weights, of_weights", "jnp.subtract, back.weights, of_weights"),
        (".add(of_h[:, 0])", ".set(of_h[:, 0])"),
        ("all.at[env].add(x)", "all.at[env].set(x)"),
        ("Back(weights_grad, *", "Back(jax.tree.map(jnp.zeros_like, weights_grad), *"),
        ("carry[0] < last, one_pass", "carry[0] + room < last, one_pass"),
        # Step by step through a segment.
        ("jnp.concatenate([segment.carry[None], steps.h[:-1]])", "steps.h"),
        ("jnp.where(is_first[:, None, None], 0.0, h)", "h"),
        ("moves, (place, t), inputs", "moves, (place, t - 1), inputs"),
        ("xs, reverse=True)", "xs)"),
        ("return jax.tree.map(jnp.add, grads, more)", "return jax.tree.map(jnp.subtract, grads, more)"),
        (
            "lambda *changing: way.add_context(*changing, segment), params",
            "lambda *changing: way.add_context(*changing, segment._replace(timesteps=jax.tree.map("
            "jnp.zeros_like, segment.timesteps))), params",
        ),
    ],
    WINDOW: [
        ("earlier = place - 1 - i", "earlier = i"),
        ("lambda *inputs: way.recur(*inputs, segment)[0]", "lambda *inputs: 0.5 * way.recur(*inputs, segment)[0]"),
        ("write(all, g, earlier)", "write(all, g, i)"),
        ("write(all, g, place)", "write(all, g, 0)"),
        ("fori_loop(0, place + 1, through, grads)", "fori_loop(0, place, through, grads)"),
        ("vjp(at(seen_grads, i))", "vjp(at(seen_grads, place))"),
        ("return jax.tree.map(jnp.add, grads, more)", "return jax.tree.map(jnp.subtract, grads, more)"),
        ("i >= window.first, old + new, old", "i >= window.first, old - new, old"),
        ("(seen, segment.timesteps)", "(seen, jax.tree.map(jnp.zeros_like, segment.timesteps))"),
        ("carry = agent.restart_carry(carry, is_first)", "pass"),
        ("fori_loop(0, place, through_earlier", "fori_loop(1, place, through_earlier"),
        ("(all, new, place, 0)", "(all, new, 0, 0)"),
        # Skipped updates.
        ("reached = earlier >= window.first", "reached = earlier > window.first"),
        ("reached = earlier >= window.first", "reached = True"),
        ("i >= window.first, old + new, old", "True, old + new, old"),
        ("jnp.where(place == 0, 0, self.first)", "self.first"),
        ("jnp.where(where, place + 1, self.first)", "jnp.where(where, place, self.first)"),
    ],
    A2C: [
        # Returns.
        ("reward + gamma * jnp.where(done, end_value, following)", "reward + jnp.where(done, end_value, following)"),
        ("jnp.where(done, end_value, following)", "following"),
        ("jnp.where(done, end_value, following)", "jnp.where(done, following, end_value)"),
        ("bootstrap, xs, reverse=True)", "bootstrap, xs)"),
        ("config.loss.reward_scale * rollout", "rollout"),
        ("return jax.lax.stop_gradient(returns)", "return returns"),
        # Losses.
        ("jnp.sum(jnp.where(mask, x, 0.0))", "jnp.sum(x)"),
        ("jnp.maximum(jnp.sum(mask), 1)", "x.size"),
        ("jnp.maximum(jnp.sum(mask), 1)", "jnp.sum(mask)"),
        ("advantage = returns - value", "advantage = value - returns"),
        ('"action": -masked_mean', '"action": masked_mean'),
        ("jax.lax.stop_gradient(advantage) * log_prob", "advantage * log_prob"),
        ("masked_mean(jnp.square(advantage), mask)", "masked_mean(jnp.abs(advantage), mask)"),
        ("total - coefs.entropy_coef", "total + coefs.entropy_coef"),
        ('getattr(coefs, f"{name}_coef") * losses[name]', "losses[name]"),
        # Optimiser.
        ("eps_in_sqrt=False", "eps_in_sqrt=True"),
        ("decay=config.alpha", "decay=0.9"),
        ("optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)", "rule"),
        # Skipped updates.
        ('all_finite((outcome.losses["total"], optax.tree.norm(grads), learned))', "jnp.asarray(True)"),
        (
            'all_finite((outcome.losses["total"], optax.tree.norm(grads), learned))',
            'all_finite(outcome.losses["total"])',
        ),
        ("good, (learned, 0), (known,", "good, (known, 0), (learned,"),
        ("window=window.cut(place, ~good)", "window=window"),
        ("recover(bind(learner.graphdef, params, batch_stats), rollout.actor, ~good)", "rollout.actor"),
        ("broken = skipped & ~jax.vmap(all_finite)(memory)", "broken = skipped & actor.is_first"),
        ("broken = skipped & ~jax.vmap(all_finite)(memory)", "broken = skipped | actor.is_first"),
        ("skipped=state.skipped + ~good", "skipped=state.skipped + good"),
        ("(learned, 0)", "(learned, state.skipped_in_row)"),
        # Counters.
        ("jax.random.fold_in(state.key, state.update)", "state.key"),
        ("update=state.update + 1", "update=state.update + 2"),
        # What an update learns from, and what is logged of it.
        (
            "learn(state.params, state.batch_stats, rollout, window, place)",
            "learn(state.params, state.batch_stats, rollout, window, 0 * place)",
        ),
        ("= optax.tree.norm(grads)", "= optax.tree.norm(grads, squared=True)"),
        ("outcome.rollout.env.observed.astype", "(~outcome.rollout.env.observed).astype"),
    ],
    ACTING: [
        (
            "belief = timestep_of(agent, actor), agent.restart(actor.belief, actor.is_first)",
            "belief = timestep_of(agent, actor), actor.belief",
        ),
        ("jnp.where(actor.is_first[:, None], first_action, actor.prev_action)", "actor.prev_action"),
        ("jnp.where(actor.is_first, 0.0, actor.env.reward)", "actor.env.reward"),
        ("is_first = outcome.done | ~outcome.valid", "is_first = outcome.done"),
        ("agent.action_vector(action), is_first)", "agent.initial_action(is_first.shape[0]), is_first)"),
        ("Timestep(actor.env.obs, ", "Timestep(0 * actor.env.obs, "),
        ("Segment((), timestep, ", "Segment((), timestep._replace(is_first=is_first), "),
        ("lambda x: x[-1], draws.noise", "lambda x: x[0], draws.noise"),
        ("draws._replace(noise=cut(-1))", "draws._replace(noise=cut(1, None))"),
        ("(after, nnx.state(agent, nnx.BatchStat))", "(after, batch_stats)"),
        ("outcome._replace(obs=outcome.final_obs)", "outcome"),
        ("jnp.where(outcome.truncated, value, 0.0)", "value"),
    ],
    NETWORKS: [
        # Batch normalisation.
        ("if self.use_running_average:", "if False:"),
        ("var * (count / max(count - 1, 1))", "var"),
        ("self._move_averages(mean, var", "self._move_averages(0 * mean, var"),
        ("if not notes.is_replay():", "if True:"),
        (
            "normalise(x, scale, bias, mean, var, old_scale, old_bias, notes",
            "normalise(x, scale, bias, mean, var, scale, bias, notes",
        ),
        ("BATCH_NORM_MOMENTUM = 0.1", "BATCH_NORM_MOMENTUM = 0.9"),
        ("by_centred * centred - by_one", "by_one"),
        # GRU.
        ("return n + z * (h - n)", "return h + z * (n - h)"),
    ],
    BASE: [
        ("norm.use_running_average = value", "pass"),
        ("jax.lax.stop_gradient(belief) if self.detach_encoder else belief", "belief"),
        ("RELU_GAIN * (1.0 if action.discrete else GAUSSIAN_HEAD_GAIN)", "RELU_GAIN"),
        ("expected[dt - 1] for dt", "expected[dt - 2] for dt"),
    ],
    CHOICES: [
        ("lambda: yes, lambda: no", "lambda: no, lambda: yes"),
        ("jnp.where(condition, yes, no)", "jnp.where(condition, no, yes)"),
    ],
    LOOP: [
        ("config.max_skipped_updates - skipped)", "10**6)"),
        (">= config.max_skipped_updates", ">= 10**6"),
    ],
    PARTICLES: [
        (
            "u = self.resampling.draw(u_key, steps, num_envs, self.num_particles)",
            "u = jnp.full((steps, num_envs), 0.5)",
        ),
        ("jax.random.normal(eps_key", "jax.random.uniform(eps_key"),
        ("u_key, eps_key = jax.random.split(key)", "u_key = eps_key = key"),
    ],
    DVRL: [
        ("log_probs.proposal - log_probs.prior)", "log_probs.prior - log_probs.proposal)"),
        ("-log_probs.emission)\n", "log_probs.emission)\n"),
        ("-jax.nn.logsumexp(-loss, -1)", "jax.nn.logsumexp(loss, -1)"),
        ("ddof=1", "ddof=0"),
        ("self.by_particle(emission), mask)", "self.by_particle(emission), None)"),
        ("0 in times", "1 in times"),
    ],
    RNN: [
        ("self.emission_of(step.h_prev, inputs)", "self.emission_of(step.h, inputs)"),
        ("loss = self.obs_loss_coef * self", "loss = self"),
        ("jnp.mean(jnp.square(emission[0] - target), axis=-1)", "jnp.sum(jnp.square(emission[0] - target), axis=-1)"),
        ("self.emission_of(start.carry, inputs)", "self.emission_of(start.belief.h, inputs)"),
    ],
    PLAYING: [
        ("policy.mode() if greedy else policy.sample", "policy.mode() if not greedy else policy.sample"),
        ("after.done | ~after.valid)", "after.done)"),
        ("reward=after.true_reward", "reward=after.reward"),
        ("is_first=turn.is_first", "is_first=turn.after.done"),
    ],
    GAMES: [
        ("return state.true_reward", "return state.reward"),
        ("state.game_over & state.valid", "state.done & state.valid"),
        ("counts = is_valid & ~over", "counts = ~over"),
        ("over |= end", "over = end"),
        ("np.std(self.returns, ddof=1) / np.sqrt(count)", "np.std(self.returns) / np.sqrt(count)"),
        ('"median": float(np.median', '"median": float(np.mean'),
        (
            "agent = nnx.merge(graphdef, *weights)\n    agent.use_running_average = True",
            "agent = nnx.merge(graphdef, *weights)",
        ),
    ],
}


def mutants() -> list[Mutant]:
    return [Mutant(file, *pair) for file, pairs in PAIRS.items() for pair in pairs]


def is_killed(mutant: Mutant, number: int, root: Path) -> bool:
    """Whether a test fails in a copy of the project that has the mutant; runs in a process of its own.

    A mutant whose old and new text are the same shows whether the tests pass without any.
    """
    copy = root / str(number)
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", "saved_runs", "plots", ".venv", "*_cache", "__pycache__")
    )
    path = copy / mutant.file
    path.write_text(path.read_text().replace(mutant.old, mutant.new, 1))
    pid = os.fork()
    if pid == 0:
        output = os.open(root / f"{number}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["TMPDIR"], tempfile.tempdir = str(copy), str(copy)
        os.chdir(copy)
        for module in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[module]  # The original's; the copy has its own.
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        import pytest

        code = 99
        try:
            code = int(pytest.main(["-n0", "-x", "-q", "-p", "no:cacheprovider", *TESTS[mutant.file]]))
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    shutil.rmtree(copy)
    if code not in (0, 1, 2):  # Passed; a test failed; a test could not even be imported.
        raise RuntimeError(f"the tests did not run: exit code {code}\n{(root / f'{number}.out').read_text()[-2000:]}")
    return code != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutants of files whose path contains this")
    parser.add_argument("--first", type=int, default=1, help="number of the mutant to begin with")
    arguments = parser.parse_args()
    survivors, killed, explained = [], 0, 0
    with tempfile.TemporaryDirectory(prefix="dvrl_jax_mutants_") as name:
        root = Path(name)
        # Shared by all: most programs are those of other mutants too. Libraries are imported once and then forked.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for library in ("distrax", "flax.nnx", "hypothesis", "ml_collections", "optax", "orbax.checkpoint"):
            __import__(library)
        for library in ("envpool", "pytest", "scipy.stats", "matplotlib"):
            __import__(library)
        for file in TESTS:
            if arguments.only in file and is_killed(Mutant(file, "", ""), 0, root):
                sys.exit(f"{file}: its tests fail as it is:\n{(root / '0.out').read_text()[-2000:]}")
        for number, mutant in enumerate(mutants(), 1):
            if arguments.only not in mutant.file or number < arguments.first:
                continue
            if mutant.old not in (ROOT / mutant.file).read_text():
                print(f"{number:3} {mutant.file}: there is no {mutant.old!r} any more")
                survivors.append(number)
                continue
            began = time.monotonic()
            dead = is_killed(mutant, number, root)
            killed += dead
            explained += not dead and bool(mutant.explanation)
            if not dead and not mutant.explanation:
                survivors.append(number)
            verdict = "killed" if dead else f"SURVIVED ({mutant.explanation or 'unexplained'})"
            seconds = time.monotonic() - began
            print(f"{number:3} {mutant.old!r} -> {mutant.new!r}: {verdict} [{seconds:.0f} s]", flush=True)
    print(f"\n{killed} killed, {explained} survived and explained, unexplained: {survivors or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
