"""Discovery of plugins, their health, and the look-up of drivers by name.

Theory of operation. Every distribution with an entry point in the group ``vm_core`` is loaded on first use, each in a
guard of its own: one that cannot be imported, implements hooks that do not exist, returns something that is not a
descriptor or raises is *broken* and listed so, and everything else goes on working. Descriptors of another api version
are *wrong-api*. Two distributions that bring a driver of the same kind and name are both in *conflict*: the plain name
is refused until the user says which one is meant, as ``dist:name``. Nothing is ever silently skipped.

Environment: ``VM_PLUGINS`` (distributions or entry points to load, all others are disabled; what core itself brings is
always loaded), ``VM_DISABLE_PLUGINS`` (those not to load), both separated by commas or blanks, and
``VM_STRICT_PLUGINS=1``, under which any unhealthy plugin is an error at once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import cast

import attrs
import pluggy

from . import hookspecs
from .descriptors import API_VERSION, KINDS, Descriptor
from .distributions import EntryPoint, entry_points, normalize
from .errors import PluginError
from .references import load_reference

#: The distribution whose drivers are part of this package, and the module that describes them.
CORE = "vm-core"
CORE_MODULE = "vm_core.builtin"


class Health(StrEnum):
    """What can be said of a plugin or of one of its drivers."""

    OK = "ok"
    BROKEN = "broken"
    WRONG_API = "wrong-api"
    CONFLICT = "conflict"
    DISABLED = "disabled"


@attrs.frozen
class PluginEntry:
    """One line of a listing: a driver, or with kind ``plugin`` a plugin that could not be asked for its drivers."""

    kind: str
    name: str
    summary: str
    distribution: str
    version: str
    health: Health
    reason: str = ""
    remedy: str = ""


@attrs.define(eq=False)
class _Driver:
    """A descriptor, where it came from, and what is wrong with it."""

    descriptor: Descriptor
    plugin: object
    distribution: str
    version: str
    health: Health = Health.OK
    reason: str = ""
    remedy: str = ""

    @property
    def qualified(self) -> str:
        return f"{self.distribution}:{self.descriptor.name}"

    @property
    def key(self) -> tuple[str, str]:
        return self.descriptor.kind, self.descriptor.name

    def fail(self, health: Health, reason: str, remedy: str) -> None:
        self.health, self.reason, self.remedy = health, reason, remedy

    def entry(self) -> PluginEntry:
        kind, name = self.key
        text = self.descriptor.summary
        return PluginEntry(kind, name, text, self.distribution, self.version, self.health, self.reason, self.remedy)


class PluginRegistry:
    """The drivers that are installed, by kind and name."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._drivers: list[_Driver] = []
        #: Plugins that could not be asked for drivers: broken and disabled ones.
        self._failures: list[PluginEntry] = []

    # Filling

    def discover(self, environ: Mapping[str, str] | None = None, path: Sequence[str] | None = None) -> None:
        """Load every plugin installed along *path* (``sys.path``) that *environ* lets in. Never raises for a plugin."""
        environ = os.environ if environ is None else environ
        allowed = _words(environ["VM_PLUGINS"]) if "VM_PLUGINS" in environ else None
        disabled = _words(environ.get("VM_DISABLE_PLUGINS", ""))
        points = entry_points(hookspecs.PROJECT, path)
        if not any(point.value == CORE_MODULE for point in points):  # run from a source tree that is not installed
            points.append(EntryPoint("core", CORE_MODULE, CORE, ""))
        points.sort(key=lambda point: (point.value != CORE_MODULE, normalize(point.distribution), point.name))
        unseen = set(allowed or ())
        for point in points:
            names = {normalize(point.distribution), normalize(point.name)}
            unseen -= names
            if names & disabled:
                self._disable(point, "VM_DISABLE_PLUGINS names it", "take it out of VM_DISABLE_PLUGINS")
            elif allowed is not None and point.value != CORE_MODULE and not names & allowed:
                self._disable(point, "VM_PLUGINS does not name it", f"add {point.distribution} to VM_PLUGINS")
            else:
                self._load(point)
        for word in sorted(unseen):
            reason, remedy = "VM_PLUGINS names it and it is not installed", f"pip install {word}"
            self._failures.append(PluginEntry("plugin", word, "", word, "", Health.BROKEN, reason, remedy))
        self._find_conflicts()

    def register(self, plugin: object, distribution: str = "", version: str = "") -> None:
        """Add the drivers of *plugin*: a module or object with hook implementations. For tests and embedding programs.

        Raises PluginError where it is broken or of another api; a conflict is found when the name is used.
        """
        name = str(getattr(plugin, "__name__", type(plugin).__name__))
        try:
            drivers = self._ask(plugin, distribution or name, version)
        except Exception as error:
            raise PluginError(f"plugin {name} is broken: {one_line(error)}") from error
        for driver in drivers:
            if driver.health is not Health.OK:
                kind, word = driver.key
                self._manager.unregister(plugin)
                raise PluginError(f"plugin {name}, {kind} {word!r}: {driver.reason}; {driver.remedy}")
        self._drivers += drivers
        self._find_conflicts()

    def unregister(self, plugin: object) -> None:
        """Take out what :meth:`register` added."""
        self._manager.unregister(plugin)
        self._drivers = [driver for driver in self._drivers if driver.plugin is not plugin]
        self._find_conflicts()

    def _disable(self, point: EntryPoint, reason: str, remedy: str) -> None:
        self._fail(point, Health.DISABLED, reason, remedy)

    def _fail(self, point: EntryPoint, health: Health, reason: str, remedy: str) -> None:
        self._failures.append(
            PluginEntry("plugin", point.name, "", point.distribution, point.version, health, reason, remedy)
        )

    def _load(self, point: EntryPoint) -> None:
        """Import the plugin that *point* names and take its drivers in, whatever it does to us."""
        try:
            module = load_reference(point.value) if ":" in point.value else importlib.import_module(point.value)
            drivers = self._ask(module, point.distribution, point.version)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a plugin must not end the program
            self._fail(point, Health.BROKEN, one_line(error), remedy(point.distribution, error))
        else:
            self._drivers += drivers

    def _ask(self, plugin: object, distribution: str, version: str) -> list[_Driver]:
        """Register *plugin* with pluggy and call its hooks one by one. Raises whatever it raises."""
        manager = self._manager
        try:
            manager.register(plugin)
            drivers: list[_Driver] = []
            hooks = manager.get_hookcallers(plugin) or []
            if not hooks:
                raise PluginError(f"it implements none of the hooks {', '.join(hook for _, hook in KINDS.values())}")
            for hook in hooks:
                kind = next((kind for kind, (_, name) in KINDS.items() if name == hook.name), None)
                if kind is None:
                    raise PluginError(_not_found("hook", hook.name, [name for _, name in KINDS.values()]))
                for implementation in hook.get_hookimpls():
                    if implementation.plugin is plugin:
                        found: list[object] = list(cast(Iterable[object], implementation.function()))
                        drivers += [_check(kind, each, plugin, distribution, version) for each in found]
        except BaseException:
            if manager.is_registered(plugin):
                manager.unregister(plugin)
            raise
        first: dict[tuple[str, str], _Driver] = {}
        for driver in drivers:
            if first.setdefault(driver.key, driver) is not driver and driver.health is Health.OK:
                driver.fail(Health.BROKEN, "the plugin describes it twice", _reinstall(distribution))
        return drivers

    def _find_conflicts(self) -> None:
        """Mark every driver whose kind and name another distribution brings too."""
        groups: dict[tuple[str, str], list[_Driver]] = {}
        for driver in self._drivers:
            if driver.health is Health.CONFLICT:
                driver.fail(Health.OK, "", "")
            if driver.health is Health.OK:
                groups.setdefault(driver.key, []).append(driver)
        for group in groups.values():
            for driver in group if len(group) > 1 else ():
                others = [other for other in group if other is not driver]
                driver.fail(
                    Health.CONFLICT,
                    f"{' and '.join(other.distribution for other in others)} brings a {driver.key[0]} of this name too",
                    f"write {driver.qualified} to use this one, or pip uninstall {others[0].distribution}",
                )

    # Asking

    def find(self, kind: str, name: str) -> Descriptor:
        """The driver of *kind* called *name*: its name, one of its aliases, or ``dist:name``.

        Raises PluginError that says what to do where it is absent, disabled, broken, of another api or in conflict.
        """
        drivers = [driver for driver in self._drivers if driver.descriptor.kind == kind]
        distribution, colon, plain = name.partition(":")
        if colon:
            wanted = normalize(distribution)
            drivers = [driver for driver in drivers if normalize(driver.distribution) == wanted]
        else:
            plain = name
        matches = [driver for driver in drivers if driver.descriptor.name == plain] or [
            driver for driver in drivers if plain in driver.descriptor.aliases
        ]
        healthy = [driver for driver in matches if driver.health in (Health.OK, Health.CONFLICT)]
        if len(healthy) == 1:
            return healthy[0].descriptor
        if healthy:
            both = " and ".join(sorted(driver.distribution for driver in healthy))
            choices = " or ".join(sorted(driver.qualified for driver in healthy))
            raise PluginError(f"{kind} {name!r} is brought by {both}: write {choices}")
        if matches:
            bad = matches[0]
            raise PluginError(f"{kind} {name!r} of {bad.distribution} is {bad.health}: {bad.reason}; {bad.remedy}")
        raise self._absent(kind, name)

    def all(self, kind: str) -> list[Descriptor]:
        """Every healthy driver of *kind*, by name. Those in conflict are left out."""
        found = [d.descriptor for d in self._drivers if d.descriptor.kind == kind and d.health is Health.OK]
        return sorted(found, key=lambda descriptor: descriptor.name)

    def entries(self) -> list[PluginEntry]:
        """All there is to list, healthy or not, by kind and name."""
        order = [*KINDS, "plugin"]
        found = [driver.entry() for driver in self._drivers] + self._failures
        return sorted(found, key=lambda entry: (order.index(entry.kind), entry.name, entry.distribution))

    def described(self, kind: str) -> list[tuple[Descriptor, PluginEntry]]:
        """Every driver of *kind* that was described, healthy or not, with its line of the listing."""
        return [(d.descriptor, d.entry()) for d in self._drivers if d.descriptor.kind == kind]

    def distribution(self, kind: str, name: str) -> str:
        """The distribution that brought the driver of *kind* called *name*; empty where none is registered."""
        return next((driver.distribution for driver in self._drivers if driver.key == (kind, name)), "")

    def healthy(self) -> list[tuple[Descriptor, str, object]]:
        """Every healthy driver with its distribution and the plugin that described it."""
        return [(d.descriptor, d.distribution, d.plugin) for d in self._drivers if d.health is Health.OK]

    def verify(self) -> None:
        """Import every implementation, so that one which cannot be imported is listed as broken now."""
        for driver in self._drivers:
            if driver.health in (Health.OK, Health.CONFLICT):
                try:
                    load_reference(driver.descriptor.implementation)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:
                    driver.fail(Health.BROKEN, one_line(error), remedy(driver.distribution, error))
        self._find_conflicts()

    def require_health(self) -> None:
        """Raise PluginError naming the first unhealthy plugin (``VM_STRICT_PLUGINS``)."""
        bad = [e for e in self.entries() if e.health in (Health.BROKEN, Health.WRONG_API, Health.CONFLICT)]
        if bad:
            first, more = bad[0], f" (and {len(bad) - 1} more: vm --list-plugins)" if len(bad) > 1 else ""
            raise PluginError(
                f"VM_STRICT_PLUGINS is set and {first.kind} {first.name!r} of {first.distribution} is "
                f"{first.health}: {first.reason}; {first.remedy}{more}"
            )

    def _absent(self, kind: str, name: str) -> PluginError:
        """No driver answers to *name*: say what brings it, or what there is."""
        from .known_drivers import KNOWN_DRIVERS

        known = KNOWN_DRIVERS.get(kind, {}).get(name)
        if ":" in name:
            distribution, _, plain = name.partition(":")
            # Only a distribution that is known of, or that is no close word of a driver, can be meant here.
            known = distribution if KNOWN_DRIVERS.get(kind, {}).get(plain) == distribution else None
        for failure in self._failures:
            if known and normalize(failure.distribution) == normalize(known):
                return PluginError(
                    f"{kind} {name!r} needs the plugin {failure.distribution}, which is {failure.health}: "
                    f"{failure.reason}; {failure.remedy}"
                )
        if known:
            return PluginError(f"{kind} {name!r} is not installed: pip install {known}")
        text = _not_found(kind, name, [descriptor.name for descriptor in self.all(kind)])
        broken = sorted({failure.distribution for failure in self._failures if failure.health is Health.BROKEN})
        if broken:
            text += f" (broken: {', '.join(broken)}; see vm --list-plugins)"
        return PluginError(text)


