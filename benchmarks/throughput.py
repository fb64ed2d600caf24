"""Speed of training, alone or beside PyTorch.

    python -m benchmarks.throughput --config=configs/pong_dvrl.py [--compare=torch] [--repeats=3] [--train_first=500]

Every measurement is a process of its own, one at a time; with `--compare=torch` ours and the peer's
(`benchmarks/torch_dvrl.py`) take turns. Ours is the compiled call that `train.py` makes: as many updates at a time, up
to a third of the time given. A process warms up for one window of updates, ours after the `train_first` ones, then
times whole windows, so that short and long windows are all in.
Prints a table and, as the last line, JSON with the medians and their ratio.
"""

import contextlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, process
from dvrl_jax.runs import config as config_lib

FLAGS = flags.FLAGS

JOB = "DVRL_JAX_BENCHMARK"  # The environment variable that tells a process what to measure.


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, or since `forget_peak_memory`."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def forget_peak_memory() -> None:
    """Gives back what the compiler has freed, and measures from now on, where Linux allows it."""
    process.return_free_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def timed_windows(run_window: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds that each call of `run_window` takes, for at least three calls and `seconds` in all."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        run_window()
        times.append(time.perf_counter() - began)
    return times


def report(config, times: list[float], **more: Any) -> dict[str, Any]:
    """What a worker found, from the seconds that windows of updates took; an update is one of each seed."""
    ms = 1e3 * statistics.median(times) / config.bptt_segments
    steps = config.num_seeds * config.num_envs * config.num_steps
    return {"ms": ms, "steps_per_second": steps / ms * 1e3, **more}


class Program(NamedTuple):
    """Training ready to run: `run` takes a state and a number of updates; `setup` and `compile` are seconds."""

    env: Any
    learner: Any
    state: Any
    run: Callable[[Any, Any], Any]
    setup: float
    compile: float


def make_program(config) -> Program:
    """Compiles the call that `train.py` makes, and settles the process as that does."""
    import jax

    from dvrl_jax import envs, seeds
    from dvrl_jax.learner import make_learner
    from dvrl_jax.runs import compilation, loop

    began = time.perf_counter()
    every = range(config.seed, config.seed + config.num_seeds)
    env = envs.make_env(config.env, config.num_envs, every)
    learner = make_learner(config, env)
    states = [learner.init(jax.random.PRNGKey(seed), env.of_seed(place)) for place, seed in enumerate(every)]
    state = states[0] if len(states) == 1 else seeds.stack(states)
    setup = time.perf_counter() - began
    began = time.perf_counter()
    run = learner.run if len(states) == 1 else seeds.run(learner, len(states))
    # What a GPU's fastest kernels are is found out anew, and kept for nobody: other benchmarks may disturb it.
    program = compilation.jit(run, config, use_cache=False)
    run = program.lower(state, loop.counts(state, 1, range(len(states)))).compile()
    compile_time = time.perf_counter() - began
    process.settle(config)
    return Program(env, learner, state, run, setup, compile_time)


class Ours:
    """Our training, compiled and warmed up after the `train_first` updates, ready to be timed as often as one likes."""

    def __init__(self, config, train_first: int = 0):
        self.config = config
        self.program = make_program(config)
        forget_peak_memory()
        self.state = self.program.state
        self.run_windows(train_first // config.bptt_segments)
        self.window_seconds = self.time_window()

    def time_window(self) -> float:
        began = time.perf_counter()
        self.run_windows(1)
        return time.perf_counter() - began

    def run_windows(self, count: int) -> None:
        import jax

        from dvrl_jax.runs import loop

        updates = loop.counts(self.state, count * self.config.bptt_segments, range(self.config.num_seeds))
        self.state = jax.block_until_ready(self.program.run(self.state, updates))

    def measure(self, seconds: float, parts: bool = False) -> dict[str, Any]:
        """Speed of the compiled training call; with `parts`, also of its pieces compiled alone."""
        import jax

        from dvrl_jax import seeds

        if self.window_seconds < 1.0:  # The first one may have taken much longer than others of such a small model.
            self.window_seconds = self.time_window()
        most = self.config.log.interval // self.config.bptt_segments
        count = max(1, min(int(seconds / 3 / self.window_seconds), most))
        times = [call / count for call in timed_windows(lambda: self.run_windows(count), seconds)]
        result = report(self.config, times, compile=self.program.compile, setup=self.program.setup)
        result["device"] = jax.devices()[0].device_kind
        stats = jax.devices()[0].memory_stats()
        result["memory_mb"] = stats["peak_bytes_in_use"] / 2**20 if stats else peak_memory_mb()
        if parts:
            one = seeds.member(self.state, 0)
            result["parts"] = measure_parts(self.config, self.program.env, self.program.learner, one, result["ms"])
        return result


def measure_parts(config, env, learner, state, total_ms: float) -> dict[str, float]:
    """Milliseconds per update of environment, acting, learning from the newest segment and optimiser, each alone.

    What remains of the whole is the earlier segments of the window, with whatever the whole does not share with its
    parts. A piece compiled alone may be a little cheaper than in its place: results that nobody reads are not made.
    """
    import jax
    import jax.numpy as jnp

    from dvrl_jax import a2c
    from dvrl_jax.runs import compilation

    optimizer = a2c.make_optimizer(config.optimizer)

    def environment(state, i):
        action = learner_action(state)
        step = lambda env_state, _: (env.step(env_state, action)._replace(final_obs=()), None)
        return state._replace(
            actor=state.actor._replace(env=jax.lax.scan(step, state.actor.env, None, config.num_steps)[0])
        )

    def learner_action(state):
        shape = (env.num_envs,) if env.action.discrete else (env.num_envs, env.action.size)
        return jnp.zeros(shape, jnp.int32 if env.action.discrete else jnp.float32)

    def acting(state, i):
        draws = learner.draw(jax.random.fold_in(state.key, i))
        rollout = learner.roll_out(state.params, state.batch_stats, state.actor, draws)
        return state._replace(actor=rollout.actor, batch_stats=rollout.batch_stats)

    def newest(state, i):
        draws = learner.draw(jax.random.fold_in(state.key, i))
        place = jnp.int32(0)
        grads, outcome = learner.gradient(state.params, state.batch_stats, state.actor, state.window, place, draws)
        tiny = jax.tree.map(lambda p, g: p + 1e-12 * g, state.params, grads)
        return state._replace(actor=outcome.rollout.actor, params=tiny)

    def optimiser(state, i):
        updates, opt_state = optimizer.update(state.params, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + 1e-12 * u, state.params, updates)
        return state._replace(params=params, opt_state=opt_state)

    def milliseconds(piece) -> float:
        nonlocal state

        def loop(state, n):
            return jax.lax.fori_loop(0, n, lambda i, state: piece(state, i), state)

        program = compilation.jit(loop, config).lower(state, jnp.int32(1)).compile()

        def once():
            nonlocal state
            state = jax.block_until_ready(program(state, jnp.int32(5)))

        once()
        return 1e3 * statistics.median(timed_windows(once, 2.0)) / 5

    times = {piece.__name__: milliseconds(piece) for piece in (environment, acting, newest, optimiser)}
    parts = {
        "environment": times["environment"],
        "acting, without environment": times["acting"] - times["environment"],
        "learning, newest segment": times["newest"] - times["acting"],
        "optimiser": times["optimiser"],
    }
    parts["learning, earlier segments"] = total_ms - sum(parts.values())
    return parts


def check_peer(config) -> None:
    """Makes sure that the PyTorch peer computes what `config` asks for.

    Raises:
        ConfigError: a field asks for something that the peer has not.
    """
    m, is_vector = config.model, not config_lib.sees_images(config)
    # By field: its value, and the only one that changes nothing in what the peer computes.
    wanted = {"model.detach_encoder": (m.detach_encoder, False), "model.obs_loss_coef": (m.obs_loss_coef, 0.0)}
    wanted |= {"model.batch_norm": (m.batch_norm and is_vector, False)}
    wanted |= {"model.policy_batch_norm": (m.policy_batch_norm, m.batch_norm)}
    wanted |= {"optimizer.name": (config.optimizer.name, "rmsprop"), "loss.action_coef": (config.loss.action_coef, 1.0)}
    wanted["loss.lambda_discrepancy_coef"] = (config.loss.lambda_discrepancy_coef, 0.0)
    if config.algorithm == "dvrl":
        wanted["model.resample"] = (m.resample, True)
        wanted |= {"model.resampling": (m.resampling, "systematic"), "model.resample_below": (m.resample_below, 1.0)}
        wanted["model.summary"] = (m.summary, "gru")
    elif config.algorithm != "rnn":
        raise ConfigError(f"algorithm = {config.algorithm!r}: the PyTorch peer has 'dvrl' and 'rnn' only")
    for field, (value, only) in wanted.items():
        if value != only:
            raise ConfigError(f"{field} = {value!r}: the PyTorch peer has {only!r} only")


class Torch:
    """The PyTorch peer, warmed up, on a GPU or on as many threads as there are cores.

    Raises:
        RuntimeError: PyTorch has no GPU.
    """

    def __init__(self, config, on_gpu: bool):
        import torch

        from benchmarks.torch_dvrl import make_trainer

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        if on_gpu:
            torch.backends.cudnn.benchmark = True
            in_full = os.environ.get("JAX_DEFAULT_MATMUL_PRECISION") in ("float32", "highest")
            torch.set_float32_matmul_precision("highest" if in_full else "high")  # As JAX does.
            torch.backends.cudnn.allow_tf32 = not in_full
        self.config, self.on_gpu = config, on_gpu
        self.trainer = make_trainer(config, "cuda" if on_gpu else "cpu")
        self.run_window()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def run_window(self) -> None:
        for _ in range(self.config.bptt_segments):
            self.trainer.update()

    def measure(self, seconds: float) -> dict[str, Any]:
        """Speed of its training step."""
        import torch

        times = timed_windows(self.run_window, seconds)
        memory_mb = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu else peak_memory_mb()
        on = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        return report(self.config, times, memory_mb=memory_mb, device=f"{on}, torch {torch.__version__}")


def with_job(config, kind: str, made: dict[str, Any], **more: Any) -> dict[str, str]:
    """The environment of a process that is to measure "ours" or "torch": the job goes there as JSON (see `ready`).

    Of the configuration only what differs from the defaults, since another checkout may not know every field.
    """
    defaults = config_lib.flatten(config_lib.default_config())
    fields = {name: x for name, x in config_lib.flatten(config).items() if name not in defaults or defaults[name] != x}
    job = {"fields": fields, "kind": kind, "made": made} | more
    return os.environ | {JOB: json.dumps(job)}


def ready(job: dict[str, Any]) -> Ours | Torch:
    """What measures a job's kind in this process, warmed up; `made` are its settings: `train_first` or `on_gpu`."""
    if job["kind"] != "torch":
        process.prepare(job["fields"])  # As `train.py` does.
    config = config_lib.from_fields(job["fields"])
    if job["kind"] == "torch":
        return Torch(config, **job["made"])
    return Ours(config, **job["made"])


def run_worker(config, kind: str, made: dict[str, Any], timed: dict[str, Any]) -> dict[str, Any]:
    """Measures in a process of its own.

    Args:
        made: settings for `ready`. timed: settings for `measure`.
    Raises:
        RuntimeError: the process failed; its messages come first.
    """
    command = [sys.executable, "-m", "benchmarks.throughput"]
    environment = with_job(config, kind, made, timed=timed)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stderr}\nmeasuring {kind} failed")
    return json.loads(done.stdout.splitlines()[-1])


def work(job: dict[str, Any]) -> None:
    print(json.dumps(ready(job).measure(**job["timed"])))


def machine() -> str:
    """The machine in words."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'':8} {'steps/s':>10} {'ms/update':>10} {'(each repeat)':24} {'memory MB':>10} {'compile s':>10}")
    for kind, found in results.items():
        median = lambda name, found=found: statistics.median(result[name] for result in found)
        each = " ".join(f"{result['ms']:.1f}" for result in found)
        compiled = f"{median('compile'):10.1f}" if "compile" in found[0] else ""
        print(
            f"{kind:8} {median('steps_per_second'):10,.0f} {median('ms'):10.2f} {each:24} "
            f"{median('memory_mb'):10,.0f} {compiled}"
        )
    for name, ms in results["ours"][0].get("parts", {}).items():
        print(f"  {name:32} {ms:10.2f} ms")


def main() -> int:
    config = command_line.required_config()
    if FLAGS.compare:
        check_peer(config)
    kinds = ["ours"] + ([FLAGS.compare] if FLAGS.compare else [])
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for repeat in range(FLAGS.repeats):
        timed = {"seconds": FLAGS.seconds}
        parts = {"parts": repeat == 0 and FLAGS.parts}
        results["ours"].append(run_worker(config, "ours", {"train_first": FLAGS.train_first}, timed | parts))
        if FLAGS.compare:
            on_gpu = {"on_gpu": results["ours"][0]["device"] != "cpu"}
            results[FLAGS.compare].append(run_worker(config, FLAGS.compare, on_gpu, timed))
    print(f"{config.algorithm} on {config.env.name}, {machine()}")
    for kind in kinds:
        print(f"{kind}: on {results[kind][0]['device']}")
    print_table(results)
    speed = {kind: statistics.median(r["steps_per_second"] for r in found) for kind, found in results.items()}
    last = {"ours": speed["ours"]}
    if FLAGS.compare:
        last |= {"torch": speed["torch"], "ratio": speed["ours"] / speed["torch"]}
    print(json.dumps(last))
    return 0


if __name__ == "__main__":
    if JOB in os.environ:
        work(json.loads(os.environ[JOB]))
    else:
        command_line.define_config()
        flags.DEFINE_enum("compare", None, ["torch"], "Measure the PyTorch peer besides.")
        flags.DEFINE_integer("repeats", 3, "How many times each is measured.", lower_bound=1)
        flags.DEFINE_float("seconds", 10.0, "Each measurement takes at least this long, after warm-up.")
        flags.DEFINE_integer(
            "train_first", 0, "Updates of ours before timing: its speed may depend on what is learned.", lower_bound=0
        )
        flags.DEFINE_boolean("parts", True, "Also measure the pieces of an update, once.")
        command_line.run(main)
