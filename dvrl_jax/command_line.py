"""Command lines with `--config=FILE` and `--config.group.field=value`: flags, parsing, errors in one sentence."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dvrl_jax.config import ConfigError, check_fields, flatten, from_fields, with_settings
from dvrl_jax.discovery import DiscoveryError
from dvrl_jax.runs import RunError

USAGE_ERROR = 2  # Exit code for everything that the user can put right.

FLAGS = flags.FLAGS


def define_config() -> None:
    """Defines `--config`."""
    # Settings that the file leaves out may be given all the same; `run` has made sure that there are such fields.
    given = {"lock_config": False, "accept_new_attributes": True}
    config_flags.DEFINE_config_file("config", None, "Configuration file, for example configs/pong_dvrl.py.", **given)


def config_and_overrides():
    """The configuration given on the command line (None without one) and its explicit overrides by dotted name.

    Raises:
        ConfigError: the file returns something else.
    """
    if FLAGS["config"].present and not isinstance(FLAGS.config, ConfigDict):
        returned = type(FLAGS.config).__name__
        raise ConfigError(f"--config: get_config of that file returns {returned}, and must return a ConfigDict")
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
    return from_fields(flatten(config), default)


def run(main: Callable[[], int], default: ConfigDict) -> None:
    """Parses the flags and exits with what `main` returns; a mistake of the user's ends in one sentence.

    `default` is the configuration that has every field.
    """

    def parse(argv: list[str]) -> list[str]:
        try:
            _check_config_arguments(argv[1:], default)
            rest = FLAGS(argv)
            if len(rest) > 1:
                raise ConfigError(
                    f"{rest[1]}: unexpected argument; all are --name=value, lists with commas (--name=a,b)"
                )
            return rest
        except (ConfigError, DiscoveryError) as error:
            _fail(error)
        except flags.Error as error:
            _fail(ConfigError(_in_one_sentence(str(error))))
        except Exception as error:  # Whatever is wrong in a configuration file comes out here.
            trace = "".join(traceback.format_exception(error))
            _fail(ConfigError(_in_one_sentence(f"{_config_argument(argv)}\n{trace}")))

    def guarded(argv: list[str]) -> int:
        del argv
        signal.signal(signal.SIGINT, _leave)
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # Orbax reports every file that it touches.
        try:
            return main()
        except (ConfigError, DiscoveryError, RunError) as error:
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


def _config_argument(arguments: list[str]) -> str:
    """The last argument that names a configuration file, as `--config=FILE`."""
    words = [
        f"--config={b}" if a in ("--config", "-config") else a
        for a, b in zip(arguments, [*arguments, ""][1:], strict=True)
    ]
    return next((word for word in reversed(words) if re.match(r"--?config=", word)), "")


def _in_one_sentence(text: str) -> str:
    """What absl and ml_collections say; of a mistake in a configuration file, which they report whole, the end."""
    text = text.strip()
    if missing := re.match(r"flag (--\S+)=None: ", text):
        return f"{missing[1]}: is needed"
    if "\n" not in text:
        return text
    reason = text.splitlines()[-1].strip()
    named = re.search(r"--config=([^:\s]+)(?::([^:\s]*))?", text)
    if not named:
        return f"{text.splitlines()[0]} {reason}"
    file, argument = named.groups()
    if argument is not None and reason.startswith("TypeError: get_config()"):
        return f"--config={file}:{argument}: the file does not take {argument!r} as an argument"
    lines = [line for path, line in re.findall(r'File "([^"]+)", line (\d+)', text) if Path(path) == Path(file)]
    return f"{file}{f', line {lines[-1]}' if lines else ''}: {reason}"


def _check_config_arguments(arguments: list[str], default: ConfigDict) -> None:
    """Names a configuration file that is not there or not given, or an unknown field, before the flags are parsed."""
    fields = [match[1] for match in (re.match(r"--?config\.([^=]+)", x) for x in arguments) if match]
    check_fields(fields, with_settings(default))
    if fields and "config" in FLAGS and not any(re.match(r"--?config(=|$)", x) for x in arguments):
        raise ConfigError(f"--config.{fields[0]}: needs a configuration too, such as --config=configs/pong_dvrl.py")
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        argument = f"--config={following}" if argument in ("--config", "-config") else argument
        match = re.match(r"--?config=([^:]*)", argument)
        if match and not Path(match[1]).is_file():
            available = ", ".join(sorted(path.stem for path in Path("configs").glob("[a-z]*.py")))
            raise ConfigError(f"--config: there is no file {match[1]!r} (in configs/: {available or 'nothing'})")
