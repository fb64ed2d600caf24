"""The tables in the documentation, made from the stored files.

    python -m evidence.tables
    python -m evidence.tables --check

A table stands between two comments, and is replaced by what the named files under docs/results say. Several folders are
joined by commas; each may be a pattern, such as `mountain_hike_scale/rnn_*`:

    <!-- table: mountain_hike -->              returns and encoding losses of all runs below that folder
    <!-- table: mountain_hike final -->        a row per setting: its mean return at the end
    <!-- table: beliefs/hike compared -->      a row per setting: by the protocol (docs/results/protocol.md)
    <!-- table: pong course -->                how losses and returns of all runs below that folder went
    <!-- table: mountain_hike probes -->       their probe-<update>.json
    <!-- table: mountain_hike causes -->       their causes-<update>.json
    <!-- table: mountain_hike evaluations -->  their evaluation-<update>-*.json
    <!-- table: references.json -->            the references
    <!-- end -->
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from dvrl_jax.errors import RunError
from dvrl_jax.runs import command_line, markdown, run_directory
from dvrl_jax.runs import config as config_lib
from dvrl_jax.viewing import plotting
from evidence import aggregates, probe, references

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

RETURNS_AT = (400_000, 1_200_000, 2_000_000)  # Environment steps.
LAST = 500_000  # The end of a run is judged by its returns over so many steps.
ENCODING_AFTER = 360_000  # By then the encoding loss has come down from its start.

COURSE = (  # What the course of a run is followed by, with the decimals shown.
    ("result.true", 2),
    ("loss.encoding", 0),
    ("loss.emission.mean", 0),
    ("loss.prior.mean", 2),
    ("particles.killed", 1),
    ("loss.value", 3),
    ("loss.entropy", 3),
    ("gradient.norm", 2),
    ("obs.avg_nr_observed", 3),
)
STATIONS = 8  # Rows of a course after the first line.

Lines = list[dict[str, Any]]


class Stored(NamedTuple):
    """The runs below some folders.

    Attributes:
        name: the folders, as a page names them.
        settings: runs by setting, which is said by what most of the others do not have; those of one setting differ in
        seed and length only.
        usual: what most settings have, "" if there is nothing.
    """

    name: str
    settings: dict[str, list[plotting.Run]]
    usual: str

    @property
    def agent(self) -> str:
        """Head of the column of settings."""
        return f"agent ({self.usual})" if self.usual else "agent"


def load(results: Path, name: str) -> Stored:
    """Reads the runs below folders of `results`; `name` joins patterns of them by commas.

    Fields younger than a run have their default.

    Raises:
        RunError: a pattern has none.
    """
    paths = []
    for pattern in name.split(","):
        found = sorted(path.parent for folder in results.glob(pattern) for path in folder.rglob("config.json"))
        if not found:
            raise RunError(f"{results / pattern}: holds no runs")
        paths += found
    defaults = config_lib.flatten(config_lib.default_config())
    loaded = [plotting.load_run(path, defaults) for path in paths]
    loaded.sort(key=lambda run: (run.fields["algorithm"] == "dvrl", run.fields["seed"]))
    groups = list(plotting.group_runs(loaded).values())
    usual = {}
    for field in plotting.varied_fields(loaded):
        (value, number), *_ = Counter(group[0].fields[field] for group in groups).most_common()
        usual[field] = value if number > len(groups) / 2 else None
    say = lambda field, value: f"{field.split('.')[-1]} {value}"
    settings = {}
    for group in groups:
        fields = group[0].fields
        values = [say(field, fields[field]) for field in usual if fields[field] != usual[field]]
        settings[", ".join([fields["algorithm"].upper(), *values])] = group
    most = ", ".join(say(field, value) for field, value in usual.items() if value is not None)
    return Stored(name, settings, f"if not said, {most}" if most else "")


def value_at(lines: Lines, metric: str, steps: int) -> float:
    """A metric on the last line up to `steps`; NaN if the run did not get there."""
    reached = [line for line in lines if line["env_steps"] <= steps]
    if not reached or lines[-1]["env_steps"] < steps:
        return math.nan
    return run_directory.column(reached[-1:], metric)[0]


def numbers(run: plotting.Run, known: list[references.Reference]) -> list[float]:
    """A row's numbers: returns, the share of what can be reached, encoding loss, hours, steps per second."""
    lines = run.lines
    returns = [value_at(lines, "result.true", steps) for steps in RETURNS_AT]
    late = run_directory.column(
        [line for line in lines if line["env_steps"] > lines[-1]["env_steps"] - LAST], "result.true"
    )
    late = [x for x in late if not math.isnan(x)] or [math.nan]
    returns += [min(late), statistics.fmean(late)]
    share = references.share(returns[-1], known, run.fields["env.observation_std"]) if known else math.nan
    settled = [line for line in lines if line["env_steps"] > ENCODING_AFTER and line.get("loss.encoding") is not None]
    encoding = math.nan
    if run.fields["algorithm"] == "dvrl":  # Else the loss is a constant 0.
        encoding = run_directory.column(lines[-1:], "loss.encoding")[0]
    most = math.nan if math.isnan(encoding) or not settled else max(run_directory.column(settled, "loss.encoding"))
    hours = run_directory.column(lines[-1:], "wall_time")[0] / 3600
    return [*returns, share, encoding, most, hours, lines[-1]["env_steps"] / (3600 * hours)]


