"""``-drive``, ``-hda``, ``-cdrom``, … as data: which image, opened how, on which interface and at which place.

Everything here is text and tables; :mod:`.assemble` opens the images.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import attrs

from ..descriptors import Option
from ..errors import UsageError
from ..options import nest, parse_bool, split, suggest, typed
from .arguments import CommandLine

#: Options of ``-drive`` itself; others belong to the format or protocol driver (dotted: ``file.locking=off``).
DRIVE_OPTIONS: tuple[Option, ...] = (
    Option("file", "str", "the image: a path, a URI, json:{…}, or driver options"),
    Option("if", "str", "the interface it is connected to, or none", "ide"),
    Option("format", "str", "the image's format (default: found by probing)"),
    Option("id", "str", "name of the drive, for -device …,drive=ID and the monitor"),
    Option("index", "int", "place among the drives of the interface"),
    Option("bus", "int", "number of the controller's bus"),
    Option("unit", "int", "number on that bus"),
    Option("media", "enum", "what the guest sees", "disk", ("disk", "cdrom")),
    Option(
        "cache",
        "enum",
        "what a write's acknowledgement means",
        "writeback",
        ("none", "writeback", "writethrough", "directsync", "unsafe"),
    ),
    Option("cache.writeback", "bool", "the guest sees a volatile write cache"),
    Option("cache.direct", "bool", "bypass the host's page cache (O_DIRECT)"),
    Option("cache.no-flush", "bool", "ignore flushes"),
    Option("aio", "str", "host-I/O engine", "threads"),
    Option("snapshot", "bool", "write to a temporary file in place of the image"),
    Option("readonly", "bool", "open the image read-only (also: read-only)"),
    Option("rerror", "enum", "what a read error does", "report", ("report", "ignore", "stop")),
    Option("werror", "enum", "what a write error does", "enospc", ("enospc", "report", "ignore", "stop")),
    Option("discard", "enum", "what a discard does", "ignore", ("ignore", "off", "unmap", "on")),
    Option("detect-zeroes", "enum", "writes of zeroes become zeroings", "off", ("off", "on", "unmap")),
    Option("serial", "str", "serial number that the guest sees"),
)

#: Options of QEMU's -drive that are not here, and why.
_ELSEWHERE = {
    "copy-on-read": "there is no copy-on-read",
    "group": "there is no throttling",
    "bps": "there is no throttling",
    "iops": "there is no throttling",
    "throttling": "there is no throttling",
    "cyls": "geometry is computed by the device",
    "heads": "geometry is computed by the device",
    "secs": "geometry is computed by the device",
    "trans": "geometry is computed by the device",
    "addr": "give addr= to the -device",
}

#: Drives on one bus of an interface: where ``index`` is cut into bus and unit.
UNITS = {"ide": 2, "floppy": 2, "scsi": 7}


@attrs.define
class DriveSpec:
    """One drive as it was asked for. *spelled* begins messages: ``-hda x.img``."""

    spelled: str
    file: str | None = None
    interface: str = "ide"
    format: str | None = None
    id: str = ""
    index: int | None = None
    bus: int | None = None
    unit: int | None = None
    media: str = "disk"
    cache: str = "writeback"
    cache_switches: dict[str, bool] = attrs.field(factory=dict)
    aio: str = "threads"
    snapshot: bool = False
    readonly: bool = False
    rerror: str = "report"
    werror: str = "enospc"
    discard: str = "ignore"
    detect_zeroes: str = "off"
    serial: str | None = None
    #: Options for the block drivers, nested.
    driver_options: dict[str, Any] = attrs.field(factory=dict)


_SHORT = {
    "hda": ("ide", 0, "disk"),
    "hdb": ("ide", 1, "disk"),
    "hdc": ("ide", 2, "disk"),
    "hdd": ("ide", 3, "disk"),
    "cdrom": ("ide", 2, "cdrom"),
    "fda": ("floppy", 0, "disk"),
    "fdb": ("floppy", 1, "disk"),
}


def drive_specs(line: CommandLine) -> list[DriveSpec]:
    """The drives of a command line, each with its index, bus, unit and id settled."""
    specs: list[DriveSpec] = []
    for given in line.all("drive", *_SHORT):
        if given.name == "drive":
            specs.append(parse_drive(given.value))
        else:
            interface, index, media = _SHORT[given.name]
            spelled = given.value if given.spelled == given.value else f"{given.spelled} {given.value}"
            specs.append(DriveSpec(spelled, file=given.value, interface=interface, index=index, media=media))
    if "snapshot" in line:
        for spec in specs:
            spec.snapshot = True
    _place(specs)
    return specs


def parse_drive(text: str) -> DriveSpec:
    """The value of one ``-drive``."""
    where = f"-drive {text}"
    own = {option.name: option for option in DRIVE_OPTIONS}
    mine: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in split(text).items():
        if name == "read-only":
            name = "readonly"
        if name in own:
            mine[name] = value
        elif name.partition(".")[0].partition("_")[0] in _ELSEWHERE:
            reason = _ELSEWHERE[name.partition(".")[0].partition("_")[0]]
            raise UsageError(f"-drive {name}=… is not supported: {reason}")
        else:
            others[name] = value
    values = typed(mine, DRIVE_OPTIONS, where)
    if "driver" in others and "format" not in values:
        values["format"] = others.pop("driver")
    switches = {name.partition(".")[2]: values.pop(name) for name in list(values) if name.startswith("cache.")}
    spec = DriveSpec(
        where,
        interface=values.pop("if", "ide"),
        detect_zeroes=values.pop("detect-zeroes", "off"),
        cache_switches=switches,
        driver_options=nest(others),
        **values,
    )
    spec.discard = {"off": "ignore", "on": "unmap"}.get(spec.discard, spec.discard)
    if spec.index is not None and (spec.bus is not None or spec.unit is not None):
        raise UsageError(f"{where}: give either index= or bus= and unit=")
    if spec.file is None and not spec.driver_options and spec.media != "cdrom" and spec.interface != "none":
        raise UsageError(f"{where}: Device needs media, but drive is empty: file=IMAGE is needed")
    return spec


def check_driver_options(spec: DriveSpec, known: list[str]) -> None:
    """Refuse options that neither ``-drive`` nor the drivers *known* for it understand (undotted names only)."""
    for name in spec.driver_options:
        if name not in known and name not in ("file", "backing", "node-name"):
            names = [*(option.name for option in DRIVE_OPTIONS), *known]
            raise UsageError(f"{spec.spelled}: no option {name!r}{suggest(name, names)}")


def _place(specs: list[DriveSpec]) -> None:
    """Give every drive its index among those of its interface, its bus and unit, and its id, as QEMU does."""
    taken: dict[tuple[str, int], DriveSpec] = {}
    for spec in specs:
        units = UNITS.get(spec.interface)
        if spec.index is None and (spec.bus is not None or spec.unit is not None) and spec.interface != "none":
            bus, unit = spec.bus or 0, spec.unit
            if unit is None:
                unit = next(n for n in count() if (spec.interface, bus * (units or 1) + n) not in taken)
            if units and unit >= units:
                raise UsageError(f"{spec.spelled}: unit {unit} is too big: a {spec.interface} bus has {units}")
            spec.index = bus * units + unit if units else bus + unit
        elif spec.index is None:
            free = (n for n in count() if (spec.interface, n) not in taken and not _reserved(specs, spec, n))
            spec.index = next(free)
        if spec.index < 0:
            raise UsageError(f"{spec.spelled}: index= counts from 0")
        other = taken.get((spec.interface, spec.index))
        if other is not None and spec.interface != "none":
            raise UsageError(
                f"{spec.spelled}: {spec.interface} drive {spec.index} is taken by {other.spelled}: give another index="
            )
        taken[(spec.interface, spec.index)] = spec
        spec.bus, spec.unit = divmod(spec.index, units) if units else (0, spec.index)
        spec.id = spec.id or _default_id(spec)
    ids: dict[str, DriveSpec] = {}
    for spec in specs:
        if ids.setdefault(spec.id, spec) is not spec:
            raise UsageError(f"{spec.spelled}: id={spec.id} is taken by {ids[spec.id].spelled}: give another id=")


def _reserved(specs: list[DriveSpec], spec: DriveSpec, index: int) -> bool:
    """Another drive further along asks for *index* by number."""
    return any(
        other is not spec and other.interface == spec.interface and other.index == index and other.interface != "none"
        for other in specs
    )


def _default_id(spec: DriveSpec) -> str:
    """QEMU's name for a drive without an id: ``ide0-hd0``, ``ide1-cd0``, ``virtio0``, ``none0``."""
    if spec.interface in UNITS and spec.interface != "floppy":
        return f"{spec.interface}{spec.bus}-{'cd' if spec.media == 'cdrom' else 'hd'}{spec.unit}"
    return f"{spec.interface}{spec.index}"


def cache_mode_switches(spec: DriveSpec) -> dict[str, bool]:
    """``cache=`` and the ``cache.…`` switches as direct, no_flush and writethrough."""
    from ..block.cache import CacheMode

    mode = CacheMode.parse(spec.cache)
    switches = {"direct": mode.direct, "no_flush": mode.no_flush, "writethrough": mode.writethrough}
    for name, value in spec.cache_switches.items():
        if name == "writeback":
            switches["writethrough"] = not parse_bool(value)
        else:
            switches[name.replace("-", "_")] = parse_bool(value)
    return switches
