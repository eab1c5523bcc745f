"""The 16550A: what drivers probe for, its interrupts, its FIFO, and registers against QEMU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_core.machine.chipset.uart import REGISTERS, Uart
from vm_core.testing.qtest import QtestMachine, available

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR


class Board:
    def __init__(self) -> None:
        self.irq = False
        self.sent = bytearray()
        self.rooms = 0
        self.uart = Uart(self._irq, self.sent.append, self._room)

    def _irq(self, level: bool) -> None:
        self.irq = level

    def _room(self) -> None:
        self.rooms += 1

    def get(self, register: int) -> int:
        return self.uart.read(register, 1)

    def put(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)


def test_reset_values_are_the_tables() -> None:
    """After a reset every readable register shows what its table says."""
    board = Board()
    for register in REGISTERS:
        if register.access != "wo" and register.name != "data":
            assert board.get(register.offset) == register.reset, register.name


def test_linux_finds_a_16550a() -> None:
    """The probe of Linux' 8250 driver: IER keeps four bits, loopback reflects, a FIFO answers with 3 in IIR 7-6."""
    board = Board()
    board.put(IER, 0xFF)
    assert board.get(IER) == 0x0F
    board.put(IER, 0)
    board.put(MCR, 0x1A)
    assert board.get(MSR) & 0xF0 == 0x90
    board.put(MCR, 0)
    assert board.get(MSR) & 0xF0 == 0xB0
    board.put(SCR, 0xA5)
    assert board.get(SCR) == 0xA5
    board.put(FCR, 1)
    assert board.get(IIR) >> 6 == 3
    board.put(FCR, 0)
    assert board.get(IIR) >> 6 == 0


def test_the_transmitter_interrupts_when_enabled_and_after_each_byte() -> None:
    """THRE: raised by enabling it, ended by reading IIR, raised again by the next byte; without it output stalls."""
    board = Board()
    board.put(MCR, 0x08)
    board.put(IER, 0x02)
    assert board.irq
    assert board.get(IIR) == 0x02
    assert not board.irq
    board.put(DATA, ord("x"))
    assert board.irq
    assert board.sent == b"x"
    board.put(IER, 0)
    assert not board.irq
    board.put(IER, 2)
    assert board.irq


def test_out2_gates_the_interrupt() -> None:
    """Without OUT2 the interrupt does not reach the bus."""
    board = Board()
    board.put(IER, 0x02)
    assert not board.irq
    board.put(MCR, 0x08)
    assert board.irq


def test_received_bytes_interrupt_at_the_trigger_level_or_time_out() -> None:
    """Below the trigger level the cause is the character timeout, from it on received data."""
    board = Board()
    board.put(MCR, 0x08)
    board.put(FCR, 0x41)  # trigger at 4
    board.put(IER, 0x01)
    board.uart.receive(b"abc")
    assert board.irq
    assert board.get(IIR) == 0xCC
    board.uart.receive(b"d")
    assert board.get(IIR) == 0xC4
    assert bytes(board.get(DATA) for _ in range(4)) == b"abcd"
    assert not board.irq
    assert board.get(LSR) == 0x60


def test_nothing_is_lost_however_much_arrives() -> None:
    """The UART says how much room it has, and calls when there is more."""
    board = Board()
    assert board.uart.room == 1
    board.put(FCR, 1)
    assert board.uart.room == 16
    board.uart.receive(bytes(16))
    assert board.uart.room == 0
    before = board.rooms
    board.get(DATA)
    assert board.rooms == before + 1
    assert board.uart.room == 1


def test_the_divisor_hides_data_and_ier() -> None:
    """While DLAB is set registers 0 and 1 are the divisor, and nothing is sent."""
    board = Board()
    board.put(LCR, 0x83)
    board.put(DATA, 0x0C)
    board.put(IER, 0x01)
    assert (board.get(DATA), board.get(IER), board.uart.divisor) == (0x0C, 0x01, 0x010C)
    board.put(LCR, 0x03)
    assert board.get(IER) == 0
    assert board.sent == b""


def test_loopback_receives_what_is_sent() -> None:
    """In loopback bytes come back and do not leave."""
    board = Board()
    board.put(MCR, 0x10)
    board.put(DATA, 0x5A)
    assert board.get(LSR) & 1
    assert board.get(DATA) == 0x5A
    assert board.sent == b""
    assert board.uart.room == 0


def test_a_cable_that_is_pulled_changes_the_modem_status() -> None:
    """Carrier, DSR and CTS drop, their change bits are set, and the interrupt comes where it is enabled."""
    board = Board()
    board.put(MCR, 0x08)
    board.put(IER, 0x08)
    board.uart.set_connected(False)
    assert board.irq
    assert board.get(IIR) == 0x00
    assert board.get(MSR) == 0x0B
    assert not board.irq
    assert board.get(MSR) == 0


@pytest.fixture(scope="module")
def qemu() -> Iterator[QtestMachine]:
    if not available():
        pytest.skip("qemu-system-x86_64 is not installed")
    with QtestMachine(["-serial", "null"]) as machine:
        yield machine


_WRITES = st.one_of(
    st.tuples(st.just(IER), st.integers(0, 7)),
    st.tuples(st.just(LCR), st.sampled_from([0x03, 0x83, 0x1B])),
    st.tuples(st.just(MCR), st.sampled_from([0, 3, 8, 0x0B, 0x10, 0x1A, 0x1F])),
    st.tuples(st.just(SCR), st.integers(0, 255)),
    st.tuples(st.just(FCR), st.sampled_from([0, 1, 3, 5, 7])),
)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_WRITES, st.sampled_from([IER, IIR, LCR, MCR, LSR, MSR, SCR])), max_size=25))
def test_registers_agree_with_qemu(qemu: QtestMachine, operations: list[tuple[tuple[int, int], int]]) -> None:
    """Whatever is written to the control registers, every register reads as QEMU's."""
    board = Board()

    def out(register: int, value: int) -> None:
        board.put(register, value)
        qemu.command(f"outb {0x3F8 + register:#x} {value:#x}")

    def read(register: int) -> tuple[int, int]:
        return board.get(register), qemu.command(f"inb {0x3F8 + register:#x}")

    start = ((LCR, 0), (IER, 0), (MCR, 0), (FCR, 1), (FCR, 0), (LCR, 0x80), (DATA, 12), (IER, 0), (LCR, 0), (SCR, 0))
    for register, value in start:
        out(register, value)
    read(IIR)
    read(MSR)
    for (register, value), look in operations:
        out(register, value)
        ours, theirs = read(look)
        if look == MSR:
            # QEMU sets no change bits (and raises no interrupt) for what loopback changes; the data sheet does.
            ours, theirs = ours & 0xF0, theirs & 0xF0
        assert ours == theirs, (look, hex(ours), hex(theirs))
