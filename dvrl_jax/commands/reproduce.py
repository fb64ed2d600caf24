"""Runs the paper's experiments: dvrl-reproduce [--list] [--only=hike,atari/Pong] [--seeds=5] [--launcher=slurm]"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from dvrl_jax.errors import RunError
from dvrl_jax.runs import command_line, experiments, launchers, outcomes, run_directory
from dvrl_jax.runs import process as process_lib
from dvrl_jax.runs.experiments import Experiment

LIST = flags.DEFINE_boolean("list", False, "Show the experiments with estimated hours, and run nothing.")
MEASURE = flags.DEFINE_boolean("measure", False, "With --list: measure speeds that are not known (minutes each).")
ONLY = flags.DEFINE_list("only", [], "Names or beginnings of names, such as hike or atari/Pong; * matches anything.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Train with seeds 0 .. this - 1.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", None, "Environment steps per run, instead of the configuration's.", lower_bound=1)
ROOT = flags.DEFINE_string("root", "saved_runs/reproduce", "Where the runs, the table and the figures go.")
LAUNCHER = flags.DEFINE_enum("launcher", None, ["local", "slurm"], "Make each experiment a job, here or of a cluster.")
SLURM = flags.DEFINE_list("slurm", [], f"Settings of SLURM as name=value: {', '.join(launchers.SETTINGS)}.")
AT_ONCE = flags.DEFINE_integer("at_once", 1, "With --launcher=local: jobs at the same time.", lower_bound=1)
REPORT = flags.DEFINE_boolean("report", True, "Write the table and the figures at the end.")

FLAGS = flags.FLAGS
MEASURED_SECONDS = 2.0  # Less would tell more about single calls than about training.


def train(arguments: list[str], *keep_open: int) -> int:
    """One run of dvrl-train in a process of its own, as `launchers.run` says; its exit code."""
    return launchers.run([sys.executable, "-m", "dvrl_jax.commands.train", *arguments], keep_open)


def leave_if_stopped(code: int, what: object) -> None:
    """Raises SystemExit if this exit code of a process says that a signal stopped it: as such, or as 128 + signal."""
    for number in process_lib.STOPPING:
        if code in (-number, 128 + number):
            print(f"{what}: stopped; the same command goes on from there", flush=True)
            sys.exit(128 + number)


def steps_of(experiment: Experiment) -> int:
    return STEPS.value or experiments.load_config(experiment).total_env_steps


def steps_so_far(root: Path, experiment: Experiment) -> list[int]:
    """Environment steps of each seed's run."""
    lines = (outcomes.last_line(outcomes.workdir(root, experiment, seed)) for seed in range(SEEDS.value))
    return [line["env_steps"] if line else 0 for line in lines]


def jobs_of(root: Path, experiment: Experiment) -> Path:
    """Where the lock and the jobs of an experiment are."""
    return root / "jobs" / experiment.name


