"""The IDE function of the PIIX3 (Intel 82371SB datasheet 290550, chapter 2.3 and 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.devices.ata import BusMaster
from vm_core.devices.pci import COMMAND, COMMAND_IO, COMMAND_MASTER, STATUS, PciDevice
from vm_core.errors import UsageError

from .bus import IdeBus

if TYPE_CHECKING:
    from vm_core.block.backend import BlockBackend
    from vm_core.devices.bus import Bus
    from vm_core.machine.machine import Machine
    from vm_core.machine.ports import PortRange

#: Command block, control register and interrupt of the two channels in compatibility mode.
CHANNELS = ((0x1F0, 0x3F6, 14), (0x170, 0x376, 15))

# Configuration registers: timings of the primary and secondary channel (IDE decode enable is bit 15), slave timings.
IDETIM = 0x40
SIDETIM = 0x44

#: The base address register of the bus master ports: 8 bytes for each channel.
BMIDE_BAR = 4
BMIDE_BYTES = 16


class BusMasterPorts:
    """The 16 bus master ports as an I/O handler."""

    def __init__(self, busmasters: tuple[BusMaster, ...]) -> None:
        self.busmasters = busmasters

    def read(self, offset: int, size: int) -> int:
        value = 0
        for i in range(size):
            at = offset + i
            byte = self.busmasters[at >> 3].read(at & 7) if at < BMIDE_BYTES else 0xFF
            value |= byte << 8 * i
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for at in range(offset, min(offset + size, BMIDE_BYTES)):
            self.busmasters[at >> 3].write(at & 7, value & 0xFF)
            value >>= 8


class PiixIde(PciDevice):
    """The controller with its buses ``ide.0`` and ``ide.1``."""

    vendor_id = 0x8086
    device_id = 0x7010
    #: IDE controller in compatibility mode, a bus master.
    class_code = 0x010180

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        super().__init__(id, options, backend)
        if backend is not None:
            raise UsageError("piix3-ide: the controller takes no drive: put ide-hd or ide-cd on its bus")
        self.ide_buses: list[IdeBus] = []
        self._ports: list[PortRange] = []

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        if any(name in machine.buses for name in ("ide.0", "ide.1")):
            raise UsageError("piix3-ide: the machine has a controller at the legacy IDE ports already")
        super().realize(machine, bus, address)
        # No memory windows, no interrupt pin: the channels have the lines 14 and 15.
        self.config_writable[COMMAND : COMMAND + 2] = (COMMAND_IO | COMMAND_MASTER).to_bytes(2, "little")
        self.set16(STATUS, 0x0280)  # medium DEVSEL timing, fast back-to-back
        self.config_writable[IDETIM : IDETIM + 4] = b"\xff\xf3\xff\xf3"
        self.config_writable[SIDETIM] = 0xFF
        for number, (command, control, irq) in enumerate(CHANNELS):
            ide = IdeBus(f"ide.{number}", self, machine, irq, BusMaster(self))
            self.ide_buses.append(ide)
            machine.add_bus(ide)
            try:
                self._ports.append(machine.ports.add(command, 8, ide.channel))
                self._ports.append(machine.ports.add(control, 1, ide.channel.control))
            except ValueError as error:
                raise UsageError(f"piix3-ide: {error}") from error
        self.add_bar(BMIDE_BAR, BMIDE_BYTES, BusMasterPorts(tuple(ide.busmaster for ide in self.ide_buses)), io=True)

    def reset(self) -> None:
        super().reset()
        self.config[IDETIM : SIDETIM + 1] = bytes(SIDETIM + 1 - IDETIM)
        for ide in self.ide_buses:
            ide.channel.power_on()

    def unrealize(self) -> None:
        for ports in self._ports:
            self.machine.ports.remove(ports)
        for ide in self.ide_buses:
            self.machine.buses.pop(ide.name, None)
        super().unrealize()

    def boot_path(self) -> str | None:
        """Its drives can be booted from, not the controller."""
        return None

    def drive_path(self, ide: IdeBus, unit: int) -> str:
        """Where SeaBIOS finds the drive: controller, channel, unit."""
        return f"{super().boot_path()}/drive@{self.ide_buses.index(ide)}/disk@{unit}"

    def describe(self) -> str:
        return "PIIX3 IDE controller"
