"""Plots metrics of runs: dvrl-plot --id 3,4,5 [--metric result.true,loss.encoding] [--out plots/comparison]"""

from pathlib import Path

from absl import flags

from dvrl_jax.errors import RunError
from dvrl_jax.runs import command_line

IDS = flags.DEFINE_list("id", [], "Numbers of runs under --root.")
WORKDIRS = flags.DEFINE_list("workdir", [], "Directories of runs, besides or instead of --id.")
ROOT = flags.DEFINE_string("root", "saved_runs", "Where numbered runs are.")
METRICS = flags.DEFINE_list("metric", ["result.true"], "Metrics to plot, a panel each.")
SMOOTH = flags.DEFINE_integer("smooth", 1, "Average over this many log lines; 1 does not smooth.", lower_bound=1)
OUT = flags.DEFINE_string(
    "out", None, "File name without ending; PNG and SVG are written. Default: plots/<runs>-<metrics>."
)
TEXT = flags.DEFINE_boolean("text", False, "Draw in the terminal, and write no files.")


def main() -> int:
    from dvrl_jax.runs import config
    from dvrl_jax.viewing import plotting, text_curves

    paths = [Path(ROOT.value) / number for number in IDS.value if number]
    paths += [Path(name) for name in WORKDIRS.value if name]
    paths = list({path.resolve(): path for path in paths}.values())  # A run that is named twice is one run.
    if not METRICS.value:
        raise RunError("--metric: name at least one metric, for example --metric result.true")
    if not paths:
        raise RunError("--id: name at least one run, for example --id 3, or a directory with --workdir")
    defaults = config.as_stored(config.default_config())
    loaded = [plotting.load_run(one, defaults) for path in paths for one in config.seed_directories(path)]
    for metric in METRICS.value:
        plotting.check_metric(loaded, metric)
    if TEXT.value:
        for metric in METRICS.value:
            for label, group in plotting.group_runs(loaded).items():
                curve = plotting.curve(label, group, metric, SMOOTH.value)
                text_curves.show(f"{metric}, {curve.label}", curve.steps, curve.mean)
        return 0
    name = f"plots/{plotting.name_of(paths, METRICS.value)}" if OUT.value is None else OUT.value
    name = name.removesuffix(".png").removesuffix(".svg")
    if not name or name.endswith(("/", ".")):
        raise RunError(f"--out: {OUT.value!r} is no name of a file")
    figure = plotting.plot(loaded, METRICS.value, SMOOTH.value)
    print(*plotting.save(figure, Path(name)), sep="\n")
    return 0


def run() -> None:
    """Runs `main` with this process's arguments, and ends the process."""
    command_line.run(main)


if __name__ == "__main__":
    run()
