"""Environments and beliefs by name: a module in the right place is found without being listed anywhere."""

import importlib
import pkgutil
from collections.abc import Iterator


def named(base: type, package: str) -> dict[str, type]:
    """The subclasses of `base` that have a `name` of their own, by that name.

    All modules of the package (its dotted name) are imported first; classes imported from elsewhere count too.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
    return {vars(kind)["name"]: kind for kind in _subclasses(base) if vars(kind).get("name") is not None}


def _subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
