"""What the installed plugins said of themselves, written down so that the next program need not ask them.

Asking costs: attrs, pluggy and every plugin's module are imported, about a hundred milliseconds of CPU, a hundred times
what the look-up of one driver is worth. So the descriptors of the healthy drivers are kept in a file of plain data in
the user's cache directory, together with all that they depend on: the interpreter, ``sys.path``, the modification
times of its directories (an install or uninstall changes one) and of the modules that describe drivers. Where anything
differs, the file is ignored and written anew.

The file is taken only if it belongs to this user and nobody else may write it. ``VM_PLUGIN_CACHE`` names another
directory for it, or switches it off (``off``). Under ``VM_PLUGINS`` and ``VM_DISABLE_PLUGINS`` plugins are asked.
"""

from __future__ import annotations

import marshal
import os
import sys
from types import SimpleNamespace
from zlib import crc32

from .references import load_implementation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .descriptors import Descriptor
    from .registry import PluginRegistry

    Entry = tuple[str, str, str, tuple[str, ...], dict[str, Any]]

#: Changes with the shape of the file.
LAYOUT = 1
#: A larger file is not ours.
MAX_LENGTH = 16 << 20

_OFF = ("off", "0", "no")


class Card(SimpleNamespace):
    """A descriptor read back: the same attributes, made without attrs."""

    kind: str
    name: str
    implementation: str

    def load(self) -> Any:
        """Import and return the implementation. Raises PluginError where it cannot be imported."""
        return load_implementation(self.kind, self.name, self.implementation)


class Catalogue:
    """The healthy drivers, by kind and name."""

    def __init__(self, entries: list[Entry]) -> None:
        """*entries*: kind, name, distribution, aliases and fields of each driver, by name."""
        self._entries = entries
        self._made: dict[tuple[str, str], Any] = {}

    def find(self, kind: str, name: str) -> Descriptor | None:
        """The one driver that answers to *name*; None where the registry should say what is the matter."""
        entries = [entry for entry in self._entries if entry[0] == kind]
        found = [entry for entry in entries if entry[1] == name] or [entry for entry in entries if name in entry[3]]
        return self._card(found[0]) if len(found) == 1 else None

    def all(self, kind: str) -> list[Descriptor]:
        """Every driver of *kind*, by name."""
        return [self._card(entry) for entry in self._entries if entry[0] == kind]

    def _card(self, entry: Entry) -> Descriptor:
        kind, name, _, _, fields = entry
        made: Any = self._made.get((kind, name))
        if made is None:
            made = Card(kind=kind, **{key: _thaw(value) for key, value in fields.items()})
            self._made[kind, name] = made
        found: Descriptor = made
        return found


_current: Catalogue | None = None
_missing = False


def current() -> Catalogue | None:
    """The catalogue of what is installed now; None where there is none (yet) that holds."""
    global _current, _missing
    if _current is None and not _missing:
        _current = _read()
        _missing = _current is None
    return _current


def forget() -> None:
    """Look at the file again when it is next wanted."""
    global _current, _missing
    _current, _missing = None, False


def write(registry: PluginRegistry) -> None:
    """Write down what *registry* found. Never fails: without the file the next start is slower, that is all."""
    path = _path()
    if path is None:
        return
    try:
        entries = []
        plugins: set[str] = set()
        for descriptor, distribution, plugin in registry.healthy():
            name = getattr(plugin, "__name__", None)
            if not isinstance(name, str) or sys.modules.get(name) is not plugin:
                return  # a program's own object, which no file describes
            plugins.add(name)
            fields = {key: _freeze(value) for key, value in _fields(descriptor).items()}
            entries.append((descriptor.kind, descriptor.name, distribution, descriptor.aliases, fields))
        entries.sort(key=lambda entry: entry[:3])
        data = marshal.dumps((_stamp(_sources(plugins)), entries))
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, ValueError, TypeError):
        return


def _read() -> Catalogue | None:
    path = _path()
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not _trusted(status) or status.st_size > MAX_LENGTH:
                return None
            stamp, entries = marshal.loads(file.read())
        if stamp == _stamp(stamp[-1]):
            return Catalogue(entries)
    except (OSError, ValueError, TypeError, EOFError, LookupError):
        pass
    return None


def _trusted(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _path() -> str | None:
    """Where the file for this interpreter and ``sys.path`` lies; None where it is not to be used."""
    environ = os.environ
    if "VM_PLUGINS" in environ or environ.get("VM_DISABLE_PLUGINS"):
        return None
    directory = environ.get("VM_PLUGIN_CACHE", "")
    if directory in _OFF:
        return None
    if not directory:
        if os.name == "nt":
            base = environ.get("LOCALAPPDATA", "")
        elif sys.platform == "darwin":
            base = os.path.expanduser("~/Library/Caches")
        else:
            base = environ.get("XDG_CACHE_HOME", "") or os.path.expanduser("~/.cache")
        if not os.path.isabs(base):
            return None
        directory = os.path.join(base, "vm-core")
    mark = crc32(repr((sys.version, sys.prefix, sys.path)).encode("utf-8", "surrogateescape"))
    return os.path.join(directory, f"plugins-{mark:08x}")


def _sources(plugins: set[str]) -> list[str]:
    """Files that the descriptions came from: the plugins' modules, what their packages imported for it, and ours."""
    packages = {name.partition(".")[0] for name in plugins} - {"vm_core"}
    ours = {"vm_core.builtin", "vm_core.descriptors", "vm_core.registry", "vm_core.catalogue"}
    names = [name for name in sys.modules if name in plugins | ours or name.partition(".")[0] in packages]
    files = {getattr(sys.modules[name], "__file__", None) for name in names}
    return sorted(file for file in files if isinstance(file, str))


def _stamp(sources: list[str]) -> tuple[Any, ...]:
    """All that the descriptions depend on, as it is now."""
    return LAYOUT, sys.version, sys.prefix, sys.path[:], _times(sys.path), _times(sources), sources


def _times(paths: list[str]) -> list[tuple[int, int]]:
    found = []
    for path in paths:
        try:
            status = os.stat(path or os.curdir)
        except OSError:
            found.append((-1, -1))
        else:
            # The size of a directory says nothing that its time does not.
            found.append((status.st_mtime_ns, -1 if status.st_mode & 0o170000 == 0o040000 else status.st_size))
    return found


def _fields(record: Any) -> dict[str, Any]:
    import attrs

    return {field.name: getattr(record, field.name) for field in attrs.fields(type(record))}


def _freeze(value: Any) -> Any:
    """*value* as plain data: records become ``("@", {…})``."""
    import attrs

    if attrs.has(type(value)):
        return "@", {key: _freeze(inner) for key, inner in _fields(value).items()}
    if isinstance(value, (tuple, list)):
        return tuple([_freeze(inner) for inner in value])
    if isinstance(value, dict):
        return {key: _freeze(inner) for key, inner in value.items()}
    return value


def _thaw(value: Any) -> Any:
    if type(value) is tuple:
        if len(value) == 2 and value[0] == "@" and type(value[1]) is dict:
            return SimpleNamespace(**{key: _thaw(inner) for key, inner in value[1].items()})
        return tuple([_thaw(inner) for inner in value])
    return value
