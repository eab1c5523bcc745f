"""The 82371SB (PIIX3) ISA bridge: routing of PCI interrupts, and reset control.

Theory of operation. The four PCI interrupt lines are routed to ISA lines by one register each; several may share a
line, which is up while any of them is. Port 0xcf9 resets the machine.

Source: Intel 82371SB data sheet (290550-002), 2.2 and 2.5.
"""

from __future__ import annotations

from typing import Any

from ...devices.bus import Bus
from ...devices.pci import PciBus, PciDevice
from ...devices.registers import Register, load, writable_mask
from ..machine import Machine

PIRQ = 0x60

REGISTERS = (
    Register("iort", 0x4C, reset=0x4D, help="ISA I/O recovery time", writable=0x7F),
    Register("xbcs", 0x4E, 2, reset=0x0003, help="X-bus chip select: firmware ROM enables", writable=0x01FF),
    Register("pirqa", 0x60, reset=0x80, help="ISA line of PIRQA in 3-0; bit 7: none", writable=0x8F),
    Register("pirqb", 0x61, reset=0x80, help="the same for PIRQB", writable=0x8F),
    Register("pirqc", 0x62, reset=0x80, help="the same for PIRQC", writable=0x8F),
    Register("pirqd", 0x63, reset=0x80, help="the same for PIRQD", writable=0x8F),
    Register("tom", 0x69, reset=0x02, help="top of memory for ISA masters", writable=0xFE),
    Register("mstat", 0x6A, 2, help="miscellaneous status", writable=0x8002),
    Register("mbirq0", 0x70, reset=0x80, help="motherboard device interrupt", writable=0xEF),
    Register("mbdma0", 0x76, reset=0x0C, help="motherboard device DMA 0", writable=0x8F),
    Register("mbdma1", 0x77, reset=0x0C, help="motherboard device DMA 1", writable=0x8F),
    Register("apicbase", 0x80, help="I/O APIC base address relocation", writable=0x7F),
    Register("dlc", 0x82, help="deterministic latency control", writable=0x0F),
    Register("smicntl", 0xA0, reset=0x08, help="SMI control", writable=0x1F),
)

#: Lines that PCI interrupts may be routed to: 3–7, 9–12, 14 and 15.
ROUTABLE = 0b1101_1110_1111_1000


class IsaBridge(PciDevice):
    """Function 01.0, and port 0xcf9."""

    vendor_id = 0x8086
    device_id = 0x7000
    class_code = 0x060100

    def __init__(self, id: str, options: dict[str, Any]) -> None:
        super().__init__(id, options)
        #: Levels of PIRQA–PIRQD.
        self._lines = [False] * 4
        #: Levels last given to the ISA lines.
        self._driven: dict[int, bool] = {}

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        super().realize(machine, bus, address)
        assert isinstance(bus, PciBus)
        load(REGISTERS, self.config)
        writable_mask(REGISTERS, self.config_writable)
        # The bridge always decodes and is always a master.
        self.config[4] = 0x07
        self.config_writable[4:6] = bytes(2)
        bus.route = self.set_pirq
        machine.ports.add(0xCF9, 1, ResetControl(machine))

    def reset(self) -> None:
        super().reset()
        load(REGISTERS, self.config)
        self.config[4] = 0x07
        self._route()

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        if offset < PIRQ + 4 and offset + size > PIRQ:
            self._route()

    def set_pirq(self, line: int, level: bool) -> None:
        """PIRQA–PIRQD (0–3) changes."""
        self._lines[line] = level
        self._route()

    def _route(self) -> None:
        wanted: dict[int, bool] = {}
        for line, level in enumerate(self._lines):
            route = self.config[PIRQ + line]
            if route < 16 and ROUTABLE >> route & 1:
                wanted[route] = wanted.get(route, False) or level
        for irq, was in list(self._driven.items()):
            if irq not in wanted:
                del self._driven[irq]
                if was:
                    self.machine.irqs.set_irq(irq, False)
        for irq, level in wanted.items():
            if self._driven.get(irq, False) != level:
                self.machine.irqs.set_irq(irq, level)
            self._driven[irq] = level

    def boot_path(self) -> str | None:
        return None


class ResetControl:
    """Port 0xcf9: bit 2 going up resets, bit 1 says that it is a hard reset."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        self._value = value & 2
        if value & 4:
            self._machine.request_reset("port cf9h")
