"""The drivers of this process: found fast from the catalogue where that will do, else from the registry.

What only looks drivers up calls :func:`find` and :func:`drivers`. They are answered by what was written down of the
installed plugins (:mod:`vm_core.catalogue`), which costs a program's start a millisecond, not a hundred. Listings,
health and drivers that a program registers itself are the business of :func:`registry`, which loads every plugin.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import catalogue

if TYPE_CHECKING:
    from .descriptors import Descriptor
    from .errors import PluginError
    from .registry import Health as Health
    from .registry import PluginEntry as PluginEntry
    from .registry import PluginRegistry as PluginRegistry

_registry: PluginRegistry | None = None
_making = threading.RLock()


def __getattr__(name: str) -> Any:
    if name in ("Health", "PluginEntry", "PluginRegistry"):
        from . import registry as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find(kind: str, name: str) -> Descriptor:
    """The driver of *kind* called *name*: its name, one of its aliases, or ``dist:name``.

    Raises PluginError that says what to do where it is absent, disabled, broken, of another api or in conflict.
    """
    if _registry is None and (known := _catalogue()) is not None:
        found = known.find(kind, name)
        if found is not None:
            return found
    return registry().find(kind, name)


def drivers(kind: str) -> list[Descriptor]:
    """Every healthy driver of *kind*, by name. Those in conflict are left out."""
    if _registry is None and (known := _catalogue()) is not None:
        return known.all(kind)
    return registry().all(kind)


def _catalogue() -> catalogue.Catalogue | None:
    """The catalogue, if it says what the registry would say."""
    return None if strict() else catalogue.current()


def registry() -> PluginRegistry:
    """The process's registry, filled on first use. Raises PluginError for ill health under ``VM_STRICT_PLUGINS``."""
    global _registry
    if _registry is None:
        with _making:
            if _registry is None:
                from .registry import PluginRegistry

                made = PluginRegistry()
                made.discover()
                if strict():
                    made.verify()
                    made.require_health()
                _registry = made
                catalogue.write(made)
    return _registry


def strict(environ: Mapping[str, str] | None = None) -> bool:
    """``VM_STRICT_PLUGINS`` is set (to anything but nothing, 0, off and no)."""
    value = (os.environ if environ is None else environ).get("VM_STRICT_PLUGINS", "")
    return value.lower() not in ("", "0", "off", "no")


def register(plugin: object, distribution: str = "", version: str = "") -> None:
    """Add *plugin* to the process's registry: see :meth:`PluginRegistry.register`."""
    registry().register(plugin, distribution, version)


def forget() -> None:
    """Drop the process's registry: the next use discovers anew (after an install, or in tests)."""
    global _registry
    _registry = None
    catalogue.forget()


def implementation_error(kind: str, name: str, error: BaseException) -> PluginError:
    """What to tell the user when the implementation of a driver cannot be imported."""
    from .errors import PluginError
    from .registry import one_line, remedy

    distribution = registry().distribution(kind, name)
    mending = remedy(distribution, error) if distribution else "reinstall the plugin"
    of = f" of {distribution}" if distribution else ""
    return PluginError(f"{kind} {name!r}{of} is broken: {one_line(error)}; {mending}")
