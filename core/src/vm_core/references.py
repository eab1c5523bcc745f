"""References to code by name, ``package.module:attribute``, imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_reference(reference: str) -> Any:
    """Import ``package.module:attribute`` and return the attribute."""
    module, _, attribute = reference.partition(":")
    target: Any = import_module(module)
    for part in attribute.split("."):
        target = getattr(target, part)
    return target


def load_implementation(kind: str, name: str, reference: str) -> Any:
    """The implementation of a driver. Raises PluginError, with the command that mends it, where it is broken."""
    try:
        return load_reference(reference)
    except (ImportError, AttributeError, SyntaxError) as error:
        from .plugins import implementation_error

        raise implementation_error(kind, name, error) from error
