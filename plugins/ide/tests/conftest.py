"""A machine without CPU, firmware or threads that has a PIIX3 IDE controller in it."""

from __future__ import annotations

from typing import Any

import pytest

from vm_core.testing.ata import AtaDriver, Tray
from vm_core.testing.backend import MemoryBackend
from vm_core.testing.machine import FakeMachine
from vm_ide.controller import PiixIde
from vm_ide.devices import IdeCdRom, IdeDevice, IdeDisk

#: Command block, control register, first bus master port.
PRIMARY = (0x1F0, 0x3F6, 0xC000)
SECONDARY = (0x170, 0x376, 0xC008)


class Board(FakeMachine):
    """Also the ports of an :class:`~vm_core.testing.ata.AtaDriver`."""

    def __init__(self) -> None:
        super().__init__(8 << 20)
        self.controller = PiixIde("ide", {})
        self.controller.driver = "piix3-ide"
        self.controller.realize(self, self.pci, "1.1")
        self.devices["ide"] = self.controller
        self.map_bars(self.controller)

    def poll(self) -> None:
        self.settle()

    def add(self, device: IdeDevice, bus: int = 0, unit: int | None = None) -> IdeDevice:
        """Plug *device* in as the machine would."""
        device.driver = "ide-cd" if isinstance(device, IdeCdRom) else "ide-hd"
        device.realize(self, self.buses[f"ide.{bus}"], None if unit is None else str(unit))
        self.devices[device.id] = device
        return device

    def add_disk(self, size: int = 1 << 20, bus: int = 0, unit: int | None = None, **options: Any) -> IdeDisk:
        """A disk over memory."""
        given = {name.replace("_cache", "-cache"): value for name, value in options.items()}
        device = IdeDisk(f"disk{len(self.devices)}", given, MemoryBackend(size))  # type: ignore[arg-type]
        assert not given, f"options left over: {given}"
        self.add(device, bus, unit)
        return device

    def add_cdrom(self, size: int = 0, bus: int = 1, unit: int | None = None) -> IdeCdRom:
        """A CD-ROM drive over memory."""
        device = IdeCdRom(f"cd{len(self.devices)}", {}, Tray(size))  # type: ignore[arg-type]
        self.add(device, bus, unit)
        return device

    def driver(self, bus: int = 0, unit: int = 0) -> AtaDriver:
        command, control, busmaster = (PRIMARY, SECONDARY)[bus]
        return AtaDriver(self, unit=unit, command=command, control=control, busmaster=busmaster)


@pytest.fixture
def board() -> Board:
    return Board()
