"""The 82441FX (440FX) host bridge: PCI configuration ports, and what the first megabyte shows.

Theory of operation. Between 640 KiB and 1 MiB the PAM registers decide, for 13 segments, whether a read and whether a
write go to RAM or to the bus. On the bus there is the firmware ROM at 0xe0000, and nothing below. Each segment has one
region a state in the memory map, of which one is enabled: RAM (both bits), RAM without writes (read bit), ROM below and
RAM above (write bit: reads come from the bus, writes go to RAM, through a handler), or nothing, where the bus shows.
The SMRAM register opens the RAM under the video memory's address.

Source: Intel 82441FX data sheet (290549-001), 3.2 and 3.2.16 to 3.2.19.
"""

from __future__ import annotations

from typing import Any

from ...devices.bus import Bus
from ...devices.pci import PciBus, PciDevice
from ...devices.registers import Register, load, writable_mask
from ..machine import Machine
from ..memory import GuestMemory, Region, RegionKind

#: The PCI hole begins here at the latest; RAM that does not fit below continues at 4 GiB.
PCI_HOLE = 0xC000_0000
FOUR_GIB = 1 << 32

PAM0 = 0x59
SMRAM = 0x72
SMRAM_OPEN, SMRAM_CLOSED, SMRAM_LOCKED = 0x40, 0x20, 0x10

REGISTERS = (
    Register("pmccfg", 0x50, 2, help="PMC configuration"),
    Register("detct", 0x52, help="deturbo counter"),
    Register("dbc", 0x53, reset=0x80, help="data buffer control"),
    Register("pam0", 0x59, help="0xf0000-0xfffff (high half)", writable=0x30),
    Register("pam1", 0x5A, help="0xc0000, 0xc4000", writable=0x33),
    Register("pam2", 0x5B, help="0xc8000, 0xcc000", writable=0x33),
    Register("pam3", 0x5C, help="0xd0000, 0xd4000", writable=0x33),
    Register("pam4", 0x5D, help="0xd8000, 0xdc000", writable=0x33),
    Register("pam5", 0x5E, help="0xe0000, 0xe4000", writable=0x33),
    Register("pam6", 0x5F, help="0xe8000, 0xec000", writable=0x33),
    Register("drb", 0x60, 8, help="DRAM row boundaries, for firmware that sizes memory by them"),
    Register("smram", 0x72, reset=0x02, help="RAM under 0xa0000: open 6, closed 5, locked 4", writable=0x78),
)


