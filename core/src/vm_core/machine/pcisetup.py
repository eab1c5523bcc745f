"""What firmware does to PCI functions, for a kernel that is booted without firmware.

Every window gets an address, largest first, and is switched on; interrupt lines are routed and told; the few chipset
registers that operating systems expect firmware to have set are set.
"""

from __future__ import annotations

from ..devices.pci import BAR0, COMMAND, COMMAND_IO, COMMAND_MEMORY, INTERRUPT_LINE, Bar, PciBus, PciDevice
from ..errors import UsageError
from .acpi import PCI_MEMORY_END, PIRQ_LINES, pci_line, pci_memory_start
from .chipset import acpi_pm, piix3
from .ports import PortSpace

#: Ports given out, as SeaBIOS does.
FIRST_PORT, LAST_PORT = 0xC000, 0xFFFF

#: (vendor, device): register, size, value. PIIX IDE: both channels are decoded. PIIX4 power management: its registers
#: are decoded where the ACPI tables say, and its interrupt is line 9.
_REGISTERS: dict[tuple[int, int], tuple[tuple[int, int, int], ...]] = {
    (0x8086, 0x7000): tuple((piix3.PIRQ + n, 1, line) for n, line in enumerate(PIRQ_LINES)),
    (0x8086, 0x7010): ((0x40, 2, 0x8000), (0x42, 2, 0x8000)),
    (0x8086, 0x7111): ((0x40, 2, 0x8000), (0x42, 2, 0x8000)),
    (0x8086, 0x7113): (
        (acpi_pm.PMBASE, 4, acpi_pm.DEFAULT_BASE | 1),
        (acpi_pm.PMREGMISC, 1, 1),
        (INTERRUPT_LINE, 1, acpi_pm.SCI),
    ),
}


def set_up(bus: PciBus, ports: PortSpace, ram: int) -> None:
    """Set up every function of *bus* on a board with *ram* bytes. With the device lock held."""
    functions = [function for function in bus.functions if function is not None]
    for function in functions:
        _assign_interrupt(function)
        for offset, size, value in _REGISTERS.get((function.vendor_id, function.device_id), ()):
            function.write_config(offset, size, value)
    bars = [bar for function in functions for bar in function.bars.values()]
    bars.sort(key=lambda bar: -bar.size)
    _assign([bar for bar in bars if bar.io], FIRST_PORT, LAST_PORT)
    _assign([bar for bar in bars if not bar.io], pci_memory_start(ram), PCI_MEMORY_END)
    for function in functions:
        if function.bars:
            function.write_config(COMMAND, 2, function.command | COMMAND_IO | COMMAND_MEMORY)
    # PCI interrupts are level-triggered: ELCR.
    mask = 0
    for line in PIRQ_LINES:
        mask |= 1 << line
    ports.write(0x4D1, 1, mask >> 8)


def _assign_interrupt(function: PciDevice) -> None:
    if function.interrupt_pin:
        function.write_config(INTERRUPT_LINE, 1, pci_line(function.slot, function.interrupt_pin - 1))


def _assign(bars: list[Bar], first: int, last: int) -> None:
    """Give *bars*, largest first, addresses from *first* on, each a multiple of its size."""
    at = first
    for bar in bars:
        at = (at + bar.size - 1) & -bar.size
        if at + bar.size - 1 > last:
            raise UsageError(f"-device {bar.device.driver}: no room is left for its {bar.size}-byte window")
        bar.device.write_config(BAR0 + 4 * bar.index, 4, at)
        if bar.bits64:
            bar.device.write_config(BAR0 + 4 * bar.index + 4, 4, 0)
        at += bar.size