DIGITS = (*(1 for _ in RETURNS_AT), 1, 1, 2, 2, 2, 2, 0)


def returns_table(stored: Stored, known: list[references.Reference]) -> str:
    """A row per run and, where there are several seeds, their mean and standard error."""
    at = [f"return at {steps / 1e6:.1f}M" for steps in RETURNS_AT]
    most = f"at most after {ENCODING_AFTER / 1e6:.2f}M"
    end = f"of the last {LAST / 1e6:.1f}M"
    head = [
        stored.agent,
        "seed",
        "steps",
        *at,
        f"worst {end}",
        f"mean {end}",
        "share",
        "encoding loss at the end (nats)",
        most,
    ]
    head, rows = [*head, "hours", "steps/s"], []
    for name, group in stored.settings.items():
        found = [numbers(run, known) for run in group]
        lengths = [_millions(run.lines[-1]["env_steps"]) for run in group]
        for run, length, row in zip(group, lengths, found, strict=True):
            cells = [_number(value, digits) for value, digits in zip(row, DIGITS, strict=True)]
            rows.append([name, str(run.fields["seed"]), length, *cells])
        if len(group) > 1:
            cells = [_mean(column, digits) for column, digits in zip(zip(*found, strict=True), DIGITS, strict=True)]
            rows.append([name, "mean", lengths[0] if len(set(lengths)) == 1 else "-", *cells])
    return markdown.table(head, rows)


