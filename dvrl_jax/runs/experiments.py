"""The paper's experiments as data: which configurations to train, how they are compared, and how long they take.

Which values an ablation or a search takes is decided here. Numbers of the paper are not repeated.
"""

import fnmatch
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dvrl_jax.errors import RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import markdown, run_directory

AGENTS = ("dvrl", "rnn")
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
ABLATION_GAME = "ChopperCommand"
PARTICLES = (1, 3, 5)  # Besides the configuration's own 15.
WINDOWS = (1, 2, 5)  # Segments, besides the configuration's own 10.
NOISE = (0.0, 0.15, 0.3)  # Standard deviations of Mountain Hike's readings.
# Mountain Hike's settings, by what experiments and configurations call them: rewards as they are; scaled by 0.1; scaled
# by 0.03 and learned from with a third of the learning rate, 1e-4.
HIKES = {"hike": "mountain_hike", "hike-scaled": "mountain_hike_scaled", "hike-small-step": "mountain_hike_small_step"}
# With small steps at noise 0.3, besides the configuration's own 10 particles, 5 segments, 1e-4 and 0.1.
HIKE_PARTICLES = (1, 5, 30)
HIKE_WINDOWS = (1, 10)
HIKE_LEARNING_RATES = {"3e-4": 3e-4, "1e-3": 1e-3}
HIKE_ENCODING_COEFS = (0.01, 1.0)
# Tasks that are not the paper's, by their experiments' names: a configuration, which the agent completes, and fields to
# change. Some need the extra `gymnax`, so that all of them are left out where none is asked for.
TASKS = {
    "task/aliased-hike": ("aliased_hike:", {}),
    "task/distractor-hike": ("distractor_hike:", {}),
    "task/memory-chain": ("gymnax:MemoryChain-bsuite,", {"env.params.memory_length": 30}),
    "task/cart-pole": (
        "gymnax:CartPole-v1,",
        {
            "env.keep_components": (0, 2),
            "loss.reward_scale": 0.1,
            "loss.entropy_coef": 0.001,
            "total_env_steps": 4_000_000,
        },
    ),
    **{f"task/rock-sample/{size}": (f"rock_sample:{size},", {}) for size in ("5x5", "7x8")},
    **{
        f"task/minatar/{game}": (f"minatar:{game},", {}) for game in ("Asterix", "Breakout", "Freeway", "SpaceInvaders")
    },
}
TASK_AGENTS = (*AGENTS, "memoryless")


class Experiment(NamedTuple):
    """One setting to train with several seeds: the name of a configuration, and fields to change by dotted name."""

    name: str
    config: str
    fields: Mapping[str, Any] = {}

    def arguments(self) -> list[str]:
        """What follows `dvrl-train`, without seed, steps and directory."""
        changes = [f"--config.{field}={value}" for field, value in self.fields.items()]
        return [f"--config={self.config}", *changes]

    def vary(self, name: str, field: str, value: Any) -> "Experiment":
        """Another experiment, which differs from this one in a single field."""
        return Experiment(name, self.config, {**self.fields, field: value})


def _atari(game: str, agent: str) -> Experiment:
    return Experiment(f"atari/{game}/{agent}", f"atari_{agent}:{game}")


def _hike(kind: str, noise: float, agent: str) -> Experiment:
    return Experiment(f"{kind}/{noise}/{agent}", f"{HIKES[kind]}_{agent}", {"env.observation_std": noise})


