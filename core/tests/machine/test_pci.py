"""PCI functions: configuration space, windows, capabilities, interrupts and bus mastering."""

from __future__ import annotations

from typing import Any

import pytest

from vm_core.devices.pci import DmaError, PciBus, PciDevice, parse_address
from vm_core.errors import UsageError
from vm_core.testing.machine import FakeMachine


class Recorder:
    """Registers that remember what was done to them."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return 0x11223344 & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


class Adder(PciDevice):
    vendor_id = 0x1B36
    device_id = 0x0099
    class_code = 0xFF0012
    revision = 5
    interrupt_pin = 1

    def __init__(self, id: str = "adder", **options: Any) -> None:
        super().__init__(id, options)
        self.driver = "adder"
        self.moves: list[int | None] = []

    def bar_moved(self, bar: Any) -> None:
        self.moves.append(bar.address)


def plugged(**bars: Any) -> tuple[FakeMachine, Adder]:
    machine = FakeMachine()
    device = Adder()
    device.realize(machine, machine.pci, "4.0")
    return machine, device


def test_identity() -> None:
    """Class attributes appear where the header has them and cannot be written."""
    _, device = plugged()
    assert device.read_config(0, 4) == 0x00991B36
    assert device.read_config(8, 4) == 0xFF001205
    device.write_config(0, 4, 0)
    device.write_config(8, 4, 0)
    assert device.read_config(0, 4) == 0x00991B36
    assert device.read_config(8, 4) == 0xFF001205
    assert device.read_config(0x3D, 1) == 1


@pytest.mark.parametrize(
    ("size", "options", "flags"),
    [(0x1000, {}, 0), (0x100, {"io": True}, 1), (0x2000, {"prefetch": True}, 8), (0x4000, {"bits64": True}, 4)],
)
def test_a_bar_is_sized_and_mapped(size: int, options: dict[str, bool], flags: int) -> None:
    """All ones read back as the size's mask; the window follows the address while decoding is on."""
    machine, device = plugged()
    registers = Recorder()
    bar = device.add_bar(2, size, registers, **options)
    assert device.read_config(0x18, 4) == flags
    device.write_config(0x18, 4, 0xFFFFFFFF)
    assert device.read_config(0x18, 4) == (~(size - 1) & 0xFFFFFFFF) | flags
    address = 0xC000 if bar.io else 0xE0000000
    device.write_config(0x18, 4, address)
    assert bar.address is None
    device.write_config(4, 2, 1 if bar.io else 2)
    assert bar.address == address
    if bar.io:
        assert machine.inb(address + 5) == 0x44
    else:
        assert machine.mmio_read(address + 5, 1) == 0x44
    assert registers.seen == [(5, 1)]
    device.write_config(0x18, 4, address + size)
    assert bar.address == address + size
    device.write_config(4, 2, 0)
    assert bar.address is None
    assert device.moves == [address, address + size, None]


def test_a_64_bit_bar_goes_above_4_gib() -> None:
    """Both halves make the address; the next register belongs to it."""
    machine, device = plugged()
    bar = device.add_bar(0, 0x1000, Recorder(), bits64=True)
    device.write_config(0x14, 4, 0x12)
    device.write_config(0x10, 4, 0x3000)
    device.write_config(4, 2, 2)
    assert bar.address == 0x12_0000_3000
    assert machine.mmio_read(0x12_0000_3000, 4) == 0x11223344
    with pytest.raises(ValueError, match="bar 1 is taken"):
        device.add_bar(1, 16, Recorder())


def test_ports_of_two_functions_never_fight() -> None:
    """A port window that is put on another's ports stays unmapped until it is moved."""
    machine, device = plugged()
    bar = device.add_bar(0, 16, Recorder(), io=True)
    machine.ports.add(0xC000, 8, Recorder())
    device.write_config(0x10, 4, 0xC000)
    device.write_config(4, 2, 1)
    assert bar.address is None
    device.write_config(0x10, 4, 0xC010)
    assert bar.address == 0xC010


def test_capabilities_form_a_list() -> None:
    """Each capability points to the next; writable bits are the mask's."""
    _, device = plugged()
    first = device.add_capability(0x09, b"\x10\x00\x00", b"\x00\x0f")
    second = device.add_capability(0x05, 8)
    assert device.read_config(6, 2) & 0x10
    assert device.read_config(0x34, 1) == first
    assert device.read_config(first + 1, 1) == second
    assert device.read_config(second + 1, 1) == 0
    device.write_config(first + 2, 2, 0xFFFF)
    assert device.read_config(first + 2, 2) == 0x0F10
    with pytest.raises(ValueError, match="no room"):
        device.add_capability(0x09, 200)


def test_intx_follows_level_and_disable() -> None:
    """The status bit shows the level; the wire also needs that INTx is not disabled."""
    machine, device = plugged()
    device.set_irq(True)
    line = 11  # slot 4, INTA: PIRQD
    assert machine.recorder.level == {line: True}
    assert device.read_config(6, 2) & 8
    device.write_config(4, 2, 0x400)
    assert machine.recorder.level == {line: False}
    assert device.read_config(6, 2) & 8
    device.write_config(4, 2, 0)
    device.set_irq(False)
    assert machine.recorder.changes == [(line, True), (line, False), (line, True), (line, False)]