def course_table(stored: Stored) -> str:
    """Rows per run: its first line, and the last line within each of `STATIONS` equal parts of it."""
    rows = []
    for setting, group in stored.settings.items():
        for run in group:
            last = run.lines[-1]["env_steps"]
            within = [[x for x in run.lines if x["env_steps"] <= last * i // STATIONS] for i in range(STATIONS + 1)]
            stations = {line["update"]: line for line in (run.lines[0], *(lines[-1] for lines in within if lines))}
            for line in stations.values():
                cells = [_number(run_directory.column([line], name)[0], digits) for name, digits in COURSE]
                rows.append([setting, str(run.fields["seed"]), f"{line['env_steps']:,}", *cells])
    return markdown.table([stored.agent, "seed", "steps", *(name for name, _ in COURSE)], rows)


def measured(stored: Stored, kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    """What <kind>-<update>*.json of all runs hold: (setting, seed, contents) of each.

    Raises:
        RunError: there is no such file.
    """
    found = []
    for setting, group in stored.settings.items():
        for run in group:
            files = sorted(run.path.glob(f"{kind}-*.json"), key=lambda file: (int(file.stem.split("-")[1]), file.name))
            found += [(setting, str(run.fields["seed"]), json.loads(file.read_text())) for file in files]
    if not found:
        command = "evaluate.py" if kind == "evaluation" else f"-m evidence.{kind}"
        raise RunError(f"{stored.name}: none of its runs has a {kind}-<update>*.json (python {command})")
    return found


def probes_table(stored: Stored) -> str:
    """A row per run and probed checkpoint: the error of each estimate."""
    found = measured(stored, "probe")
    names = {one["name"]: None for *_, result in found for one in result["estimates"]}
    columns = [*(name for name in names if name != probe.EXACT), probe.EXACT]
    rows = []
    for setting, seed, result in found:
        errors = {one["name"]: one["rmse"] for one in result["estimates"]}
        cells = [_number(errors.get(name, math.nan), 4) for name in columns]
        rows.append([setting, seed, _millions(result["env_steps"]), f"{result['mean_return']:.1f}", *cells])
    return markdown.table([stored.agent, "seed", "steps", "return", *columns], rows)


def causes_table(stored: Stored) -> str:
    """A column per run and examined checkpoint, a row per number."""
    found = measured(stored, "causes")
    head = [f"{setting}, seed {seed}, {_millions(result['env_steps'])}" for setting, seed, result in found]
    names = sorted({name for *_, result in found for name in result["numbers"]})
    cell = lambda value: "-" if value is None else f"{value:.2g}"
    rows = [[name, *(cell(result["numbers"].get(name)) for *_, result in found)] for name in names]
    return markdown.table([stored.usual, *head], rows)


def evaluations_table(stored: Stored) -> str:
    """A row per run and way to act: its return by checkpoint, and their mean ± standard error over checkpoints.

    Of several evaluations of one checkpoint the longest counts. Where there are several seeds, their mean and standard
    error over seeds are added, for what all of them have.

    Raises:
        RunError: there is no evaluation.
    """
    longest: dict[tuple[str, bool], dict[str, dict[int, dict[str, Any]]]] = {}
    for setting, seed, result in measured(stored, "evaluation"):
        of_run = longest.setdefault((setting, result["greedy"]), {}).setdefault(seed, {})
        if result["episodes"] >= of_run.get(result["update"], result)["episodes"]:
            of_run[result["update"]] = result
    returns = {
        name: {seed: {update: one["mean"] for update, one in run.items()} for seed, run in seeds.items()}
        for name, seeds in longest.items()
    }
    updates = sorted({update for seeds in returns.values() for run in seeds.values() for update in run})
    rows = []
    for (setting, greedy), seeds in returns.items():
        name = [setting, "most probable" if greedy else "sampled"]
        for seed, run in seeds.items():
            mean = _mean(tuple(run.values()), 1) if len(run) > 1 else "-"
            rows.append([*name, seed, *(_number(run.get(update, math.nan), 1) for update in updates), mean])
        if len(seeds) > 1:
            cells = [_mean(tuple(run.get(update, math.nan) for run in seeds.values()), 1) for update in updates]
            means = tuple(statistics.fmean(run.values()) if len(run) > 1 else math.nan for run in seeds.values())
            rows.append([*name, "mean", *cells, _mean(means, 1)])
    head = [stored.agent, "actions", "seed", *(f"update {update:,}" for update in updates), "mean"]
    return markdown.table(head, rows)


def _millions(steps: int) -> str:
    return f"{steps / 1e6:.2f}M"


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e9 else f"{value:.1e}"


def _mean(values: tuple[float, ...], digits: int) -> str:
    """Mean ± standard error; nothing if a run has no value, so that all means are over all seeds."""
    if any(math.isnan(value) for value in values):
        return "-"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def final_table(stored: Stored, known: list[references.Reference]) -> str:
    """A row per setting: its seeds, and the mean ± standard error over them of the return at the end and its share.

    Of a single seed there is no standard error. The standard error of two says little.
    """
    rows = []
    for name, group in stored.settings.items():
        ends = [numbers(run, known)[len(RETURNS_AT) + 1 :][:2] for run in group]
        lengths = {_millions(run.lines[-1]["env_steps"]) for run in group}
        columns = zip(zip(*ends, strict=True), (1, 2), strict=True)
        cells = [_mean(column, digits) if len(group) > 1 else _number(column[0], digits) for column, digits in columns]
        rows.append([name, str(len(group)), lengths.pop() if len(lengths) == 1 else "-", *cells])
    head = [stored.agent, "seeds", "steps", f"mean return of the last {LAST / 1e6:.1f}M", "share"]
    return markdown.table(head, rows)


def compared_table(stored: Stored) -> str:
    """A row per setting: interquartile means over seeds with 95% intervals, collapses, and the probability that a run
    is better than one of the RNN (the setting "RNN"; none without it).
    """
    shown = lambda found, digits: f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"
    results = {name: [[aggregates.final(run.lines) for run in group]] for name, group in stored.settings.items()}
    rows = []
    for name, group in stored.settings.items():
        scores, areas = results[name], [[aggregates.over_all(run.lines) for run in group]]
        better = "-"
        if "RNN" in results and name != "RNN":
            improvement = aggregates.probability_of_improvement
            better = shown(aggregates.interval(improvement, scores, results["RNN"]), 2)
        means = [shown(aggregates.interval(aggregates.interquartile_mean, x), 1) for x in (scores, areas)]
        collapses = ", ".join(str(aggregates.collapses(run.lines)) for run in group)
        lengths = {_millions(run.lines[-1]["env_steps"]) for run in group}
        rows.append([name, str(len(group)), lengths.pop() if len(lengths) == 1 else "-", *means, better, collapses])
    head = [stored.agent, "seeds", "steps", "return at the end", "return over all steps", "P(better than RNN)"]
    return markdown.table([*head, "lines in a collapse"], rows)


KINDS = {
    "compared": compared_table,
    "course": course_table,
    "probes": probes_table,
    "causes": causes_table,
    "evaluations": evaluations_table,
}
OF_RETURNS = {None: returns_table, "final": final_table}  # Those that need the references.
BEGIN = re.compile(r"^<!-- table: ", re.M)
BLOCK = re.compile(
    rf"^(<!-- table: (\S+)(?: ({'|'.join((*KINDS, 'final'))}))? -->\n)(.*?)^(<!-- end -->)$", re.M | re.S
)


def generate(text: str, results: Path = RESULTS) -> str:
    """A page's text with its tables made anew from the files below `results`.

    Raises:
        RunError: a comment names something that is not there, or does not end.
    """
    if len(BEGIN.findall(text)) != len(BLOCK.findall(text)):
        raise RunError("a comment '<!-- table: NAME -->' is malformed, or has no '<!-- end -->'")
    file = results / "references.json"
    known = references.load(file) if file.exists() else []

    def table(match: re.Match) -> str:
        begin, name, kind, _, end = match.groups()
        path = results / name
        if path.suffix == ".json":
            references.load(path)
            made = references.table(json.loads(path.read_text()))
        else:
            stored = load(results, name)
            made = OF_RETURNS[kind](stored, known) if kind in OF_RETURNS else KINDS[kind](stored)
        return f"{begin}{made}{end}"

    return BLOCK.sub(table, text)


def stale(pages: tuple[Path, ...] = PAGES, results: Path = RESULTS) -> list[Path]:
    """Pages whose tables are not what the stored files say."""
    return [page for page in pages if generate(page.read_text(), results) != page.read_text()]


def main() -> int:
    behind = stale()
    for page in behind:
        name = page.relative_to(ROOT)
        if FLAGS.check:
            print(f"{name}: tables differ from the stored files; python -m evidence.tables", file=sys.stderr)
        else:
            page.write_text(generate(page.read_text()))
            print(name)
    return 1 if behind and FLAGS.check else 0


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_boolean("check", False, "Change nothing; exit code 1 if a table differs.")
    command_line.run(main)