def _comparisons() -> dict[str, tuple[Experiment, ...]]:
    found = {f"atari/{game}": tuple(_atari(game, agent) for agent in AGENTS) for game in GAMES}
    for kind in HIKES:
        for noise in NOISE:
            found[f"{kind}/{noise}"] = tuple(_hike(kind, noise, agent) for agent in AGENTS)

    def compare(name: str, base: Experiment, field: str, values: Mapping[Any, Any], between: str = "/") -> None:
        """Compares `base` with what has other values of a field, called by the comparison's name and the value's."""
        varied = (base.vary(f"{name}{between}{key}", field, value) for key, value in values.items())
        found[name] = (*varied, base)

    same = lambda values: {f"{value:g}": value for value in values}
    for agent in AGENTS:
        compare(f"ablation/window/{agent}", _atari(ABLATION_GAME, agent), "bptt_segments", same(WINDOWS), "-")
    dvrl, rnn = (_atari(ABLATION_GAME, agent) for agent in AGENTS)
    compare("ablation/particles", dvrl, "model.num_particles", same(PARTICLES))
    compare("ablation/joint", dvrl, "model.detach_encoder", {"detached": True})
    compare("ablation/actions", rnn, "model.action_encoding", {"rnn-without": 0})

    hikes = {agent: _hike("hike-small-step", NOISE[-1], agent) for agent in AGENTS}
    for agent, base in hikes.items():
        compare(f"hike-ablation/window/{agent}", base, "bptt_segments", same(HIKE_WINDOWS), "-")
        search, field = f"hike-search/{agent}", "optimizer.learning_rate"
        rates = {name: base.vary(f"{search}/lr-{name}", field, rate) for name, rate in HIKE_LEARNING_RATES.items()}
        found[f"{search}/learning-rate"] = (*rates.values(), base)
        # At the learning rate of the other two: rewards scaled by 0.03, by 0.1, and as they are.
        others = (_hike(kind, NOISE[-1], agent) for kind in ("hike-scaled", "hike"))
        found[f"{search}/reward-scale"] = (rates["3e-4"], *others)
    compare("hike-ablation/particles", hikes["dvrl"], "model.num_particles", same(HIKE_PARTICLES))
    for kind, name in {"hike-small-step": "joint", "hike-scaled": "joint-scaled"}.items():
        for noise in NOISE:
            base = _hike(kind, noise, "dvrl")
            compare(f"hike-ablation/{name}/{noise}", base, "model.detach_encoder", {"detached": True})
    compare("hike-ablation/resampling", hikes["dvrl"], "model.resample", {"off": False})
    compare("hike-search/dvrl/elbo", hikes["dvrl"], "loss.encoding_coef", same(HIKE_ENCODING_COEFS), "-")
    for name, (config, fields) in TASKS.items():
        found[name] = tuple(Experiment(f"{name}/{agent}", config + agent, fields) for agent in TASK_AGENTS)
    return found


_COMPARED = _comparisons()

EXPERIMENTS = {experiment.name: experiment for compared in _COMPARED.values() for experiment in compared}

# What is drawn into one figure and compared in one table: names of experiments, by the comparison's own.
COMPARISONS = {name: tuple(experiment.name for experiment in compared) for name, compared in _COMPARED.items()}


def select(patterns: Iterable[str]) -> list[Experiment]:
    """Experiments whose name, or the beginning of it up to a slash, matches one of the patterns.

    Without any, all but those of `TASKS`.

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
            raise RunError(f"--only: nothing is called {pattern!r}; --list shows all ({', '.join(known)})")
        chosen |= set(names)
    default = lambda name: not patterns and not name.startswith("task/")
    return [experiment for name, experiment in EXPERIMENTS.items() if name in chosen or default(name)]


def _prefixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def load_config(experiment: Experiment):
    """The experiment's configuration."""
    from dvrl_jax.api import make_config

    name, _, argument = experiment.config.partition(":")
    fields = {field.replace(".", "__"): value for field, value in experiment.fields.items()}
    return make_config(name, *([argument] if argument else []), **fields)


# --- How far a run is, and what came out -----------------------------------------------------------------------------


def workdir(root: Path, experiment: Experiment, seed: int) -> Path:
    """Where a run is: root/<experiment>/seed<n>."""
    return root / experiment.name / f"seed{seed}"


def workdirs(root: Path, experiment: Experiment) -> list[Path]:
    """Directories of an experiment's runs, by seed."""
    found = [path for path in (root / experiment.name).glob("seed*") if path.name.removeprefix("seed").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("seed")))


def in_one_program(root: Path, experiment: Experiment, num_seeds: int) -> bool:
    """Whether an experiment's seeds are trained in one program: so they began, or none of several has begun."""
    fields = run_directory.read_config(root / experiment.name)
    if fields is not None:
        return fields.get("num_seeds") == num_seeds
    return num_seeds > 1 and not any(workdir(root, experiment, seed).exists() for seed in range(num_seeds))


def last_line(path: Path) -> dict[str, Any] | None:
    """The newest line of a run's metrics; None if there is none."""
    lines = run_directory.read_metrics(path) if run_directory.has_metrics(path) else []
    return lines[-1] if lines else None


def is_done(path: Path, steps: int) -> bool:
    """Whether a run has reached `steps` environment steps."""
    line = last_line(path)
    return line is not None and line["env_steps"] >= steps


def fields_of(experiment: Experiment) -> dict[str, Any]:
    """The configuration of an experiment's runs, as their `config.json` has it, by dotted names."""
    return config_lib.as_stored(load_config(experiment))


def _settings(experiment: Experiment) -> dict[str, Any]:
    return config_lib.settings_of(fields_of(experiment))


