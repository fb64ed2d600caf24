"""Command lines with `--config=FILE` and `--config.group.field=value`: flags, parsing, errors in one sentence."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dvrl_jax.config import ConfigError, check_fields, load, with_settings
from dvrl_jax.runs import RunError

USAGE_ERROR = 2  # Exit code for everything that the user can put right.

FLAGS = flags.FLAGS


def define_config() -> None:
    """Defines `--config`."""
    # Settings that the file leaves out may be given all the same; `run` has made sure that there are such fields.
    given = {"lock_config": False, "accept_new_attributes": True}
    config_flags.DEFINE_config_file("config", None, "Configuration file, for example configs/pong_dvrl.py.", **given)


def config_and_overrides():
    """The configuration given on the command line (None without one) and its explicit overrides by dotted name."""
    if FLAGS.config is None:
        return None, {}
    return FLAGS.config, config_flags.get_override_values(FLAGS["config"])


def required_config(default: ConfigDict) -> ConfigDict:
    """The configuration given on the command line, finalised; `default` is the one that has every field.

    Raises:
        ConfigError: there is none, or its fields or values are impossible.
    """
    config, _ = config_and_overrides()
    if config is None:
        raise ConfigError("--config: must name a configuration file, for example configs/pong_dvrl.py")
    return load(config, default)


def run(main: Callable[[], int], default: ConfigDict) -> None:
    """Parses the flags and exits with what `main` returns; a mistake of the user's ends in one sentence.

    `default` is the configuration that has every field.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            _check_config_arguments(argv[1:], default)
            rest = app.parse_flags_with_usage(argv)
            if len(rest) > 1:
                raise ConfigError(f"{rest[1]}: unexpected argument; settings are given as --config.group.field=value")
            return rest
        except ConfigError as error:
            _fail(error)

    def guarded(argv: list[str]) -> int:
        del argv
        signal.signal(signal.SIGINT, _leave)
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # Orbax reports every file that it touches.
        try:
            return main()
        except (ConfigError, RunError) as error:
            _fail(error)

    app.run(guarded, flags_parser=parse)


def _leave(signum: int, frame) -> None:
    """Answers Ctrl-C at once. Training has its own answer, a checkpoint; this one is for before and after it.

    Not as a KeyboardInterrupt: raised inside one of JAX's callbacks it would be printed and forgotten.
    """
    del frame
    os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + signum)


def _fail(error: Exception):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _check_config_arguments(arguments: list[str], default: ConfigDict) -> None:
    """Names a configuration file that is not there or not given, or an unknown field, before the flags are parsed."""
    fields = [match[1] for match in (re.match(r"--?config\.([^=]+)", x) for x in arguments) if match]
    check_fields(fields, with_settings(default))
    if fields and "config" in FLAGS and not any(re.match(r"--?config(=|$)", x) for x in arguments):
        raise ConfigError(f"--config.{fields[0]}: needs a configuration too, such as --config=configs/pong_dvrl.py")
    for argument in arguments:
        match = re.match(r"--?config=([^:]*)", argument)
        if match and not Path(match[1]).is_file():
            available = ", ".join(sorted(path.stem for path in Path("configs").glob("[a-z]*.py")))
            raise ConfigError(f"--config: there is no file {match[1]!r} (in configs/: {available or 'nothing'})")
