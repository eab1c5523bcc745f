"""What a plugin tells about itself: frozen records, cheap to make, with the implementation imported only when used.

Each hook in :mod:`vm_core.hookspecs` returns descriptors of one kind. Listings, ``-device NAME,help``, ``-o help`` and
shell completion are made from them alone, so loading every plugin imports no implementation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import attrs

from .references import load_implementation

#: The version of the contracts in this module, in the hook specifications and in the base classes they name. A
#: descriptor of another version is listed as ``wrong-api`` and never used.
API_VERSION = 1

OptionType = Literal["str", "int", "size", "bool", "enum", "node"]


@attrs.frozen
class Option:
    """One ``name=value`` of a driver or device.

    ``size`` takes QEMU's suffixes (k, M, G, T, P, E; bytes without one), ``bool`` takes on/off (yes/no, true/false),
    ``enum`` one of *choices*, ``node`` the name or inline definition of another block node.
    """

    name: str
    type: OptionType
    help: str
    default: str | int | bool | None = None
    choices: tuple[str, ...] = ()
    required: bool = False
    #: An open option that makes the image another one: it belongs to the image's ``json:`` name.
    defining: bool = False
    #: A create option that the program which made the format does not have: nor has one that stands in for it.
    ours: bool = False


@attrs.frozen
class Signature:
    """Bytes that identify a format: *magic* at *offset* (bytes from the start; negative: from the end of the file)."""

    offset: int
    magic: bytes
    score: int = 100


def _words(words: Iterable[str]) -> frozenset[str]:
    return frozenset(words)


@attrs.frozen(kw_only=True)
class Descriptor:
    """The part common to every kind.

    *implementation* is ``package.module:attribute``; :meth:`load` imports it. *capabilities* are free words that the
    kind defines (for formats: ``write``, ``create``, ``backing``, ``snapshots``, …).
    """

    kind = "plugin"

    name: str
    summary: str
    implementation: str
    api: int = API_VERSION
    options: tuple[Option, ...] = ()
    aliases: tuple[str, ...] = ()
    capabilities: frozenset[str] = attrs.field(default=frozenset(), converter=_words)

    def load(self) -> Any:
        """Import and return the implementation named by this descriptor.

        Raises PluginError, with the command that mends it, where it cannot be imported.
        """
        return load_implementation(self.kind, self.name, self.implementation)


@attrs.frozen(kw_only=True)
class FormatDriver(Descriptor):
    """An image format or a filter. The implementation is a :class:`vm_core.block.format.Format` subclass.

    Probing reads the first 64 KiB of the file: the highest score of all matching *signatures* wins; a format whose
    recognition needs more names a function ``probe(head: bytes, size: int, filename: str) -> int`` (0: not ours).
    """

    kind = "format"

    signatures: tuple[Signature, ...] = ()
    probe: str | None = None
    extensions: tuple[str, ...] = ()
    #: In the order, and with the defaults, that the program which made the format tells them in: ``vm-img create``
    #: prints them so.
    create_options: tuple[Option, ...] = ()
    #: What ``amend -o`` may change.
    amend_options: tuple[Option, ...] = ()


@attrs.frozen(kw_only=True)
class ProtocolDriver(Descriptor):
    """Host storage. The implementation is a :class:`vm_core.block.node.Protocol` subclass.

    *prefixes* are the scheme words that name it in a file name (``nbd`` for ``nbd:…`` and ``nbd://…``); one with the
    capability ``local`` is tried for plain paths, where ``claims`` of the implementation decides.
    """

    kind = "protocol"

    prefixes: tuple[str, ...] = ()
    #: What may be given besides the format's own options when an image is made there.
    create_options: tuple[Option, ...] = ()


@attrs.frozen(kw_only=True)
class BlockEngine(Descriptor):
    """A host-I/O engine under a backend (``aio=``). The implementation is a :class:`vm_core.block.engine.Engine`."""

    kind = "engine"


@attrs.frozen(kw_only=True)
class DeviceFrontend(Descriptor):
    """A device model. The implementation is a :class:`vm_core.devices.device.Device` subclass.

    *bus* is the type of bus it plugs into (``pci``, ``isa``, ``ide``, ``scsi``, …); *provides* the type of the buses it
    offers. *interfaces* are the ``-drive if=`` words it serves, *media* the kinds it takes (``disk``, ``cdrom``).
    *builtin* maps a board (``pc``) to the address at which that board carries it (``01.1``).
    """

    kind = "device"

    bus: str = "pci"
    provides: str | None = None
    interfaces: tuple[str, ...] = ()
    media: tuple[str, ...] = ("disk",)
    builtin: dict[str, str] = attrs.field(factory=dict, hash=False)


@attrs.frozen(kw_only=True)
class AcceleratorDriver(Descriptor):
    """What runs guest instructions. The implementation is a :class:`vm_core.machine.accel.Accelerator` subclass."""

    kind = "accelerator"


@attrs.frozen(kw_only=True)
class ExportDriver(Descriptor):
    """Something that serves a node to others (NBD, FUSE, vhost-user). The implementation is chosen by the export."""

    kind = "export"


#: Every kind in the order in which listings show them, with its hook's name.
KINDS: dict[str, tuple[type[Descriptor], str]] = {
    "device": (DeviceFrontend, "vm_device_frontends"),
    "engine": (BlockEngine, "vm_block_engines"),
    "format": (FormatDriver, "vm_format_drivers"),
    "protocol": (ProtocolDriver, "vm_protocol_drivers"),
    "accelerator": (AcceleratorDriver, "vm_accelerators"),
    "export": (ExportDriver, "vm_exports"),
}
