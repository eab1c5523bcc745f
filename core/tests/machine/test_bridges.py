"""The host bridge's memory map, configuration ports, interrupt routing and power management."""

from __future__ import annotations

from typing import Any

import pytest

from vm_core.devices.pci import PciBus
from vm_core.machine.chipset.acpi_pm import PowerManagement
from vm_core.machine.chipset.i440fx import HostBridge
from vm_core.machine.chipset.piix3 import IsaBridge
from vm_core.machine.firmware import place
from vm_core.machine.memory import GuestMemory, RegionKind
from vm_core.machine.runstate import ExitReason
from vm_core.testing.machine import FakeMachine

RAM = 4 << 20


class Board(FakeMachine):
    """A machine with the three bridges in front of 256 KiB of firmware."""

    def __init__(self) -> None:
        super().__init__(RAM)
        self.memory = GuestMemory(RAM, rom_size=256 << 10)
        image = bytes(n >> 12 & 0xFF for n in range(256 << 10))
        rom = place(self.memory, image)
        self.shutdowns: list[ExitReason] = []
        self.bridge = HostBridge("host", {}, rom)
        self.isa = IsaBridge("isa", {})
        self.power = PowerManagement("power", {})
        for device, address in ((self.bridge, "0"), (self.isa, "1"), (self.power, "1.3")):
            device.realize(self, self.pci, address)
        for device in (self.bridge, self.isa, self.power):
            device.reset()

    def request_shutdown(self, reason: ExitReason = ExitReason.GUEST_SHUTDOWN) -> None:
        self.shutdowns.append(reason)

    def config(self, devfn: int, offset: int, size: int = 4) -> int:
        self.outl(0xCF8, 0x80000000 | devfn << 8 | offset & 0xFC)
        return {1: self.inb, 2: self.inw, 4: self.inl}[size](0xCFC + (offset & 3))

    def set_config(self, devfn: int, offset: int, size: int, value: int) -> None:
        self.outl(0xCF8, 0x80000000 | devfn << 8 | offset & 0xFC)
        {1: self.outb, 2: self.outw, 4: self.outl}[size](0xCFC + (offset & 3), value)

    def kind(self, address: int) -> RegionKind | None:
        found = self.memory.find(address)
        return found.region.kind if found else None

    def byte(self, address: int) -> int:
        """What the processor reads."""
        found = self.memory.find(address)
        if found is None:
            return 0xFF
        if found.region.kind is RegionKind.MMIO:
            return self.mmio_read(address, 1)
        return self.memory.buffer[found.region.backing + found.offset + address - found.start]


def test_after_reset_the_firmware_is_seen_twice() -> None:
    """The image ends at 4 GiB, its last 128 KiB at 1 MiB; below them is nothing."""
    board = Board()
    assert board.byte(0xFFFFF000) == 0x3F
    assert board.byte(0xFF000) == 0x3F
    assert board.byte(0xE0000) == 0x20
    assert board.kind(0xDFFFF) is None
    assert board.kind(0xA0000) is None
    assert board.kind(0x9FFFF) is RegionKind.RAM
    assert board.kind(0x100000) is RegionKind.RAM


@pytest.mark.parametrize("number", range(13))
def test_pam_switches_each_segment(number: int) -> None:
    """Read and write bits of a segment make it RAM, read-only RAM, or ROM with RAM behind it, and no other segment."""
    board = Board()
    start = 0xF0000 if number == 12 else 0xC0000 + 0x4000 * number
    size = 0x10000 if number == 12 else 0x4000
    register = 0x59 if number == 12 else 0x5A + number // 2
    shift = 4 if number == 12 or number & 1 else 0
    rom = board.byte(start)
    around = [a for a in (start - 1, start + size) if 0xC0000 <= a < 0x100000]
    outside = {a: board.byte(a) for a in around}

    board.set_config(0, register, 1, 2 << shift)
    assert board.byte(start) == rom
    board.mmio_write(start, 1, 0x5A)
    assert board.byte(start) == rom
    board.set_config(0, register, 1, 1 << shift)
    assert board.kind(start) is RegionKind.ROM
    assert board.byte(start) == 0x5A
    board.set_config(0, register, 1, 3 << shift)
    assert board.kind(start) is RegionKind.RAM
    board.mmio_write(start, 1, 0xA5)
    assert board.byte(start) == 0xA5
    board.set_config(0, register, 1, 0)
    assert board.byte(start) == rom
    assert outside == {a: board.byte(a) for a in around}


def test_smram_opens_and_locks() -> None:
    """D_OPEN shows RAM below the video memory's address; D_LCK closes it until reset."""
    board = Board()
    assert board.kind(0xA0000) is None
    board.set_config(0, 0x72, 1, 0x4A)
    assert board.kind(0xA0000) is RegionKind.RAM
    board.set_config(0, 0x72, 1, 0x1A)
    board.set_config(0, 0x72, 1, 0x4A)
    assert board.kind(0xA0000) is None
    board.bridge.reset()
    assert board.config(0, 0x72, 1) == 0x02


