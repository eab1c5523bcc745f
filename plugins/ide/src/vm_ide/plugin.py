"""What this distribution brings: the PIIX3 IDE controller, ATA disks and ATAPI CD-ROM drives."""

from __future__ import annotations

from collections.abc import Iterable

from vm_core.descriptors import DeviceFrontend, Option
from vm_core.hookspecs import hookimpl

IDENTITY_OPTIONS: tuple[Option, ...] = (
    Option("serial", "str", "serial number, up to 20 ASCII characters (default: QM00001 and so on, by place)"),
    Option("model", "str", "model name, up to 40 ASCII characters (default: QEMU HARDDISK, QEMU DVD-ROM)"),
    Option("ver", "str", "firmware revision, up to 8 ASCII characters", "2.5+"),
    Option("wwn", "int", "world wide name, 64 bits (0: none)", 0),
)

DISK_OPTIONS: tuple[Option, ...] = (
    *IDENTITY_OPTIONS,
    Option("logical_block_size", "size", "bytes of a sector the guest may address: 512 or 4096", 512),
    Option("physical_block_size", "size", "bytes the storage writes at once, a power of two (default: the logical)"),
    Option("rotation_rate", "int", "revolutions a minute; 1: does not rotate, 0: not told", 0),
    Option("cyls", "int", "cylinders of the CHS geometry (default: computed)"),
    Option("heads", "int", "heads, up to 16 (default: 16)"),
    Option("secs", "int", "sectors of a track, up to 255 (default: 63)"),
    Option("write-cache", "enum", "write cache at power-on (auto: as cache= says)", "auto", ("auto", "on", "off")),
)


@hookimpl
def vm_device_frontends() -> Iterable[DeviceFrontend]:
    return [
        DeviceFrontend(
            name="piix3-ide",
            summary="IDE controller of the PIIX3: two channels, bus-master DMA",
            implementation="vm_ide.controller:PiixIde",
            bus="pci",
            provides="ide",
            media=(),
            builtin={"pc": "01.1"},
        ),
        DeviceFrontend(
            name="ide-hd",
            summary="ATA disk: PIO and DMA, LBA48, TRIM, SMART",
            implementation="vm_ide.devices:IdeDisk",
            bus="ide",
            interfaces=("ide",),
            media=("disk",),
            options=DISK_OPTIONS,
        ),
        DeviceFrontend(
            name="ide-cd",
            summary="ATAPI CD-ROM and DVD-ROM drive",
            implementation="vm_ide.devices:IdeCdRom",
            bus="ide",
            interfaces=("ide",),
            media=("cdrom",),
            options=IDENTITY_OPTIONS,
        ),
    ]
