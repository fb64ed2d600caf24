"""The paper's experiments as data: which configurations to train, how they are compared, and how long they take.

Which values an ablation or a search takes is decided here. Numbers of the paper are not repeated.
"""

import fnmatch
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dvrl_jax import config as config_lib
from dvrl_jax import envs, markdown, runs

GAMES = (
    "Pong",
    "ChopperCommand",
    "MsPacman",
    "Centipede",
    "BeamRider",
    "Frostbite",
    "Bowling",
    "IceHockey",
    "DoubleDunk",
    "Asteroids",
)
NOISE = (0.0, 0.15, 0.3)  # Standard deviations of Mountain Hike's readings.
ABLATION_GAME = "ChopperCommand"
PARTICLES = (1, 3, 5)  # Besides the configuration's own 15.
WINDOWS = (1, 2, 5)  # Segments, besides the configuration's own 10.
# On Mountain Hike at noise 0.3, besides the configuration's own 10 particles, 5 segments, 3e-4 and 0.1.
HIKE_PARTICLES = (1, 5, 30)
HIKE_WINDOWS = (1, 10)
HIKE_LEARNING_RATES = {"1e-4": 1e-4, "1e-3": 1e-3}
HIKE_ENCODING_COEFS = (0.01, 1.0)
# Besides 0.1, which has a configuration of its own: by scale, the entropy bonus that belongs to it.
HIKE_REWARD_SCALES = {0.03: 3e-4}


class Experiment(NamedTuple):
    """One setting to train with several seeds: a configuration file, and fields to change by dotted name."""

    name: str
    config: str
    fields: Mapping[str, Any] = {}

    def arguments(self) -> list[str]:
        """What follows `python train.py`, without seed, steps and directory."""
        changes = [f"--config.{field}={value}" for field, value in self.fields.items()]
        return [f"--config=configs/{self.config}", *changes]


def _experiments() -> dict[str, Experiment]:
    found = []
    for game in GAMES:
        for agent in ("dvrl", "rnn"):
            found.append(Experiment(f"atari/{game}/{agent}", f"atari_{agent}.py:{game}"))
    for noise in NOISE:
        for agent in ("dvrl", "rnn"):
            fields = {"env.observation_std": noise}
            found.append(Experiment(f"hike/{noise}/{agent}", f"mountain_hike_{agent}.py", fields))
            found.append(Experiment(f"hike-scaled/{noise}/{agent}", f"mountain_hike_scaled_{agent}.py", fields))
    dvrl, rnn = f"atari_dvrl.py:{ABLATION_GAME}", f"atari_rnn.py:{ABLATION_GAME}"
    for count in PARTICLES:
        found.append(Experiment(f"ablation/particles/{count}", dvrl, {"model.num_particles": count}))
    for length in WINDOWS:
        found.append(Experiment(f"ablation/window/dvrl-{length}", dvrl, {"bptt_segments": length}))
        found.append(Experiment(f"ablation/window/rnn-{length}", rnn, {"bptt_segments": length}))
    found.append(Experiment("ablation/joint/detached", dvrl, {"model.detach_encoder": True}))
    found.append(Experiment("ablation/actions/rnn-without", rnn, {"model.action_encoding": 0}))
    found += _hike_experiments()
    return {experiment.name: experiment for experiment in found}


def _hike_experiments() -> list[Experiment]:
    """What varies one field (the scale of rewards: two) of the two agents on Mountain Hike at noise 0.3."""
    found = []

    def add(name: str, agent: str, *changes: tuple[str, Any]) -> None:
        fields = {"env.observation_std": NOISE[-1]} | dict(changes)
        found.append(Experiment(name, f"mountain_hike_{agent}.py", fields))

    for count in HIKE_PARTICLES:
        add(f"hike-ablation/particles/{count}", "dvrl", ("model.num_particles", count))
    for length in HIKE_WINDOWS:
        for agent in ("dvrl", "rnn"):
            add(f"hike-ablation/window/{agent}-{length}", agent, ("bptt_segments", length))
    add("hike-ablation/joint/detached", "dvrl", ("model.detach_encoder", True))
    add("hike-ablation/resampling/off", "dvrl", ("model.resample", False))
    for name, rate in HIKE_LEARNING_RATES.items():
        for agent in ("dvrl", "rnn"):
            add(f"hike-search/{agent}/lr-{name}", agent, ("optimizer.learning_rate", rate))
    for coef in HIKE_ENCODING_COEFS:
        add(f"hike-search/dvrl/elbo-{coef:g}", "dvrl", ("loss.encoding_coef", coef))
    for scale, entropy in HIKE_REWARD_SCALES.items():
        for agent in ("dvrl", "rnn"):
            changes = (("loss.reward_scale", scale), ("loss.entropy_coef", entropy))
            add(f"hike-search/{agent}/reward-{scale:g}", agent, *changes)
    return found