class ReadBusWriteRam:
    """A segment whose reads come from the bus and whose writes go to RAM: firmware copies itself so."""

    def __init__(self, memory: GuestMemory, start: int, rom: Region | None) -> None:
        self._memory = memory
        self._start = start
        self._rom = rom

    def read(self, offset: int, size: int) -> int:
        rom = self._rom
        if rom is None:
            return (1 << 8 * size) - 1
        at = rom.backing + self._start - rom.start + offset
        return int.from_bytes(self._memory.buffer[at : at + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        at = self._start + offset
        self._memory.buffer[at : at + size] = value.to_bytes(size, "little")


class Segment:
    """One PAM segment with its three regions."""

    def __init__(
        self, memory: GuestMemory, start: int, size: int, register: int, shift: int, rom: Region | None
    ) -> None:
        self.register = register
        self.shift = shift
        name = f"pam {start:#x}"
        self.regions = {
            1: Region(f"{name} ro", start, size, RegionKind.ROM, backing=start, priority=3),
            2: Region(
                f"{name} wo",
                start,
                size,
                RegionKind.MMIO,
                handler=ReadBusWriteRam(memory, start, rom),
                priority=3,
            ),
            3: Region(f"{name} rw", start, size, RegionKind.RAM, backing=start, priority=3),
        }
        for region in self.regions.values():
            region.enabled = False
            memory.add(region)

    def select(self, state: int) -> None:
        """Bit 0: reads from RAM; bit 1: writes to RAM."""
        for number, region in self.regions.items():
            region.enabled = number == state


class HostBridge(PciDevice):
    """Function 00.0. *isa_rom* is the firmware's region below 1 MiB, None where the machine has none."""

    vendor_id = 0x8086
    device_id = 0x1237
    revision = 0x02
    class_code = 0x060000
    # By these SeaBIOS knows a board with fw_cfg.
    subsystem_vendor_id = 0x1AF4
    subsystem_id = 0x1100

    def __init__(self, id: str, options: dict[str, Any], isa_rom: Region | None = None) -> None:
        super().__init__(id, options)
        self._isa_rom = isa_rom
        self._segments: list[Segment] = []

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        super().realize(machine, bus, address)
        assert isinstance(bus, PciBus)
        load(REGISTERS, self.config)
        writable_mask(REGISTERS, self.config_writable)
        memory = machine.memory
        low = min(memory.size, PCI_HOLE)
        memory.add(Region("ram below 640 KiB", 0, min(low, 0xA0000), RegionKind.RAM))
        if low > 0x100000:
            memory.add(Region("ram", 0x100000, low - 0x100000, RegionKind.RAM, backing=0x100000))
        if memory.size > low:
            memory.add(Region("ram above 4 GiB", FOUR_GIB, memory.size - low, RegionKind.RAM, backing=low))
        self._smram = Region("smram", 0xA0000, 0x20000, RegionKind.RAM, backing=0xA0000, priority=3)
        self._smram.enabled = False
        memory.add(self._smram)
        rom = self._isa_rom
        for number in range(12):
            start = 0xC0000 + number * 0x4000
            covered = rom if rom is not None and rom.start <= start else None
            self._segments.append(Segment(memory, start, 0x4000, PAM0 + 1 + number // 2, 4 * (number & 1), covered))
        self._segments.append(Segment(memory, 0xF0000, 0x10000, PAM0, 4, rom))
        ports = ConfigPorts(bus)
        machine.ports.add(0xCF8, 1, ports)
        machine.ports.add(0xCFC, 4, ConfigData(ports))
        self.config_ports = ports

    def reset(self) -> None:
        super().reset()
        load(REGISTERS, self.config)
        self.config_ports.address = 0
        self._update_map()

    def write_config(self, offset: int, size: int, value: int) -> None:
        smram = self.config[SMRAM]
        super().write_config(offset, size, value)
        if smram & SMRAM_LOCKED:
            # Locked until reset, with D_OPEN clear.
            self.config[SMRAM] = smram
        if offset <= SMRAM and offset + size > PAM0:
            self._update_map()

    def _update_map(self) -> None:
        config = self.config
        for segment in self._segments:
            segment.select(config[segment.register] >> segment.shift & 3)
        smram = config[SMRAM]
        if smram & SMRAM_LOCKED:
            config[SMRAM] = smram & ~SMRAM_OPEN
        self._smram.enabled = smram & (SMRAM_OPEN | SMRAM_CLOSED | SMRAM_LOCKED) == SMRAM_OPEN
        self.machine.memory.update()

    def boot_path(self) -> str | None:
        return None


class ConfigPorts:
    """Port 0xcf8, the address register of configuration mechanism 1; only 32-bit accesses reach it."""

    def __init__(self, bus: PciBus) -> None:
        self.bus = bus
        self.address = 0

    def read(self, offset: int, size: int) -> int:
        return self.address if size == 4 else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self.address = value & 0x80FFFFFC


class ConfigData:
    """Ports 0xcfc–0xcff, the register that the address points to: bit 31 enable, 23–16 bus, 15–8 function."""

    def __init__(self, ports: ConfigPorts) -> None:
        self._ports = ports

    def read(self, offset: int, size: int) -> int:
        address = self._ports.address
        if address >> 16 != 0x8000 or offset + size > 4:  # there is no bus but 0
            return (1 << 8 * size) - 1
        return self._ports.bus.read(address >> 8 & 0xFF, (address & 0xFC) + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        address = self._ports.address
        if address >> 16 == 0x8000 and offset + size <= 4:
            self._ports.bus.write(address >> 8 & 0xFF, (address & 0xFC) + offset, size, value)
