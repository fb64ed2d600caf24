"""How far an experiment's runs are, what came out of them, and how long the rest will take."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dvrl_jax.errors import RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import markdown, run_directory
from dvrl_jax.runs.experiments import Experiment, load_config


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