EXPERIMENTS = _experiments()


def _comparisons() -> dict[str, tuple[str, ...]]:
    base_dvrl, base_rnn = f"atari/{ABLATION_GAME}/dvrl", f"atari/{ABLATION_GAME}/rnn"
    found = {f"atari/{game}": (f"atari/{game}/dvrl", f"atari/{game}/rnn") for game in GAMES}
    for task in (f"{kind}/{noise}" for kind in ("hike", "hike-scaled") for noise in NOISE):
        found[task] = (f"{task}/dvrl", f"{task}/rnn")
    found["ablation/particles"] = (*(f"ablation/particles/{count}" for count in PARTICLES), base_dvrl)
    for agent, base in (("dvrl", base_dvrl), ("rnn", base_rnn)):
        found[f"ablation/window/{agent}"] = (*(f"ablation/window/{agent}-{length}" for length in WINDOWS), base)
    found["ablation/joint"] = ("ablation/joint/detached", base_dvrl)
    found["ablation/actions"] = ("ablation/actions/rnn-without", base_rnn)
    dvrl, rnn = (f"hike/{NOISE[-1]}/{agent}" for agent in ("dvrl", "rnn"))
    found["hike-ablation/particles"] = (*(f"hike-ablation/particles/{count}" for count in HIKE_PARTICLES), dvrl)
    for agent, base in (("dvrl", dvrl), ("rnn", rnn)):
        lengths = (f"hike-ablation/window/{agent}-{length}" for length in HIKE_WINDOWS)
        found[f"hike-ablation/window/{agent}"] = (*lengths, base)
        rates = (f"hike-search/{agent}/lr-{name}" for name in HIKE_LEARNING_RATES)
        found[f"hike-search/{agent}/learning-rate"] = (*rates, base)
        scales = (f"hike-search/{agent}/reward-{scale:g}" for scale in HIKE_REWARD_SCALES)
        found[f"hike-search/{agent}/reward-scale"] = (*scales, f"hike-scaled/{NOISE[-1]}/{agent}", base)
    found["hike-ablation/joint"] = ("hike-ablation/joint/detached", dvrl)
    found["hike-ablation/resampling"] = ("hike-ablation/resampling/off", dvrl)
    found["hike-search/dvrl/elbo"] = (*(f"hike-search/dvrl/elbo-{coef:g}" for coef in HIKE_ENCODING_COEFS), dvrl)
    return found


# What is drawn into one figure and compared in one table, by name.
COMPARISONS = _comparisons()


def select(patterns: Iterable[str]) -> list[Experiment]:
    """Experiments whose name, or the beginning of it up to a slash, matches one of the patterns; all without any.

    Raises:
        RunError: a pattern matches nothing.
    """
    patterns = list(patterns)
    chosen = set()
    for pattern in patterns:
        names = [name for name in EXPERIMENTS if any(fnmatch.fnmatchcase(part, pattern) for part in _prefixes(name))]
        names += [name for part in COMPARISONS if fnmatch.fnmatchcase(part, pattern) for name in COMPARISONS[part]]
        if not names:
            known = sorted({name.split("/")[0] for name in EXPERIMENTS})
            raise runs.RunError(f"--only: nothing is called {pattern!r}; --list shows all ({', '.join(known)})")
        chosen |= set(names)
    return [experiment for name, experiment in EXPERIMENTS.items() if name in chosen or not patterns]


