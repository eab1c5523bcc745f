"""What a machine is to be made of, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..chardev import Chardev


@attrs.define
class AccelConfig:
    """One ``-accel``: *name* and the options behind it."""

    name: str
    options: dict[str, str] = attrs.field(factory=dict)


@attrs.define
class DriveConfig:
    """A drive that the board connects: which frontend, is found from *interface* and *media*.

    *index* counts the drives of an interface; on IDE it means bus ``index // 2``, unit ``index % 2``. *options* go to
    the frontend (``serial``, ``bootindex``, …).
    """

    backend: BlockBackend
    interface: str = "ide"
    media: str = "disk"
    index: int = 0
    id: str = ""
    options: dict[str, Any] = attrs.field(factory=dict)


@attrs.define
class DeviceConfig:
    """One ``-device``. *options*: ``id``, ``bus``, ``addr``, ``bootindex`` and the driver's own, without ``drive``."""

    driver: str
    options: dict[str, Any] = attrs.field(factory=dict)
    backend: BlockBackend | None = None


@attrs.define
class BootConfig:
    """``-boot``. *order* and *once* are letters: ``a`` floppy, ``c`` hard disk, ``d`` CD-ROM, ``n`` network."""

    order: str = ""
    #: Order for the first boot only.
    once: str = ""
    #: Show the firmware's boot menu and wait for a key.
    menu: bool = False
    #: Milliseconds that the menu waits.
    splash_time: int | None = None
    #: Milliseconds after which the firmware reboots when nothing was bootable.
    reboot_timeout: int | None = None
    #: Boot from devices with a bootindex and no others.
    strict: bool = False


@attrs.define
class MachineConfig:
    """A whole machine."""

    board: str = "pc"
    name: str = "vm"
    #: Bytes.
    ram: int = 128 << 20
    cpus: int = 1
    #: In order of preference; empty: kvm where it runs at the processor's own speed, else unicorn.
    accelerators: list[AccelConfig] = attrs.field(factory=list)
    #: Firmware image; None: SeaBIOS from the usual places.
    bios: str | None = None
    #: Boot this Linux kernel without firmware.
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    boot: BootConfig = attrs.field(factory=BootConfig)
    #: Serial ports 0x3f8, 0x2f8, 0x3e8, 0x2e8; None: no such port.
    serials: list[Chardev | None] = attrs.field(factory=list)
    drives: list[DriveConfig] = attrs.field(factory=list)
    devices: list[DeviceConfig] = attrs.field(factory=list)
    #: ``utc``, ``localtime``, or a date like ``2026-11-21T16:01:21``.
    rtc_base: str = "utc"
    no_reboot: bool = False
    no_shutdown: bool = False
