"""Environments and beliefs by name: a module in the right place is found without being listed anywhere."""

import ast
import functools
import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvrl_jax.errors import DiscoveryError

ASSETS = "ENVPOOL_ASSETS_PATH"  # The environment variable that tells EnvPool where its files are.


def named(base: type, package: str) -> dict[str, type]:
    """The subclasses of `base` that have a `name` of their own, by that name.

    All modules of the package (its dotted name) are imported first; classes imported from elsewhere count too. Of a
    class that was defined again in the same module, as in a notebook, the latest counts.

    Raises:
        DiscoveryError: a module cannot be imported, two of them use the same name, or a setting is no value that a
            configuration can have.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        try:
            importlib.import_module(f"{package}.{module.name}")
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise DiscoveryError(f"{package}.{module.name}: cannot be imported ({reason})") from error
    found: dict[str, type] = {}
    for kind in _subclasses(base):
        name = vars(kind).get("name")
        if name is None:
            continue
        modules = {kind.__module__, found.get(name, kind).__module__}
        if len(modules) > 1:
            raise DiscoveryError(
                f"{' and '.join(sorted(modules))}: both call a class {name!r}; give one another `name`"
            )
        _check_settings(kind)
        found[name] = kind
    return found


def declared(folder: Path, attribute: str) -> list[Any] | None:
    """What the classes in a folder's modules set `attribute` to, each value as written: read, not imported.

    None if a module cannot be parsed, or a class computes its value, so that only importing tells.
    """
    found = []
    for path in sorted(folder.glob("*.py")):
        try:
            for node in ast.walk(ast.parse(path.read_bytes())):
                for line in node.body if isinstance(node, ast.ClassDef) else ():
                    targets = getattr(line, "targets", [getattr(line, "target", None)])
                    if getattr(targets[0], "id", None) == attribute and line.value is not None:
                        found.append(ast.literal_eval(line.value))
        except (OSError, SyntaxError, ValueError):
            return None
    return found


@functools.cache
def atari_games() -> list[str]:
    """Names of all Atari games that EnvPool can emulate, without their `-v5`, sorted: of its files, not imported.

    Raises:
        DiscoveryError: the user has said where its files are, and there are none.
    """
    specs = [importlib.util.find_spec(package) for package in ("envpool", "envpool_assets")]
    roots = [root for spec in specs if spec for root in spec.submodule_search_locations or ()]
    roots = [given] if (given := os.environ.get(ASSETS)) else roots
    files = next(filter(None, (sorted(Path(root, "atari", "roms").glob("*.bin")) for root in roots)), [])
    if given and not files:
        raise DiscoveryError(f"{ASSETS}={given}: has no games in atari/roms; unset it to have EnvPool's own")
    return sorted("".join(part.capitalize() for part in file.stem.split("_")) for file in files)


def _check_settings(kind: type) -> None:
    for setting, value in getattr(kind, "settings", {}).items():
        if not all(isinstance(part, int | float | str) for part in (value if isinstance(value, tuple) else (value,))):
            said = f"{kind.__module__}: {kind.__name__} has the setting {setting} = {value!r}"
            raise DiscoveryError(f"{said}, which must be a number, a text, a truth value or a tuple of these")


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
