"""Opening what ``-drive``, ``-hda``, ``-cdrom`` and ``-blockdev`` name, and holding it until the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import PluginError, UsageError, VmError
from ..options import parse, parse_bool, suggest
from ..plugins import Health, registry
from .drives import DriveSpec, cache_mode_switches, drive_specs

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..block.gate import Gate
    from ..block.node import Node
    from ..qmp.monitor import Drive
    from .arguments import CommandLine

Warn = Callable[[str], None]


class Images:
    """The drives and block nodes of one command line. :meth:`close` closes all that was opened."""

    def __init__(self, line: CommandLine, warn: Warn) -> None:
        self._warn = warn
        self._trust = tuple(given.value for given in line.all("trust"))
        for directory in self._trust:
            if not os.path.isdir(directory):
                raise UsageError(f"--trust {directory}: there is no such directory")
        self._blockdevs = [given.value for given in line.all("blockdev")]
        self.specs = drive_specs(line)
        #: Drives in the order of the command line, those of -blockdev when a device uses them.
        self.drives: list[Drive] = []
        self._nodes: dict[str, Node] = {}
        self._used: dict[str, str] = {}
        for spec in self.specs:
            check_interface(spec)

    @property
    def gate(self) -> Gate:
        """What images may name."""
        from ..block.gate import Gate

        return Gate.default(*self._trust)

    def open(self) -> None:
        """Open everything. Raises VmError; :meth:`close` is then still to be called."""
        for text in self._blockdevs:
            self._open_blockdev(text)
        for spec in self.specs:
            self._open_drive(spec)

    def _open_drive(self, spec: DriveSpec) -> None:
        from ..block.backend import BlockBackend
        from ..block.cache import CacheMode
        from ..block.file import engine_of
        from ..qmp.monitor import Drive

        registry().find("engine", spec.aio)
        cache = CacheMode(**cache_mode_switches(spec))
        cdrom = spec.media == "cdrom"
        node = self._drive_node(spec, cache) if spec.file or spec.driver_options else None
        try:
            engine = spec.aio if node is None else engine_of(node, spec.aio)
            backend = BlockBackend(
                node,
                name=spec.id,
                cache=cache,
                engine=engine,
                rerror=spec.rerror,
                werror=spec.werror,
                readonly=spec.readonly or cdrom,
                removable=cdrom or spec.interface == "floppy" or node is None,
            )
            if engine != "threads":
                backend.start()
        except BaseException:
            if node is not None:
                node.close()
            raise
        self.drives.append(Drive(spec.id, backend, engine=engine, detect_zeroes=spec.detect_zeroes))

    def _drive_node(self, spec: DriveSpec, cache: Any) -> Node:
        from ..block.open import open_node

        readonly = spec.readonly or spec.media == "cdrom"
        try:
            return open_node(
                _spec(spec),
                readonly=readonly,
                cache=cache,
                format=spec.format,
                gate=self.gate,
                discard=spec.discard == "unmap",
                detect_zeroes=spec.detect_zeroes,
                snapshot=spec.snapshot and spec.media != "cdrom",
                warn=self._warn,
                aio=spec.aio,
            )
        except VmError as error:
            if str(error).startswith(f"{spec.file}: "):
                raise  # the option is plain from the name
            raise type_of(error)(f"{spec.spelled}: {error}") from error

    def _open_blockdev(self, text: str) -> None:
        from ..block.open import open_node

        options = parse(text, "driver")
        name = options.get("node-name")
        if not isinstance(name, str) or not name:
            raise UsageError(f"-blockdev {text}: node-name=NAME is needed")
        if "driver" not in options:
            raise UsageError(f"-blockdev {text}: driver=NAME is needed")
        readonly = parse_bool(options.get("read-only", False), "read-only")
        try:
            # As in QEMU, a node takes no discards unless it is told to.
            options.setdefault("discard", "ignore")
            self._nodes[name] = open_node(options, readonly=readonly, gate=self.gate, warn=self._warn)
        except VmError as error:
            raise type_of(error)(f"-blockdev {name}: {error}") from error

    def backend_of(self, reference: str, where: str) -> Drive:
        """The drive or node called *reference*, for one ``-device …,drive=``. Raises UsageError."""
        if reference in self._used:
            raise UsageError(f"{where}: drive {reference!r} is in use by {self._used[reference]}")
        for spec, drive in zip(self.specs, self.drives, strict=False):
            if spec.id == reference:
                if spec.interface != "none":
                    raise UsageError(f"{where}: drive {reference!r} is connected by if={spec.interface}: add if=none")
                self._used[reference] = where
                return drive
        node = self._nodes.get(reference)
        if node is None:
            names = [spec.id for spec in self.specs if spec.interface == "none"] + list(self._nodes)
            raise UsageError(f"{where}: no drive {reference!r}{suggest(reference, names)}")
        self._used[reference] = where
        drive = self._node_drive(reference, node)
        self.drives.append(drive)
        return drive

    def _node_drive(self, name: str, node: Node) -> Drive:
        from ..block.backend import BlockBackend
        from ..block.file import engine_of
        from ..qmp.monitor import Drive

        engine = engine_of(node)
        backend = BlockBackend(node, readonly=node.readonly, name=name, engine=engine)
        if engine != "threads":
            backend.start()
        del self._nodes[name]  # the backend closes it from now on
        return Drive(name, backend, engine=engine)

    def open_medium(self, filename: str, format: str | None) -> Node:
        """A medium for a CD-ROM drive, as the monitor's change asks for it."""
        from ..block.open import open_node

        return open_node(filename, readonly=True, format=format, gate=self.gate, warn=self._warn)

    def backends(self) -> list[BlockBackend]:
        """The backends of all drives."""
        return [drive.backend for drive in self.drives]

    def close(self) -> None:
        """Close all drives, then the nodes no drive took. Raises the first error after all were tried."""
        first: OSError | VmError | None = None
        for drive in self.drives:
            try:
                drive.backend.close()
            except (OSError, VmError) as error:
                first = first or UsageError(f"{drive.id}: what was written could not be made stable: {error}")
        for node in reversed(list(self._nodes.values())):
            with contextlib.suppress(OSError):
                node.close()
        self._nodes.clear()
        if first is not None:
            raise first


