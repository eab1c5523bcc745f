"""What this distribution brings: virtio-blk over PCI."""

from __future__ import annotations

from collections.abc import Iterable

from vm_core.descriptors import DeviceFrontend, Option
from vm_core.devices.virtio.options import PCI_OPTIONS
from vm_core.hookspecs import hookimpl

OPTIONS: tuple[Option, ...] = (
    Option("serial", "str", "serial number the guest sees, up to 20 characters"),
    Option("bootindex", "int", "place in the firmware's boot order; smaller is earlier"),
    Option("logical_block_size", "size", "bytes of a block the guest may address, a power of two, 512 to 2M", 512),
    Option("physical_block_size", "size", "bytes the storage writes at once, a power of two, 512 to 2M", 512),
    Option("min_io_size", "size", "smallest request that is efficient, bytes (0: not told)", 0),
    Option("opt_io_size", "size", "best size of a request, bytes (0: not told)", 0),
    Option("discard_granularity", "size", "bytes that can be discarded at once (default: the logical block)"),
    Option("cyls", "int", "cylinders (default: computed)", 0),
    Option("heads", "int", "heads (default: 16)", 0),
    Option("secs", "int", "sectors of a track (default: 63)", 0),
    Option("num-queues", "int", "request queues (default: one a vCPU)", 0xFFFF),
    Option("seg-max-adjust", "bool", "segments of a request: queue-size - 2 rather than 126", True),
    Option("config-wce", "bool", "let the guest switch the write cache", True),
    Option("write-cache", "enum", "write cache at power-on (auto: as cache= says)", "auto", ("auto", "on", "off")),
    Option("discard", "bool", "offer discard", True),
    Option("write-zeroes", "bool", "offer write-zeroes", True),
    Option("max-discard-sectors", "int", "512-byte sectors of one discard", 4194303),
    Option("max-write-zeroes-sectors", "int", "512-byte sectors of one write-zeroes", 4194303),
    Option("report-discard-granularity", "bool", "tell the guest discard_granularity", True),
    Option("request-merging", "bool", "join neighbouring requests of one batch", True),
)


def _frontend(name: str, summary: str, implementation: str, options: tuple[Option, ...]) -> DeviceFrontend:
    main = name == "virtio-blk-pci"
    return DeviceFrontend(
        name=name,
        summary=summary,
        implementation=f"vm_virtio_blk.pci:{implementation}",
        aliases=("virtio-blk",) if main else (),
        bus="pci",
        interfaces=("virtio",) if main else (),
        media=("disk",),
        options=options,
    )


@hookimpl
def vm_device_frontends() -> Iterable[DeviceFrontend]:
    fixed = tuple(o for o in PCI_OPTIONS if o.name not in ("disable-legacy", "disable-modern"))
    return [
        _frontend("virtio-blk-pci", "virtio block device", "VirtioBlkPci", OPTIONS + PCI_OPTIONS),
        _frontend(
            "virtio-blk-pci-transitional",
            "virtio block device, modern and legacy interface",
            "TransitionalVirtioBlkPci",
            OPTIONS + fixed,
        ),
        _frontend(
            "virtio-blk-pci-non-transitional",
            "virtio block device, modern interface only",
            "ModernVirtioBlkPci",
            OPTIONS + fixed,
        ),
    ]