def test_memory_above_4_gib() -> None:
    """RAM beyond 3 GiB continues at 4 GiB, with nothing in the PCI hole."""
    machine = FakeMachine()
    machine.memory = GuestMemory((3 << 30) + (512 << 20))
    HostBridge("host", {}).realize(machine, machine.pci, "0")
    found = machine.memory.find(4 << 30)
    assert found is not None
    assert (found.region.backing, found.size) == (3 << 30, 512 << 20)
    assert machine.memory.find(0xC0000000) is None


def test_configuration_mechanism_1() -> None:
    """The address port takes double words only; absent functions and buses read as ones; parts of registers work."""
    board = Board()
    assert board.config(0, 0) == 0x12378086
    assert board.config(0, 2, 2) == 0x1237
    assert board.config(0x0B, 0) == 0x71138086
    assert board.config(0x08, 0x0E, 1) == 0x80
    assert board.config(0xF8, 0) == 0xFFFFFFFF
    board.outl(0xCF8, 0x80000000)
    board.outb(0xCF8, 0x12)
    assert board.inl(0xCF8) == 0x80000000
    board.outl(0xCF8, 0x80010000)
    assert board.inl(0xCFC) == 0xFFFFFFFF
    board.outl(0xCF8, 0)
    assert board.inl(0xCFC) == 0xFFFFFFFF


def test_pci_interrupts_are_routed_and_shared() -> None:
    """A line follows the wired-or of the PCI lines routed to it, also when the route changes."""
    board = Board()
    bus: Any = board.pci
    assert isinstance(bus, PciBus)
    bus.set_pin(2, 1, True)  # slot 2, INTA: PIRQB
    assert board.recorder.changes == []
    board.set_config(8, 0x61, 1, 11)
    board.set_config(8, 0x60, 1, 11)
    assert board.recorder.level == {11: True}
    bus.set_pin(1, 1, True)  # PIRQA
    bus.set_pin(2, 1, False)
    assert board.recorder.level == {11: True}
    board.set_config(8, 0x60, 1, 10)
    assert board.recorder.level == {11: False, 10: True}
    board.set_config(8, 0x60, 1, 0x80)
    assert board.recorder.level == {11: False, 10: False}


def test_port_cf9_resets() -> None:
    """Bit 2 of port 0xcf9 resets the machine; bit 1 alone does not."""
    board = Board()
    board.outb(0xCF9, 0x02)
    assert board.reset_requests == []
    board.outb(0xCF9, 0x06)
    assert board.reset_requests == ["port cf9h"]


def enabled_power() -> Board:
    board = Board()
    board.set_config(0x0B, 0x40, 4, 0x601)
    board.set_config(0x0B, 0x80, 1, 1)
    return board


def test_soft_off() -> None:
    """SLP_EN with SLP_TYP 0 switches off; other sleep types do nothing."""
    board = enabled_power()
    board.outw(0x604, 0x2000 | 1 << 10)
    assert board.shutdowns == []
    board.outw(0x604, 0x2000)
    assert board.shutdowns == [ExitReason.GUEST_SHUTDOWN]


def test_the_power_button_raises_the_sci() -> None:
    """Line 9 rises if ACPI mode is on and the event enabled, and falls when its status is cleared."""
    board = enabled_power()
    board.outb(0xB2, 0xF1)
    assert board.inw(0x604) & 1
    board.outw(0x602, 0x0100)
    board.system_powerdown()
    assert board.recorder.level[9]
    assert board.inw(0x600) == 0x0100
    board.outw(0x600, 0x0100)
    assert not board.recorder.level[9]


def test_the_acpi_timer() -> None:
    """24 bits at 3.579545 MHz, whole or in parts; its top bit's change is an event."""
    board = enabled_power()
    board.advance(1_000_000_000)
    assert board.inl(0x608) == 3_579_545
    assert board.inb(0x609) == 3_579_545 >> 8 & 0xFF
    board.outb(0xB2, 0xF1)
    board.outw(0x602, 0x0001)
    board.advance(2_000_000_000)
    assert board.recorder.level[9]
    assert board.inl(0x608) == 3 * 3_579_545 & 0xFFFFFF


def test_the_registers_move_with_their_base() -> None:
    """The ports are where the base register says, and nowhere while decoding is off."""
    board = enabled_power()
    board.set_config(0x0B, 0x40, 4, 0xB001)
    assert board.inw(0x604) == 0xFFFF
    assert board.inw(0xB004) == 0
    board.set_config(0x0B, 0x80, 1, 0)
    assert board.inw(0xB004) == 0xFFFF
