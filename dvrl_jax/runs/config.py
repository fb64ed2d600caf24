"""Checking, comparing and storing configurations. What the fields mean is said in `dvrl_jax/configs/default.py`.

Environments and belief models, and with them JAX, are imported by the functions that ask them: mistakes that can be
seen without them are named at once.
"""

import ast
import decimal
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dvrl_jax import discovery
from dvrl_jax.configs import default
from dvrl_jax.errors import ConfigError, RunError
from dvrl_jax.runs import run_directory

# Fields that may change when a run is resumed: they do not touch what is learned.
CHANGEABLE = ("num_devices", "total_env_steps", "max_skipped_updates", "env.first_core", "log.", "checkpoint.")

LARGEST = 1_000_000  # No size is sensibly larger; far larger ones would overflow rather than run out of memory.


def default_config() -> ConfigDict:
    """A new configuration with every field, and no settings of single environments or belief models."""
    return default.get_config()


def shipped() -> dict[str, Path]:
    """The files of `dvrl_jax/configs` by name, such as "pong_dvrl"."""
    return {path.stem: path for path in sorted(Path(default.__file__).parent.glob("[a-z]*.py"))}


def flatten(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration by their dotted names."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def is_changeable(field: str) -> bool:
    """Whether a field may differ between the parts of one run."""
    return field.startswith(CHANGEABLE)


def check_made(config: Any, maker: str) -> None:
    """Raises ConfigError if what `maker`, a function as messages call it, has returned is no configuration."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{maker} returns {type(config).__name__}, and must return a ConfigDict")


def settings_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, by dotted name, that runs to be averaged share: without seeds and what is `is_changeable`."""
    own = lambda field: field not in ("seed", "num_seeds") and not is_changeable(field)
    return {field: value for field, value in fields.items() if own(field)}


def check_fields(names: Iterable[str], config: ConfigDict) -> None:
    """Raises ConfigError if one of the dotted names is no field, or a whole group, of a configuration."""
    known = flatten(config)
    for name in names:
        if within := [field for field in known if field.startswith(f"{name}.")]:
            raise ConfigError(f"{name}: is a group of fields, each of which is given by itself, such as {within[0]}")
        if name not in known:
            raise ConfigError(f"{name}: there is no such field{suggestion(name, known)}")


def _settings(names: Iterable[Any] | None) -> Iterator[tuple[str, str, str, Any]]:
    """What environments and belief models of these names (None: all) can set: (name, group, setting, its default)."""
    from dvrl_jax import agents, envs

    tasks = envs.named() | {name: envs.find(name) for name in names or () if envs.is_gymnax(name)}
    for name, kind in tasks.items():
        if names is None or name in names:
            yield from ((name, "env", setting, value) for setting, value in kind.settings_of(name).items())
    for name, kind in agents.named().items():
        if names is None or name in names:
            yield from ((name, "model", setting, value) for setting, value in kind.settings.items())
            yield from ((name, "loss", f"{loss}_coef", float(value)) for loss, value in kind.losses.items())


def with_settings(names: Iterable[Any] | None = None) -> ConfigDict:
    """The default configuration and what environments and belief models of these names (None: all) can set besides.

    A belief model can set a coefficient, `loss.<name>_coef`, for each of its losses.
    """
    config, fields = default_config(), {}
    for _, group, setting, value in _settings(names):
        fields.setdefault(f"{group}.{setting}", value)
    known = flatten(config)
    config.update_from_flattened_dict({field: value for field, value in fields.items() if field not in known})
    return config


def merge(values: Mapping[str, Any]) -> ConfigDict:
    """The default configuration with other values, by dotted name, as read from JSON.

    It also has the settings of its environment and belief model that not every configuration has.

    Raises:
        ConfigError: a field is unknown or its value has the wrong type.
    """
    defaults = flatten(default_config())
    config = with_settings([values.get(x, defaults[x]) for x in ("env.name", "algorithm")])
    check_fields(values, config)
    _set(config, values)
    return config


def _set(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Gives fields of a configuration, by dotted name, other values of the same type. Raises ConfigError."""
    known = flatten(config)
    for field, value in values.items():
        if isinstance(known[field], tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(value, np.generic):
            value = value.item()
        if not _same_type(known[field], value):
            raise ConfigError(f"{field} = {_short(value)}: must be {kind_of(known[field])}")
        if isinstance(known[field], float) and abs(value) > _LARGEST_FLOAT:
            raise ConfigError(f"{field} = {_short(value)}: must be a finite number (of 32 bits)")
        config.update_from_flattened_dict({field: float(value) if isinstance(known[field], float) else value})


_PACKAGE = Path(discovery.__file__).parent
# What classes of environments and belief models add to which group of fields.
_DECLARED = (("env", "envs", "settings"), ("model", "agents", "settings"), ("loss", "agents", "losses"))


def declared_fields() -> tuple[ConfigDict, bool]:
    """The fields that `with_settings` has, as far as the sources say without being imported; whether that is all."""
    config, is_all = default_config(), True
    for group, folder, attribute in _DECLARED:
        found = discovery.declared(_PACKAGE / folder, attribute)
        is_all &= found is not None and all(isinstance(settings, dict) for settings in found)
        for setting, value in (item for settings in found or () if is_all for item in settings.items()):
            name, value = (f"{setting}_coef", float(value)) if group == "loss" else (setting, value)
            if name not in config[group]:
                config[group][name] = value
    return config, is_all


def check_early(values: Mapping[str, Any]) -> None:
    """Checks what can be checked of a configuration, by dotted name, before anything large is imported.

    Raises:
        ConfigError: a value has the wrong type or is impossible.
    """
    config = default_config()
    known = flatten(config)
    _set(config, {field: value for field, value in values.items() if field in known})
    _check_values(config)
    names = discovery.declared(_PACKAGE / "agents", "name")
    if names is not None and config.algorithm not in names:
        algorithms = sorted(name for name in names if name)
        _requirement(flatten(config))("algorithm", False, f"one of {', '.join(algorithms)}")
    names = discovery.declared(_PACKAGE / "envs", "name")
    if names is not None and "dvrl_jax.envs" not in sys.modules:  # Else the file may have an environment of its own.
        _check_env_name(config, {*names} - {None, ""})


_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def _short(value: Any) -> str:
    """A value for messages."""
    text = _cut(value if isinstance(value, str) else repr(value))
    return repr(text) if isinstance(value, str) else text


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", tuple: "a tuple, such as {}"}


def kind_of(value: Any) -> str:
    """What a field must be whose default is this value, for messages."""
    return KINDS[type(value)].format(value)


def parse(field: str, text: str, like: Any) -> Any:
    """The value that a text on the command line means for a field whose default is `like`.

    Raises:
        ConfigError: it means no value of that type.
    """
    kind = type(like)
    try:
        if kind is bool:
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[text.lower()]
        if kind is tuple:
            value = ast.literal_eval(text)
            return value if isinstance(value, tuple) else (value,)
        if kind is int and not re.fullmatch(r"[+-]?(\d+|0[xX][0-9a-fA-F]+|0[oO][0-7]+)", text):
            number = decimal.Decimal(text)
            if number != number.to_integral_value() or abs(number) >= 2**64:
                raise ValueError
            return int(number)
        return int(text, 0 if "x" in text.lower() or "o" in text.lower() else 10) if kind is int else kind(text)
    except (KeyError, ValueError, SyntaxError, ArithmeticError):
        raise ConfigError(f"--config.{field}={_cut(text)}: must be {kind_of(like)}") from None


def _same_type(reference: Any, value: Any) -> bool:
    if isinstance(reference, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(reference) is type(value)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: "; did you mean <the closest known one>?", or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def seed_directories(path: Path) -> list[Path]:
    """The directories of a run's seeds, each a run by itself; of a single seed, the run's own."""
    fields = run_directory.read_config(path) or {}
    number, first = fields.get("num_seeds", 1), fields.get("seed", 0)
    if not (type(number) is int and type(first) is int and number > 1):
        return [path]
    return [path / f"seed{seed}" for seed in range(first, first + number)]


def sees_images(config: ConfigDict) -> bool:
    """Whether observations are images rather than vectors."""
    from dvrl_jax import envs

    return envs.observation_of(config.env).is_image


def has_particles(fields: Mapping[str, Any]) -> bool:
    """Whether beliefs have several rows per environment; `fields` by dotted name, and True of an unknown algorithm."""
    from dvrl_jax import agents

    model = {name.removeprefix("model."): value for name, value in fields.items() if name.startswith("model.")}
    kind = agents.named().get(fields["algorithm"])
    return kind is None or kind.rows_per_env(SimpleNamespace(**model)) > 1


def from_fields(fields: Mapping[str, Any]) -> ConfigDict:
    """The finalised configuration that has these fields, by dotted name, and all others by default.

    Raises:
        ConfigError: a field is unknown, or its value impossible or of another type than the default.
    """
    config, defaults = merge(fields), flatten(default_config())
    for name, group, setting, value in _settings([config.env.name, config.algorithm]):
        field = f"{group}.{setting}"
        if defaults.get(field, value) != value:
            raise ConfigError(
                f"{field}: is {_short(defaults[field])} by default, but {_short(value)} in the "
                f"settings of {name}, which must call it something else"
            )
    return finalise(config)


def of_run(path: Path, changes: Mapping[str, Any] = {}) -> ConfigDict | None:
    """The configuration stored in a run's directory, with `changes` by dotted name; None if there is none.

    Raises:
        RunError: it is damaged, or not one that can be trained.
    """
    fields = run_directory.read_config(path)
    if fields is None:
        return None
    try:
        return from_fields(fields | dict(changes))
    except ConfigError as error:
        raise RunError(f"{path / 'config.json'}: {error}") from None


def finalise(config: ConfigDict) -> ConfigDict:
    """Checks a configuration and settles what follows from other fields.

    Returns a copy in which `model.resample` is off where the ELBO has no weight.
    Raises:
        ConfigError: a value is impossible.
    """
    from dvrl_jax import agents

    config = config.copy_and_resolve_references()
    _check_values(config)
    _check_kinds(config)
    if config.loss.encoding_coef == 0 and "encoding" in agents.named()[config.algorithm].losses:
        config.model.resample = False
    return config


# The least values of fields, and the largest of sizes and of what is counted in 32 bits.
_AT_LEAST = {
    1: "total_env_steps num_seeds num_devices num_envs num_steps bptt_segments env.frame_skip model.h_dim model.z_dim "
    "model.num_particles log.interval checkpoint.keep max_skipped_updates",
    0: "env.observation_std env.obs_noise_std env.noise_components env.noise_components_std env.obs_delay "
    "model.action_encoding model.obs_loss_coef model.min_emission_std checkpoint.interval checkpoint.minutes "
    "log.save_reconstruction_interval",
}
_SIZES = "num_seeds num_envs num_steps bptt_segments env.frame_skip model.h_dim model.z_dim model.num_particles"
_SIZES += " model.action_encoding env.noise_components env.obs_delay"
_COUNTS = "max_skipped_updates log.interval checkpoint.interval checkpoint.keep"


def _requirement(fields: Mapping[str, Any]) -> Callable[[str, bool, str], None]:
    """Raises ConfigError, unless something holds of a field, with the rule that it must be like."""

    def require(field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{field} = {_short(fields[field])}: must be {rule}")

    return require


def _check_values(c: ConfigDict) -> None:
    """Each value by itself, without environments and belief models."""
    fields = flatten(c)
    require = _requirement(fields)
    for field, value in fields.items():
        numbers = value if isinstance(value, tuple) else (value,)
        # What is finite for Python need not be for the device, where numbers have 32 bits.
        if any(isinstance(x, float) and not abs(x) <= _LARGEST_FLOAT for x in numbers):
            require(field, False, "a finite number (of 32 bits)")
    coefs = [field for field in fields if field.startswith("loss.") and field.endswith("_coef")]
    for least, names in _AT_LEAST.items():
        for field in (*names.split(), *(() if least else coefs)):
            require(field, fields[field] >= least, f"at least {least}")
    for field in _SIZES.split():
        require(field, fields[field] <= LARGEST, f"at most {LARGEST:,}")
    for field in _COUNTS.split():
        require(field, fields[field] < 2**31, "less than 2**31")
    require("seed", 0 <= c.seed < 2**31, "between 0 and 2147483647")
    require("num_seeds", c.seed + c.num_seeds <= 2**31, "so small that no seed is above 2147483647")
    require("num_devices", c.num_devices == 1 or c.num_seeds == 1, "1 with several seeds, which all devices share")
    require("num_devices", c.num_envs % c.num_devices == 0, f"a divisor of num_envs ({c.num_envs})")
    # Steps are counted in unsigned, updates in signed integers of 32 bits, and the last update may go too far.
    per_update = c.num_envs * c.num_steps
    largest = min(2**32 - per_update, (2**31 - 1) * per_update)
    require(
        "total_env_steps", c.total_env_steps < largest, f"less than {largest:,} with updates of {per_update:,} steps"
    )
    require("env.first_core", -1 <= c.env.first_core < 2**16, "a core's number, from 0 on, or -1")
    for field in ("p_blank", "p_repeat"):
        require(f"env.{field}", 0 <= c.env[field] <= 1, "a probability, between 0 and 1")
    kept = c.env.keep_components
    valid_kept = all(type(n) is int and n >= 0 for n in kept) and len(set(kept)) == len(kept)
    require("env.keep_components", valid_kept, "different whole numbers, each at least 0")
    require("loss.reward_scale", c.loss.reward_scale > 0, "greater than 0")
    require("loss.gamma", 0 <= c.loss.gamma <= 1, "between 0 and 1")
    require("optimizer.name", c.optimizer.name in ("rmsprop", "adam"), "rmsprop or adam")
    for field in ("learning_rate", "eps", "max_grad_norm"):
        positive = np.float32(fields[f"optimizer.{field}"]) > 0
        require(f"optimizer.{field}", positive, "greater than 0 (and not so small that 32 bits cannot hold it)")
    require("optimizer.alpha", 0 <= c.optimizer.alpha < 1, "at least 0 and less than 1")
    betas = c.optimizer.betas
    valid_betas = len(betas) == 2 and all(_is_number(b) and b >= 0 and np.float32(b) < 1 for b in betas)
    require("optimizer.betas", valid_betas, "two numbers, each at least 0 and less than 1")
    valid_lambdas = len(c.loss.td_lambdas) == 2 and all(_is_number(x) and 0 <= x <= 1 for x in c.loss.td_lambdas)
    require("loss.td_lambdas", valid_lambdas, "two numbers, each between 0 and 1")
    channels = c.model.channels
    valid_channels = all(type(n) is int and 1 <= n <= LARGEST for n in channels)
    require("model.channels", valid_channels, f"whole numbers, at least 1 and at most {LARGEST:,}")
    times = c.log.predicted_times
    valid_times = len(times) > 0 and all(type(dt) is int and 0 <= dt <= 1000 for dt in times)
    require("log.predicted_times", valid_times, "at least one whole number of steps, each between 0 and 1000")
    if c.model.batch_norm or c.model.policy_batch_norm:
        require("num_envs", c.num_envs >= 2, "at least 2 with batch normalisation")


def _check_env_name(c: ConfigDict, own: Iterable[str]) -> None:
    """That there is such an environment, the package having its `own`."""
    known = [*sorted(own), *discovery.atari_games()]
    rule = f"{', '.join(sorted(own))}, gymnax/<id> or an Atari game that EnvPool has{suggestion(c.env.name, known)}"
    _requirement(flatten(c))("env.name", c.env.name in known or c.env.name.startswith("gymnax/"), rule)


def _check_kinds(c: ConfigDict) -> None:
    """That there are such an environment and belief model, what they ask for, and networks for what is seen."""
    from dvrl_jax import agents, envs, networks

    require = _requirement(flatten(c))
    algorithms = sorted(agents.named())
    require("algorithm", c.algorithm in algorithms, f"one of {', '.join(algorithms)}")
    agents.named()[c.algorithm].check(c)
    _check_env_name(c, envs.named())
    envs.find(c.env.name).check(c)
    try:
        shape = envs.observation_of(c.env).shape
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"env: {c.num_envs} of {c.env.name} cannot be made ({error})") from None
    try:
        networks.encoded_shape(shape, c.model.channels)
    except ValueError as error:
        raise ConfigError(f"model.channels = {_short(c.model.channels)}: {error} (env.name is {c.env.name})") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_FLOAT


def to_json(config: ConfigDict) -> str:
    """A configuration as JSON text, one field a line, by dotted names."""
    return json.dumps(flatten(config), indent=2) + "\n"


def as_stored(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration by their dotted names, with the values that reading `to_json` gives."""
    return json.loads(to_json(config))


def describe(config: ConfigDict, whole: bool = True) -> str:
    """The configuration, a field a line; a star marks what differs from the defaults. If not `whole`, only that."""
    fields, defaults = flatten(config), flatten(with_settings()) | flatten(with_settings([config.env.name]))
    if not whole:
        fields = {field: value for field, value in fields.items() if defaults.get(field) != value}
    width = max(map(len, fields), default=0)
    lines = []
    for field, value in fields.items():
        changed = defaults.get(field) != value
        note = f"   (default {defaults.get(field)})" if changed else ""
        lines.append(f"{'*' if changed else ' '} {field:{width}} = {value}{note}")
    return "\n".join(lines)
