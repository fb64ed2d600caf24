"""Trains an agent: python train.py --config=configs/pong_dvrl.py [--workdir=DIR] [--config.group.field=value ...]"""

from pathlib import Path

from absl import flags

from configs import default
from dvrl_jax.runs import command_line, process, training

command_line.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, continued if it holds one. Default: a new one.")
CACHE = flags.DEFINE_boolean("compilation_cache", True, "Keep compiled programs in the user's cache directory.")


def main() -> int:
    config, overrides = command_line.config_and_overrides()
    workdir = Path(WORKDIR.value) if WORKDIR.value else None
    run, config = training.prepare(workdir, config, overrides, default.get_config())
    process.prepare(config)
    try:
        training.train(run, config, default.get_config(), CACHE.value)
    except training.Interrupted as stop:
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    command_line.run(main, default.get_config())
