"""Command lines with `--config=NAME` and `--config.group.field=value`: flags, parsing, errors in one sentence."""

import difflib
import itertools
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dvrl_jax.errors import ConfigError, DiscoveryError, RunError
from dvrl_jax.runs import config as config_lib
from dvrl_jax.runs import process, run_directory
from dvrl_jax.runs.config import check_early, check_made, flatten, from_fields, shipped, suggestion

USAGE_ERROR = 2  # Exit code for mistakes that the user can fix.

CONFIG = ("--config", "-config")  # The flag, in both spellings that absl knows.

CONFIG_IS = tuple(f"{flag}=" for flag in CONFIG)

DEPENDENCIES = ("ENVPOOL_", "FLAX_", "JAX_", "MPL", "TQDM_")  # How the environment variables of dependencies begin.

FLAGS = flags.FLAGS

_argv: list[str] = []  # The command line that ml_collections reads: `sys.argv` as `run` has rewritten it.
_without_file: dict[str, Any] = {}  # Overrides of a run that resumes without `--config`, by dotted name.


def define_config() -> None:
    """Defines `--config`."""
    # Settings that the file leaves out may be given all the same; `run` has made sure that there are such fields.
    given = {"lock_config": False, "accept_new_attributes": True, "sys_argv": _argv}
    config_flags.DEFINE_config_file(
        "config", None, "Configuration: its name, for example pong_dvrl, or a file.", **given
    )


def config_and_overrides():
    """The configuration given on the command line (None without one) and its explicit overrides by dotted name.

    Raises:
        ConfigError: the file returns something else, or impossible values.
    """
    if FLAGS["config"].present:
        check_made(FLAGS.config, "--config: get_config of that file")
    if FLAGS.config is None:
        return None, dict(_without_file)
    check_early(flatten(FLAGS.config))
    return FLAGS.config, config_flags.get_override_values(FLAGS["config"])


def required_config() -> ConfigDict:
    """The configuration given on the command line, finalised.

    Raises:
        ConfigError: there is none, or its fields or values are impossible.
    """
    config, _ = config_and_overrides()
    if config is None:
        raise ConfigError("--config: must name a configuration, for example pong_dvrl")
    return from_fields(flatten(config))


def run(main: Callable[[], int]) -> None:
    """Parses the flags and exits with what `main` returns; a mistake of the user's ends in one sentence."""

    def parse(argv: list[str]) -> list[str]:
        try:
            arguments = _with_values(_with_files(argv[1:]))
            argv = [argv[0], *sorted(arguments, key=lambda x: not x.startswith(CONFIG_IS))]
            _argv[:] = argv
            rest = _parse(argv)
            if len(rest) > 1:
                raise ConfigError(
                    f"{rest[1]}: unexpected argument; all are --name=value, lists with commas (--name=a,b)"
                )
            return rest
        except (ConfigError, DiscoveryError, RunError) as error:
            _fail(error)

    def guarded(argv: list[str]) -> int:
        del argv
        signal.signal(signal.SIGINT, _leave)
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # Orbax reports every file that it touches.
        try:
            return main()
        except (ConfigError, DiscoveryError, RunError) as error:
            _fail(error)
        except Exception as error:
            if said := _misread_variable(error):
                _fail(RunError(said))
            if not isinstance(error, RuntimeError):
                raise
            from dvrl_jax.runs import compilation

            if (lacking := compilation.lack_of_memory(error)) is None:
                raise
            _fail(lacking)

    if sys.warnoptions:  # Of the user's, such as PYTHONWARNINGS=error: dependencies warn, and would fail.
        warnings.simplefilter("default")
    _describe_by(sys.modules[main.__module__])
    process.outlive_readers()
    app.run(guarded, flags_parser=parse)


