"""Trains an agent: dvrl-train --config=pong_dvrl [--workdir=DIR] [--config.group.field=value ...]"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from dvrl_jax.errors import ConfigError
from dvrl_jax.runs import command_line, hosts, process, run_directory
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs.waiting import waiting

command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, continued if it holds one. Default: a new one.")
CACHE = flags.DEFINE_boolean("compilation_cache", True, "Keep compiled programs in the user's cache directory.")
PRINT_CONFIG = flags.DEFINE_boolean("print_config", False, "Print all fields, not only those not at their defaults.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Start so many processes here, which train the run together.", 1)
DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "This is one of several processes that train the run together (SLURM, Open MPI)."
)


def _announce(workdir: Path | None, config: ConfigDict | None) -> None:
    """The first line: what is about to happen, before libraries load. Raises ConfigError if nothing can."""
    if workdir is not None and run_directory.has_config(workdir):
        print(f"resuming the run in {workdir}", flush=True)
    elif config is not None:
        print(f"training {config.algorithm} on {config.env.name}, seed {config.seed}", flush=True)
    else:
        raise ConfigError("--config: is needed to start a new run, for example --config=mountain_hike_dvrl")


def _fields(workdir: Path | None, config: ConfigDict | None) -> dict[str, Any]:
    """The configuration's fields by dotted name, as far as they are known before a check of them all."""
    stored = run_directory.read_config(workdir) if workdir is not None else None
    if stored is None:
        return config_lib.flatten(config)
    try:
        config_lib.check_early(stored)
    except ConfigError:
        return {}  # The check says what is wrong, and in which file.
    return stored


def main() -> int:
    config, overrides = command_line.config_and_overrides()
    workdir = Path(WORKDIR.value) if WORKDIR.value else None
    if PROCESSES.value > 1 and not hosts.is_one_of_several(DISTRIBUTED.value):
        return hosts.launch(PROCESSES.value)
    with hosts.joined(DISTRIBUTED.value):
        return _train(workdir, config, overrides)


def _train(workdir: Path | None, config: ConfigDict | None, overrides: dict[str, Any]) -> int:
    _announce(workdir, config)
    with waiting("loading JAX, Flax and EnvPool"):
        from dvrl_jax.runs import training
    process.prepare(_fields(workdir, config))
    run, config = training.prepare(workdir, config, overrides)
    try:
        training.train(run, config, CACHE.value, PRINT_CONFIG.value)
    except training.Interrupted as stop:
        return 128 + stop.signum
    if sys.stdout.isatty():
        from dvrl_jax.viewing import text_curves

        text_curves.show("result.true", *run_directory.read_curve(run.path, "result.true"))
    return 0


def run() -> None:
    """Runs `main` with this process's arguments, and ends the process."""
    command_line.run(main)


if __name__ == "__main__":
    run()