def measure(experiment: Experiment) -> float:
    """Steps per second in the last two thirds of a short run, without compilation."""
    config = experiments.load_config(experiment)
    # Whole windows, so that each third has all lengths of backpropagation; at least 10 updates.
    interval = -(-10 // config.bptt_segments) * config.bptt_segments
    while True:
        lines = _short_run(experiment, interval, 3 * interval * config.num_envs * config.num_steps)
        steps, seconds = (lines[-1][name] - lines[0][name] for name in ("env_steps", "wall_time"))
        if seconds >= MEASURED_SECONDS:
            return steps / seconds
        interval *= 10


def _short_run(experiment: Experiment, interval: int, steps: int) -> list[dict[str, Any]]:
    """The metrics of a run that leaves nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"--config.total_env_steps={steps}", f"--config.log.interval={interval}"]
        settings += ["--config.checkpoint.interval=0", "--config.checkpoint.minutes=0"]
        settings += ["--config.log.tensorboard=False", f"--workdir={folder}/run"]
        print(f"measuring {experiment.name} ({steps:,} steps)", file=sys.stderr, flush=True)
        if code := train([*experiment.arguments(), *settings]):
            leave_if_stopped(code, experiment.name)
            raise RunError(f"{experiment.name}: the measurement failed; what it said is above")
        return run_directory.read_metrics(Path(folder) / "run")


def show(chosen: list[Experiment], root: Path) -> None:
    """Prints the experiments, how far they are, and the hours that the rest would take."""
    speeds, total, unknown = outcomes.Speeds(root), 0.0, 0
    for experiment in chosen if MEASURE.value else ():  # First all of it, so that the table stays in one piece.
        if speeds.get(experiment)[0] is None:
            speeds.add(experiment, measure(experiment))
    states = launchers.states(jobs_of(root, experiment) for experiment in chosen)
    head = f"{'experiment':36} {'steps':>12} {'so far':>12} {'done':>6}  {'state':8} {'steps/s':>9} {'hours left':>11}"
    print(f"{head}  {'speed from':10}  log")
    for experiment in chosen:
        speed, source = speeds.get(experiment)
        steps, so_far = steps_of(experiment), steps_so_far(root, experiment)
        done = sum(each >= steps for each in so_far)
        hours = None if speed is None else sum(max(0, steps - each) for each in so_far) / speed / 3600
        total, unknown = total + (hours or 0.0), unknown + (speed is None)
        numbers = ("-", "-") if speed is None else (f"{speed:,.0f}", f"{hours:,.1f}")
        state = states[jobs_of(root, experiment)]
        word = "done" if done == SEEDS.value else state.word or "-"
        reached = f"{min(so_far):>12,} {done:>3}/{SEEDS.value:<2}  {word:8}"
        line = f"{experiment.name:36} {steps:>12,} {reached} {numbers[0]:>9} {numbers[1]:>11}  {source:10}  {state.log}"
        print(line.rstrip())
    print(f"\n{len(chosen) * SEEDS.value} runs, {total:,.1f} hours on this machine, one run after the other")
    if unknown:
        print(f"{unknown} of unknown speed are not in this sum; --measure measures them")


def run_all(chosen: list[Experiment], root: Path) -> list[str]:
    """Trains everything that is not done, and that no other process trains. Returns what failed.

    Raises:
        SystemExit: a run was stopped by a signal; the same command goes on from there.
        RunError: what stands in a run's place is of another experiment.
    """
    failed = []
    for experiment in chosen:
        with launchers.claim(jobs_of(root, experiment)) as lock:
            if lock is None:
                print(f"{root / experiment.name}: skipped, another process is training it", flush=True)
            else:
                failed += run_one(experiment, root, lock)
    return failed


def run_one(experiment: Experiment, root: Path, lock: int) -> list[str]:
    """Trains what is not done of an experiment, its seeds in one program, and holds the lock meanwhile.

    Where some of the seeds have begun by themselves, each one goes on by itself. Returns and raises as `run_all`.
    """
    steps, todo, failed = steps_of(experiment), [], []
    for seed in range(SEEDS.value):
        path = outcomes.workdir(root, experiment, seed)
        outcomes.check_run(path, experiment)
        if outcomes.is_done(path, steps):
            print(f"{path}: done already", flush=True)
        else:
            todo.append((path, [f"--config.seed={seed}"]))
    if outcomes.in_one_program(root, experiment, SEEDS.value) and todo:
        todo = [(root / experiment.name, ["--config.seed=0", f"--config.num_seeds={SEEDS.value}"])]
    for path, settings in todo:
        print(f"{path}: training", flush=True)
        settings = [*settings, f"--config.total_env_steps={steps}", f"--workdir={path.resolve()}"]
        if code := train([*experiment.arguments(), *settings], lock):
            leave_if_stopped(code, path)
            print(f"{path}: failed with exit code {code}", file=sys.stderr, flush=True)
            failed.append(str(path))
    return failed


def launch(chosen: list[Experiment], root: Path, launcher: str) -> tuple[list[str], bool]:
    """Makes a job of every experiment that is not done and has none. Local jobs are run to their end.

    Returns what failed, and whether nothing is left to do.

    Raises:
        SystemExit: local jobs were stopped by a signal; the same command goes on from there.
        RunError: a job cannot be made, or what stands in a run's place is of another experiment.
    """
    settings, starts, is_left = launchers.parse_settings(SLURM.value), {}, False
    states = launchers.states(jobs_of(root, experiment) for experiment in chosen)
    for experiment in chosen:
        folder, path = jobs_of(root, experiment), root / experiment.name
        for seed in range(SEEDS.value):
            outcomes.check_run(outcomes.workdir(root, experiment, seed), experiment)
        if min(steps_so_far(root, experiment)) >= steps_of(experiment):
            print(f"{path}: done already", flush=True)
        elif states[folder].word in launchers.TO_COME:
            is_left = True
            print(f"{path}: {states[folder].word} already", flush=True)
        else:
            starts[folder] = functools.partial(start_job, launcher, experiment, root, settings)
    if launcher == "slurm":
        for start in starts.values():
            start()
        return [], not (is_left or starts)
    if signum := launchers.follow(starts.values(), AT_ONCE.value):
        leave_if_stopped(128 + signum, root)
    ended = launchers.states(starts)
    return [f"{folder} ({state.log})" for folder, state in ended.items() if state.word == "failed"], True


def start_job(launcher: str, experiment: Experiment, root: Path, settings: dict[str, Any]) -> Any:
    """Submits an experiment: as this command for it alone, without a launcher. Returns submitit's job."""
    command = [sys.executable, "-u", "-m", "dvrl_jax.commands.reproduce", f"--root={root.resolve()}", "--noreport"]
    command += [f"--only={experiment.name}", f"--seeds={SEEDS.value}"]
    command += [f"--steps={STEPS.value}"] if STEPS.value else []
    job = launchers.submit(
        launcher, jobs_of(root.resolve(), experiment), experiment.name.replace("/", "-"), command, settings
    )
    print(f"{root / experiment.name}: job {job.job_id}, log in {job.paths.stdout}", flush=True)
    return job


def report(chosen: list[Experiment], root: Path) -> None:
    """Prints and writes the table of all experiments that have runs, and draws comparisons of the chosen ones."""
    from dvrl_jax.viewing import plotting

    tried = [x for x in experiments.EXPERIMENTS.values() if x in chosen or (root / x.name).exists()]
    ends = {one.name: outcomes.finished(root, one, steps_of(one)) for one in tried}
    results = [row for one in tried for row in outcomes.results_of(one, ends[one.name], steps_of(one))]
    text = outcomes.table(results)
    print(f"\nresult.true (mean over the last 100 games) at the end, over the seeds that got there:\n\n{text}")
    with run_directory.writing(root):
        root.mkdir(parents=True, exist_ok=True)
    run_directory.replace(root / "results.md", text)
    run_directory.replace(root / "results.json", json.dumps([result._asdict() for result in results], indent=1) + "\n")
    # Of each experiment the longest runs: a curve is of the steps that all its runs have.
    longest = {}
    for one in chosen:
        if found := ends[one.name]:
            fields = outcomes.fields_of(one)
            longest[one.name] = [plotting.load_run(run.path, fields) for run in found[max(found)]]
    for comparison, members in experiments.COMPARISONS.items():
        loaded = [run for name in members for run in longest.get(name, [])]
        if not loaded:
            continue
        print(plotting.save(plotting.plot(loaded, ["result.true"]), root / "figures" / comparison)[0])


def main() -> int:
    if MEASURE.value and not LIST.value:
        raise RunError("--measure: goes with --list, which shows what it measures")
    if FLAGS["only"].present and not ONLY.value:
        raise RunError("--only: names no experiment; leave it out for all of them")
    if SLURM.value and LAUNCHER.value != "slurm":
        raise RunError("--slurm: goes with --launcher=slurm")
    chosen, root = experiments.select(ONLY.value), Path(ROOT.value)
    if LIST.value:
        show(chosen, root)
        return 0
    is_over = True
    if LAUNCHER.value:
        failed, is_over = launch(chosen, root, LAUNCHER.value)
    else:
        failed = run_all(chosen, root)
    if not is_over:
        print("--list shows how far they are; once all are done, the same command writes the table and the figures")
    elif REPORT.value:
        report(chosen, root)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run() -> None:
    """Runs `main` with this process's arguments, and ends the process."""
    command_line.run(main)


if __name__ == "__main__":
    run()