def _check(kind: str, found: object, plugin: object, distribution: str, version: str) -> _Driver:
    """A driver of what a hook returned. Raises PluginError for what is no descriptor of the hook's kind."""
    expected = KINDS[kind][0]
    if not isinstance(found, expected):
        raise PluginError(f"{KINDS[kind][1]} returned {type(found).__name__}, not {expected.__name__}")
    driver = _Driver(found, plugin, distribution, version)
    if found.api != API_VERSION:
        newer = found.api > API_VERSION
        driver.fail(
            Health.WRONG_API,
            f"it is made for plugin api {found.api}, this vm-core has {API_VERSION}",
            f"pip install --upgrade {CORE if newer else distribution}",
        )
    return driver


def _not_found(what: str, name: str, known: Iterable[str]) -> str:
    from .options import suggest

    return f"no {what} {name!r}{suggest(name, known)}"


def _words(text: str) -> set[str]:
    return {normalize(word) for word in text.replace(",", " ").split()}


def one_line(error: BaseException) -> str:
    """The error as part of a sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, PluginError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _reinstall(distribution: str) -> str:
    return f"pip install --force-reinstall {distribution}"


def remedy(distribution: str, error: BaseException) -> str:
    """The command that mends *distribution*: what it requires and lacks, else itself again."""
    if isinstance(error, ImportError):
        missing = _missing_requirements(distribution)
        if missing:
            return f"pip install {' '.join(missing)}"
    return _reinstall(distribution) if distribution != CORE else f"pip install --force-reinstall {CORE}"


def _missing_requirements(distribution: str) -> list[str]:
    """Requirements of *distribution* (PEP 508, quoted for a shell) of which no version is installed."""
    import importlib.metadata
    import re
    import shlex

    try:
        requirements = importlib.metadata.requires(distribution) or []
    except Exception:
        return []
    missing = []
    for requirement in requirements:
        specifier, _, marker = requirement.partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", specifier)
        if match is None or marker.strip():  # extras and other platforms
            continue
        try:
            importlib.metadata.version(match.group())
        except importlib.metadata.PackageNotFoundError:
            missing.append(shlex.quote(specifier.strip()))
        except Exception:
            continue
    return missing
