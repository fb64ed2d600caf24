"""Trains an agent: python train.py --config=configs/pong_dvrl.py [--workdir=DIR] [--config.group.field=value ...]"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from configs import default

config_flags.DEFINE_config_file("config", None, "Configuration file; its fields can be overridden as --config.a.b=x.")
flags.DEFINE_string("workdir", None, "Directory of the run; one that holds a run is continued. Default: a new number.")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # Imported here so that a mistyped flag is answered at once.
    from dvrl_jax import config, runs, training

    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax reports every file it touches.
    overrides = config_flags.get_override_values(FLAGS["config"]) if FLAGS.config is not None else {}
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else None
    try:
        run, settings = training.prepare(workdir, FLAGS.config, overrides, default.get_config())
        training.train(run, settings, default.get_config())
    except (config.ConfigError, runs.RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except training.Interrupted as stop:
        return 128 + stop.signum
    return 0


if __name__ == "__main__":
    app.run(main)