def type_of(error: VmError) -> Callable[[str], VmError]:
    """What to raise in place of *error* with words added: its kind, for those made from one text."""
    return PluginError if isinstance(error, PluginError) else UsageError


def _spec(spec: DriveSpec) -> str | dict[str, Any]:
    """What :func:`~vm_core.block.open.open_node` is given for a drive."""
    if not spec.driver_options:
        assert spec.file is not None
        return spec.file
    from ..block.open import parse_spec

    options = dict(spec.driver_options)
    if spec.file is None:
        return options
    named = parse_spec(spec.file)
    if "file" in options and isinstance(options["file"], dict) and set(named) == {"filename"}:
        return {**options, "file": {**named, **options["file"]}}
    return {**named, **options}


def check_interface(spec: DriveSpec) -> None:
    """Refuse an interface that no installed frontend serves, with what would bring one."""
    if spec.interface == "none":
        return
    frontends = [each for each in registry().all("device") if spec.interface in getattr(each, "interfaces", ())]
    if any(spec.media in getattr(each, "media", ()) for each in frontends):
        return
    served = sorted({word for each in registry().all("device") for word in getattr(each, "interfaces", ())})
    there = f"there is: {', '.join(['none', *served])}"
    if frontends:
        raise UsageError(f"{spec.spelled}: if={spec.interface} takes no media={spec.media}")
    for descriptor, entry in registry().described("device"):
        if spec.interface in getattr(descriptor, "interfaces", ()) and spec.media in getattr(descriptor, "media", ()):
            state, remedy = str(entry.health), entry.remedy
            if entry.health is Health.CONFLICT:
                state, remedy = "in conflict", f"disable one: VM_DISABLE_PLUGINS={entry.distribution}"
            raise PluginError(
                f"{spec.spelled}: if={spec.interface} needs {entry.name!r} of {entry.distribution}, which is "
                f"{state}: {entry.reason}; {remedy}"
            )
    from ..known_drivers import KNOWN_INTERFACES

    known = KNOWN_INTERFACES.get(spec.interface)
    if known is None:
        raise UsageError(f"{spec.spelled}: no interface {spec.interface!r}; {there}")
    for entry in registry().entries():
        if entry.kind == "plugin" and entry.distribution == known:
            raise PluginError(
                f"{spec.spelled}: if={spec.interface} needs the plugin {known}, which is {entry.health}: "
                f"{entry.reason}; {entry.remedy}"
            )
    raise PluginError(f"{spec.spelled}: no frontend for if={spec.interface} is installed: pip install {known}; {there}")