def _difference(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """A setting that a run's fields have otherwise; one that is younger than the run is none."""
    return next((field for field, value in settings.items() if fields.get(field, value) != value), None)


def check_run(path: Path, experiment: Experiment) -> None:
    """Makes sure that a run, if there is one, is of this experiment.

    Raises:
        RunError: it has other settings; the message names one.
    """
    fields, settings = run_directory.read_config(path) or {}, _settings(experiment)
    if field := _difference(fields, settings):
        own, expected = fields[field], settings[field]
        raise RunError(
            f"{path}: has {field} = {own!r}, where {experiment.name} has {expected!r}; move it away to go on"
        )


class Finished(NamedTuple):
    """A run that got to the end, and its return there."""

    path: Path
    value: float


def finished(root: Path, experiment: Experiment, steps: int) -> dict[int, list[Finished]]:
    """An experiment's runs by length: those as long as they were to be, and of the others those that have `steps`.

    Their returns are those of that length. Runs with other settings do not count.
    """
    settings = _settings(experiment)
    found: dict[int, list[Finished]] = {}
    for path in workdirs(root, experiment):
        fields = run_directory.read_config(path)
        lines = run_directory.read_metrics(path) if run_directory.has_metrics(path) else []
        if fields is None or not lines or _difference(fields, settings):
            continue
        whole = fields.get("total_env_steps")
        length = whole if isinstance(whole, int) and lines[-1].get("env_steps", 0) >= whole else steps
        there = [line for line in lines if line.get("env_steps", 0) >= length]
        if there and there[0].get("result.true") is not None:
            found.setdefault(length, []).append(Finished(path, there[0]["result.true"]))
    return found


class Result(NamedTuple):
    """Mean return over the last 100 games after `steps` environment steps, averaged over `seeds` runs.

    The mean is None for no run, the standard error for fewer than two.
    """

    name: str
    steps: int
    seeds: int
    mean: float | None
    standard_error: float | None


def results_of(experiment: Experiment, ends: Mapping[int, list[Finished]], steps: int) -> list[Result]:
    """What an experiment's `finished` runs reached: a row per length, or one, of `steps`, for none."""
    rows = []
    for length, found in sorted(ends.items()):
        values = [one.value for one in found]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        rows.append(Result(experiment.name, length, len(values), statistics.fmean(values), error))
    return rows or [Result(experiment.name, steps, 0, None, None)]


def table(results: Iterable[Result]) -> str:
    """The results as a table in Markdown."""
    number = lambda value: "-" if value is None else f"{value:.2f}"
    rows = [[r.name, f"{r.steps:,}", str(r.seeds), number(r.mean), number(r.standard_error)] for r in results]
    return markdown.table(["experiment", "steps", "seeds", "return (mean)", "standard error"], rows)


# --- How long it takes -----------------------------------------------------------------------------------------------

# Fields that do not change what is computed, only with which numbers.
SAME_PROGRAM = ("seed", "total_env_steps", "max_skipped_updates", "log.", "checkpoint.", "optimizer.")
SAME_PROGRAM += ("env.observation_std", "env.first_core")
SAME_PROGRAM += ("loss.gamma", "loss.reward_scale", "loss.entropy_coef")


def program_of(fields: Mapping[str, Any]) -> str:
    """What a run's speed depends on, as text: its fields by dotted name, without those that do not matter.

    All Atari games count as one; emulating any of them is cheap beside learning.
    """
    from dvrl_jax import envs

    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items() if not k.startswith(SAME_PROGRAM)}
    if kept["env.name"] not in envs.named() and not envs.is_gymnax(kept["env.name"]):
        kept["env.name"] = "Atari"
    return json.dumps(kept, sort_keys=True)


class Speeds:
    """Environment steps per second by program, in `root/speeds.json` and in the runs below `root`."""

    def __init__(self, root: Path):
        self.path = root / "speeds.json"
        try:
            with run_directory.reading(self.path):
                self._measured: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError:
            message = f"{self.path}: not readable as JSON; delete it, and --measure measures again"
            raise RunError(message) from None
        self._seen: dict[str, list[float]] = {}
        for metrics in sorted(root.glob("**/metrics.jsonl")):
            try:
                config = config_lib.of_run(metrics.parent)
            except RunError:
                continue  # Of another version of the code.
            values = [line["obs.fps"] for line in run_directory.read_metrics(metrics.parent)[1:] if line.get("obs.fps")]
            if config and values:
                self._seen.setdefault(program_of(config_lib.flatten(config)), []).append(statistics.median(values))

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
        with run_directory.writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        run_directory.replace(self.path, json.dumps(self._measured, indent=1) + "\n")