def _prefixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def load_config(experiment: Experiment):
    """The experiment's configuration."""
    from dvrl_jax.api import make_config

    file, _, argument = experiment.config.partition(":")
    fields = {field.replace(".", "__"): value for field, value in experiment.fields.items()}
    return make_config(file.removesuffix(".py"), *([argument] if argument else []), **fields)


# --- How far a run is, and what came out -----------------------------------------------------------------------------


def workdir(root: Path, experiment: Experiment, seed: int) -> Path:
    """Where a run is: root/<experiment>/seed<n>."""
    return root / experiment.name / f"seed{seed}"


def last_line(path: Path) -> dict[str, Any] | None:
    """The newest line of a run's metrics; None if there is none."""
    if not (path / "metrics.jsonl").exists():
        return None
    lines = runs.read_metrics(path)
    return lines[-1] if lines else None


def is_done(path: Path, steps: int) -> bool:
    """Whether a run has reached `steps` environment steps."""
    line = last_line(path)
    return line is not None and line["env_steps"] >= steps


class Result(NamedTuple):
    """Mean return over the last 100 games, averaged over `seeds` finished runs; the error is None for one run."""

    name: str
    seeds: int
    mean: float | None
    standard_error: float | None


def result_of(root: Path, experiment: Experiment, seeds: Iterable[int], steps: int | None) -> Result:
    """What the finished runs of an experiment reached."""
    limit = load_config(experiment).total_env_steps if steps is None else steps
    paths = [workdir(root, experiment, seed) for seed in seeds]
    values = [last_line(path)["result.true"] for path in paths if is_done(path, limit)]
    values = [value for value in values if value is not None]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Result(experiment.name, len(values), statistics.fmean(values) if values else None, error)


def table(results: Iterable[Result]) -> str:
    """The results as a table in Markdown."""
    number = lambda value: "-" if value is None else f"{value:.2f}"
    rows = [[r.name, str(r.seeds), number(r.mean), number(r.standard_error)] for r in results]
    return markdown.table(["experiment", "seeds", "return (mean)", "standard error"], rows)


# --- How long it takes -----------------------------------------------------------------------------------------------

# Fields that do not change what is computed, only with which numbers.
SAME_PROGRAM = ("seed", "total_env_steps", "log.", "checkpoint.", "optimizer.", "env.observation_std")
SAME_PROGRAM += ("loss.gamma", "loss.reward_scale", "loss.entropy_coef")


def program_of(fields: Mapping[str, Any]) -> str:
    """What a run's speed depends on, as text: its fields by dotted name, without those that do not matter.

    All Atari games count as one; emulating any of them is cheap beside learning.
    """
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if not k.startswith(SAME_PROGRAM)}
    if kept["env.name"] not in envs.named():
        kept["env.name"] = "Atari"
    return json.dumps(kept, sort_keys=True)


class Speeds:
    """Environment steps per second by program, in `root/speeds.json` and in the runs below `root`."""

    def __init__(self, root: Path):
        self.path = root / "speeds.json"
        try:
            self._measured: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError:
            message = f"{self.path}: not readable as JSON; delete it, and --measure measures again"
            raise runs.RunError(message) from None
        self._seen: dict[str, list[float]] = {}
        for metrics in sorted(root.glob("**/metrics.jsonl")):
            fields = runs.read_config(metrics.parent)
            values = [line["obs.fps"] for line in runs.read_metrics(metrics.parent)[1:] if line.get("obs.fps")]
            if fields and values:
                self._seen.setdefault(program_of(fields), []).append(statistics.median(values))

    def get(self, experiment: Experiment) -> tuple[float | None, str]:
        """(steps per second, where the number is from)."""
        program = program_of(config_lib.flatten(load_config(experiment)))
        if program in self._seen:
            return statistics.median(self._seen[program]), "runs"
        if program in self._measured:
            return self._measured[program], "measured"
        return None, "unknown"

    def add(self, experiment: Experiment, steps_per_second: float) -> None:
        """Stores a measurement."""
        self._measured[program_of(config_lib.flatten(load_config(experiment)))] = steps_per_second
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self._measured, indent=1) + "\n")