def test_functions_share_a_line() -> None:
    """A line is up while any function holds it."""
    machine, device = plugged()
    other = Adder("other")
    other.realize(machine, machine.pci, "8.0")
    device.set_irq(True)
    other.set_irq(True)
    device.set_irq(False)
    assert machine.recorder.level == {11: True}
    other.unrealize()
    assert machine.recorder.level == {11: False}


def msix() -> tuple[FakeMachine, Adder, int]:
    machine, device = plugged()
    device.add_msix(4, 1)
    machine.map_bars(device)
    address = device.bars[1].address
    assert address is not None
    for vector in range(4):
        machine.mmio_write(address + 16 * vector, 4, 0xFEE00000)
        machine.mmio_write(address + 16 * vector + 8, 4, 0x40 + vector)
        machine.mmio_write(address + 16 * vector + 12, 4, 0)
    return machine, device, address


def control(device: Adder, value: int) -> None:
    assert device.msix is not None
    device.write_config(device.msix.capability + 2, 2, value)


def test_msix_sends_messages() -> None:
    """Enabled, a vector sends its own message; off, nothing."""
    machine, device, _ = msix()
    device.msix_notify(2)
    assert not device.msix_enabled
    control(device, 0x8000)
    device.msix_notify(2)
    device.msix_notify(99)
    assert machine.recorder.messages == [(0xFEE00000, 0x42)]


def test_masked_vectors_become_pending_and_are_sent_later() -> None:
    """Under its own mask or the function's a vector sets its pending bit and is sent once unmasked."""
    machine, device, address = msix()
    control(device, 0xC000)
    device.msix_notify(1)
    assert machine.mmio_read(address + 0x800, 8) == 2
    control(device, 0x8000)
    assert machine.recorder.messages == [(0xFEE00000, 0x41)]
    machine.mmio_write(address + 3 * 16 + 12, 4, 1)
    device.msix_notify(3)
    device.msix_notify(3)
    assert machine.mmio_read(address + 0x800, 4) == 8
    machine.mmio_write(address + 3 * 16 + 12, 4, 0)
    assert machine.recorder.messages == [(0xFEE00000, 0x41), (0xFEE00000, 0x43)]
    assert machine.mmio_read(address + 0x800, 8) == 0


def test_msix_on_top_of_other_registers() -> None:
    """In a shared bar everything but table and pending bits reaches the device's own registers."""
    machine, device = plugged()
    registers = Recorder()
    device.add_bar(0, 0x2000, registers)
    device.add_msix(2, 0, 0x1000, 0x1800)
    machine.map_bars(device)
    address = device.bars[0].address
    assert address is not None
    machine.mmio_write(address + 4, 4, 9)
    machine.mmio_write(address + 0x1008, 4, 0x55)
    assert registers.seen == [(4, 4, 9)]
    assert machine.mmio_read(address + 0x1008, 4) == 0x55


def test_reset_closes_everything() -> None:
    """After a reset windows are unmapped, bars empty, MSI-X off and the interrupt line low."""
    machine, device, address = msix()
    control(device, 0x8000)
    device.set_irq(True)
    device.reset()
    assert machine.memory.find(address) is None
    assert device.read_config(0x14, 4) == 0
    assert device.command == 0
    assert not device.msix_enabled
    assert not any(machine.recorder.level.values())


def test_dma_needs_bus_mastering_and_ram() -> None:
    """Views of RAM are given to bus masters only, and of RAM only."""
    machine, device = plugged()
    with pytest.raises(DmaError, match="not a bus master"):
        device.dma_views(0x1000, 4)
    device.write_config(4, 2, 4)
    device.dma_write(0x1000, b"data")
    assert machine.memory.read(0x1000, 4) == b"data"
    assert device.dma_read(0x1000, 4) == b"data"
    with pytest.raises(DmaError, match="not RAM"):
        device.dma_read(0xE0000000, 4)


def test_places_on_the_bus() -> None:
    """Free slots from 2 on; a taken place is named with its holder; functions above 0 mark the slot."""
    machine = FakeMachine()
    devices = [Adder(f"d{n}") for n in range(3)]
    for device in devices:
        device.realize(machine, machine.pci, None)
    assert [device.slot for device in devices] == [2, 3, 4]
    with pytest.raises(UsageError, match=r"addr=3 is taken by d1"):
        Adder("late").realize(machine, machine.pci, "3")
    assert not devices[1].read_config(0x0E, 1) & 0x80
    second = Adder("second")
    second.realize(machine, machine.pci, "3.1")
    assert devices[1].read_config(0x0E, 1) & 0x80
    second.unrealize()
    assert not devices[1].read_config(0x0E, 1) & 0x80
    bus = machine.pci
    for slot in range(5, 32):
        Adder(f"s{slot}").realize(machine, bus, None)
    with pytest.raises(UsageError, match=r"all slots of pci\.0 are taken"):
        Adder("none").realize(machine, bus, None)


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4, 0)), ("1f.2", (31, 2)), ("0x10.7", (16, 7)), ("01.1", (1, 1))]
)
def test_addresses(text: str, expected: tuple[int, int]) -> None:
    """Slot and function, hexadecimal."""
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "20", "1.8", "x", "1.1.1", "-1"])
def test_addresses_that_are_wrong(text: str) -> None:
    """Anything else is refused with the grammar."""
    with pytest.raises(UsageError, match=r"a PCI address is SLOT or SLOT\.FUNCTION"):
        parse_address(text)


def test_reads_of_absent_functions() -> None:
    """Nobody at home reads as ones."""
    assert PciBus().read(0x20, 0, 4) == 0xFFFFFFFF