def _describe_by(module: ModuleType) -> None:
    """Lets `--help` show a module's docstring and flags, whatever script has called its `main`."""
    script = sys.modules["__main__"]
    script.__doc__ = script.__doc__ or module.__doc__
    for flag in FLAGS.get_flags_for_module(module.__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _leave(signum: int, frame) -> None:
    """Answers Ctrl-C at once. Training has its own answer, a checkpoint; this one is for before and after it.

    Not as a KeyboardInterrupt: raised inside one of JAX's callbacks it would be printed and forgotten.
    """
    del frame
    os.write(2, b"stopped by SIGINT\n")
    os._exit(128 + signum)


def _misread_variable(error: Exception) -> str | None:
    """A sentence about an environment variable that a dependency could not read on import; None if it was not that."""
    if all(frame.name != "<module>" for frame in traceback.extract_tb(error.__traceback__)):
        return None
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, value in os.environ.items():
        is_in = name in said or any(text in said for text in (f"'{value}'", f'"{value}"', f"'{value}/"))
        if name.startswith(DEPENDENCIES) and is_in:
            return f"{name}={value}: cannot be used, and must be changed or unset ({said})"
    return None


def _fail(error: Exception):
    print(f"error: {error}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags, which runs the configuration file; returns what is left over.

    Raises:
        ConfigError: a flag or the file is wrong.
    """
    try:
        return FLAGS(argv)
    except Exception as error:
        if isinstance(_original(error), ConfigError):
            raise _original(error) from None
        for file, argument in _config_files(argv[1:]):
            if said := _mistake_in(file, argument, _original(error)):
                raise ConfigError(said) from None
        if not isinstance(error, flags.Error):
            raise
        if isinstance(error, flags.UnrecognizedFlagError):
            raise ConfigError(f"--{error.flagname}: there is no such flag{_flag_like(error.flagname)}") from None
        if missing := re.match(r"[Ff]lag (--\S+)(=None: | must have a value)", str(error)):
            raise ConfigError(f"{missing[1]}: is needed") from None
        raise ConfigError(" ".join(str(error).split())) from None


def _original(error: BaseException) -> BaseException:
    """What absl and ml_collections have turned into errors of their own, with the whole trace as its text."""
    while error.__context__ and (isinstance(error, flags.Error) or "Error whilst parsing config file" in str(error)):
        error = error.__context__
    return error


def _mistake_in(file: Path, argument: str | None, error: BaseException) -> str | None:
    """A sentence about an error that came up in running a configuration file; None if it did not."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if argument is not None and said.startswith("TypeError: get_config()"):
        return f"--config={file}:{argument}: the file does not take {argument!r} as an argument"
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{file}: has no function get_config"
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        said = f"{type(error).__name__}: {error.msg}"
        frames.append((Path(error.filename), error.lineno))
    paths = [path for path, _ in frames]
    if file not in paths:
        return None
    # The file, or what it has called of its own kind: not a library in between.
    beside = [frame for frame in frames if frame[0].parent in (file.parent, file.parent.resolve())]
    path, line = beside[-1] if beside else frames[paths.index(file)]
    return f"{path}, line {line}: {said}"


def _with_files(arguments: list[str]) -> list[str]:
    """The command line with `--config X` as `--config=X`, and with the file of a shipped configuration for its name."""
    known, found, left = shipped(), [], iter(arguments)
    for argument in left:
        if argument in CONFIG:
            argument = "=".join([argument, *itertools.islice(left, 1)])
        flag, equals, value = argument.partition("=")
        name, colon, rest = value.partition(":")
        if flag in CONFIG and name in known and not Path(name).is_file():
            value = f"{known[name]}{colon}{rest}"
        found.append(f"{flag}{equals}{value}")
    return found


def _flag_like(name: str) -> str:
    """The end of a message about an unknown flag: which one may have been meant."""
    fields = flatten(config_lib.declared_fields()[0]) if "config" in FLAGS else {}
    for field in fields:
        if name in (field, field.rpartition(".")[2]):
            return f"; did you mean --config.{field}?"
    return suggestion(f"--{name}", [f"--{flag}" for flag in FLAGS])


def _config_files(arguments: list[str]) -> list[tuple[Path, str | None]]:
    """The configuration files that a command line (`_with_files`) names, each with its argument (`FILE:argument`)."""
    matches = [re.match(r"--?config=([^:]*)(?::(.*))?$", argument) for argument in arguments]
    return [(Path(match[1]), match[2]) for match in matches if match]


def _with_values(arguments: list[str]) -> list[str]:
    """The command line with values of fields as their type is written; without them if there is no `--config`.

    So `1e6` becomes 1000000 where a whole number is asked for.

    Raises:
        ConfigError: a configuration file is not there or not given, a field is unknown, or its value of another type.
    """
    fields, all_known = config_lib.declared_fields()
    known, given, found, left = flatten(fields), {}, [], iter(arguments)
    for argument in left:
        match = re.match(r"--?(no)?config\.([^=]+)(=(.*))?$", argument, re.DOTALL)
        if match is None or "config" not in FLAGS:
            found.append(argument)
            continue
        no, field, equals, text = match.groups()
        # Which parameters a Gymnax environment has, its name tells; they are checked with all other fields.
        is_parameter = field.startswith("env.params.")
        if (all_known and not is_parameter) or field in known or any(name.startswith(f"{field}.") for name in known):
            config_lib.check_fields([field], fields)
        default = known.get(field)
        if not equals and type(default) is bool:
            text = str(not no)
        elif not equals:
            text = next(left, None)
        if text is None or (no and type(default) is not bool):
            raise ConfigError(f"--config.{field}: needs a value, as in --config.{field}={default}")
        given[field] = text if field not in known else config_lib.parse(field, text, default)
        # Of a tuple, ml_collections reads several arguments too.
        written = text if isinstance(default, float | tuple) or field not in known else given[field]
        found.append(f"--config.{field}={written}")
    files = _config_files(arguments)
    if given and not files:
        return _resumed(given, found)
    _check_files(files)
    return found


def _resumed(given: dict[str, Any], arguments: list[str]) -> list[str]:
    """Keeps what is `given` without `--config` for `config_and_overrides`, and returns the other arguments."""
    workdirs = [match[1] for match in (re.match(r"--?workdir=(.+)", x) for x in arguments) if match]
    if not any(run_directory.has_config(Path(path)) for path in workdirs):
        raise ConfigError(f"--config.{next(iter(given))}: needs a configuration too, such as --config=pong_dvrl")
    _without_file.update(given)
    return [argument for argument in arguments if not argument.startswith("--config.")]


def _check_files(files: list[tuple[Path, str | None]]) -> None:
    """Raises ConfigError for a configuration file that is not there."""
    for file, _ in files:
        if not file.is_file():
            known = {name: name for name in shipped()}
            if file.parent != Path():
                known |= {path.stem: str(path) for path in file.parent.glob("[a-z]*.py")}
            close = [f"; did you mean {known[stem]}?" for stem in difflib.get_close_matches(file.stem, known, n=1)]
            said = f"there is neither a configuration nor a file {str(file)!r}{''.join(close)}"
            raise ConfigError(f"--config: {said} (configurations are {', '.join(shipped())})")
