"""Drives for an IDE bus: their options, and the way from a backend to an ATA drive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.devices.ata import AtaDisk, AtapiCdRom, Drive, Geometry, Identity
from vm_core.devices.device import Device
from vm_core.errors import UsageError

from .bus import IdeBus
from .controller import PiixIde

if TYPE_CHECKING:
    from vm_core.block.backend import BlockBackend
    from vm_core.devices.bus import Bus
    from vm_core.machine.machine import Machine

#: Longest strings of IDENTIFY (ACS-2 7.12.7): option, characters.
_LENGTHS = {"serial": 20, "model": 40, "ver": 8}


def human_size(size: int) -> str:
    """*size* bytes in the largest unit that makes it at least 1."""
    value, units = float(size), ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    unit = units[0]
    for unit in units:
        if value < 1024 or unit == units[-1]:
            break
        value /= 1024
    return f"{value:.4g} {unit}"


class IdeDevice(Device):
    """What disks and CD-ROM drives share."""

    default_model = ""
    drive: Drive
    bus: IdeBus

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        super().__init__(id, options, backend)
        self._texts = {name: options.pop(name, None) for name in _LENGTHS}
        self._wwn = int(options.pop("wwn", 0))

    def _texts_checked(self) -> dict[str, str | None]:
        for name, limit in _LENGTHS.items():
            value = self._texts[name]
            if value is not None and (len(value) > limit or not value.isascii() or not value.isprintable()):
                raise UsageError(f"{self.driver}: {name}={value}: up to {limit} printable ASCII characters are allowed")
        if not 0 <= self._wwn < 1 << 64:
            raise UsageError(f"{self.driver}: wwn={self._wwn:#x}: a world wide name has 64 bits")
        return self._texts

    def _identity(self, bus: IdeBus, unit: int, **more: Any) -> Identity:
        texts = self._texts_checked()
        serial, model, firmware = texts["serial"], texts["model"], texts["ver"]
        number = 2 * int(bus.name.rpartition(".")[2]) + unit + 1
        return Identity(
            serial=f"QM{number:05}" if serial is None else serial,
            model=self.default_model if model is None else model,
            firmware="2.5+" if firmware is None else firmware,
            wwn=self._wwn,
            **more,
        )

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        """Plug into *bus* as unit *address*, ``0`` or ``1``."""
        if not isinstance(bus, IdeBus):
            raise UsageError(f"{self.driver}: bus {bus.name} is no IDE bus")
        backend = self.storage()
        self.machine = machine
        self.bus = bus
        unit = bus.choose(self, address)
        self.drive = self.make_drive(bus, unit, backend)
        bus.attach(self, self.drive, backend)
        machine.attach_backend(backend)
        backend.set_completion_sink(bus.completed)

    def storage(self) -> BlockBackend:
        """The backend; a subclass may do without one."""
        return self.need_backend()

    def make_drive(self, bus: IdeBus, unit: int, backend: BlockBackend) -> Drive:
        """The ATA drive."""
        raise NotImplementedError

    def reset(self) -> None:
        """What was waiting for a retry belongs to the guest before the reset. The controller resets the drive."""
        self.storage().cancel_stopped()

    def unrealize(self) -> None:
        self.bus.detach(self.drive)

    def boot_path(self) -> str | None:
        controller = self.bus.parent
        assert isinstance(controller, PiixIde)
        return controller.drive_path(self.bus, self.drive.unit)


class IdeDisk(IdeDevice):
    """``ide-hd``."""

    default_model = "QEMU HARDDISK"

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        super().__init__(id, options, backend)
        self._logical = int(options.pop("logical_block_size", 512))
        self._physical = int(options.pop("physical_block_size", 0) or self._logical)
        self._rotation_rate = int(options.pop("rotation_rate", 0))
        self._chs = tuple(options.pop(name, None) for name in ("cyls", "heads", "secs"))
        self._write_cache = str(options.pop("write-cache", "auto"))

    def make_drive(self, bus: IdeBus, unit: int, backend: BlockBackend) -> Drive:
        if backend.readonly:
            raise UsageError(f"{self.driver}: an IDE disk cannot be read-only: use snapshot=on or if=virtio")
        if self._logical not in (512, 4096):
            raise UsageError(f"{self.driver}: logical_block_size={self._logical}: 512 and 4096 are supported")
        physical = self._physical
        if physical & (physical - 1) or not self._logical <= physical <= self._logical << 15:
            raise UsageError(
                f"{self.driver}: physical_block_size={physical}: a power of two from {self._logical} to"
                f" {self._logical << 15} is needed"
            )
        rate = self._rotation_rate
        if rate not in (0, 1) and not 1025 <= rate <= 0xFFFE:
            raise UsageError(f"{self.driver}: rotation_rate={rate}: 0, 1, or 1025 to 65534 is needed")
        identity = self._identity(
            bus, unit, logical_block=self._logical, physical_block=self._physical, rotation_rate=rate
        )
        if self._write_cache != "auto":
            backend.write_cache = self._write_cache == "on"
        self._initial_write_cache = backend.write_cache
        return AtaDisk(bus.channel, backend, identity, unit=unit, geometry=self._geometry())

    def _geometry(self) -> Geometry | None:
        if all(value is None for value in self._chs):
            return None
        limits = {"cyls": 65535, "heads": 16, "secs": 255}
        for (name, limit), value in zip(limits.items(), self._chs, strict=True):
            if value is None:
                raise UsageError(f"{self.driver}: cyls, heads and secs go together: {name} is missing")
            if not 1 <= value <= limit:
                raise UsageError(f"{self.driver}: {name}={value}: 1 to {limit} is allowed")
        cylinders, heads, sectors = (int(value) for value in self._chs if value is not None)
        return Geometry(cylinders, heads, sectors)

    def reset(self) -> None:
        super().reset()
        # What the guest chose ends with its power cycle. Nothing is in flight, so switching it off has nothing to wait
        # for but the flush.
        backend = self.need_backend()
        if backend.write_cache != self._initial_write_cache:
            backend.write_cache = self._initial_write_cache

    def describe(self) -> str:
        return f"IDE disk, {human_size(self.need_backend().size)}, {self.bus.name} unit {self.drive.unit}"


class IdeCdRom(IdeDevice):
    """``ide-cd``. Without ``drive=`` it is an empty drive."""

    default_model = "QEMU DVD-ROM"

    def storage(self) -> BlockBackend:
        if self.backend is None:
            from vm_core.block.backend import BlockBackend

            self.backend = BlockBackend(None, name=self.id, readonly=True, removable=True)
        return self.backend

    def make_drive(self, bus: IdeBus, unit: int, backend: BlockBackend) -> Drive:
        drive = AtapiCdRom(bus.channel, backend, self._identity(bus, unit), unit=unit)

        def changed(present: bool) -> None:
            with bus.machine.lock:
                drive.medium_changed(present)

        self._listener = changed
        backend.on_medium_change.append(changed)
        return drive

    def unrealize(self) -> None:
        self.storage().on_medium_change.remove(self._listener)
        super().unrealize()

    def describe(self) -> str:
        size = self.storage().size
        content = human_size(size) if size else "empty"
        return f"IDE CD-ROM, {content}, {self.bus.name} unit {self.drive.unit}"
