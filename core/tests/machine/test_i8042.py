"""The keyboard controller: what SeaBIOS, Linux and GRUB ask of it, and its answers against QEMU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_core.machine.chipset.i8042 import I8042, CommandPort
from vm_core.testing.qtest import QtestMachine, available


class Board:
    def __init__(self) -> None:
        self.levels = {1: False, 12: False}
        self.resets: list[str] = []
        self.chip = I8042(self.levels.__setitem__, self.resets.append)
        self.ports = {0x60: self.chip, 0x64: CommandPort(self.chip)}

    def out(self, port: int, value: int) -> None:
        self.ports[port].write(0, 1, value)

    def inb(self, port: int) -> int:
        return self.ports[port].read(0, 1)

    def answers(self) -> list[int]:
        found = []
        while self.inb(0x64) & 1:
            found.append(self.inb(0x60))
        return found


def test_self_tests() -> None:
    """Controller, keyboard interface and mouse interface pass."""
    board = Board()
    for command, answer in ((0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00)):
        board.out(0x64, command)
        assert board.answers() == [answer]


def test_keyboard_reset_and_identification() -> None:
    """Reset answers ACK and self-test passed; the identity of an MF II keyboard comes translated."""
    board = Board()
    board.out(0x60, 0xFF)
    assert board.answers() == [0xFA, 0xAA]
    board.out(0x60, 0xF2)
    assert board.answers() == [0xFA, 0xAB, 0x41]


def test_keys_arrive_translated_with_an_interrupt() -> None:
    """Set 2 from the keyboard becomes set 1; a release sets bit 7; each byte raises line 1."""
    board = Board()
    board.chip.keys([0x1C, 0xF0, 0x1C, 0xE0, 0x75])  # A down, A up, cursor up
    seen = []
    while board.levels[1]:
        seen.append(board.inb(0x60))
    assert seen == [0x1E, 0x9E, 0xE0, 0x48]


def test_mouse_behind_command_d4() -> None:
    """A byte after 0xd4 goes to the mouse; its answers are marked and raise line 12."""
    board = Board()
    board.out(0x64, 0xD4)
    board.out(0x60, 0xFF)
    seen = []
    while board.inb(0x64) & 1:
        assert board.inb(0x64) & 0x20
        assert board.levels[12]
        seen.append(board.inb(0x60))
    assert seen == [0xFA, 0xAA, 0x00]


def test_reset_of_the_processor() -> None:
    """0xfe pulses the reset line; so does bit 0 of the output port."""
    board = Board()
    board.out(0x64, 0xFE)
    board.out(0x64, 0xD1)
    board.out(0x60, 0x02)
    assert board.resets == ["keyboard controller"] * 2


def test_a20() -> None:
    """0xdd and 0xdf and the output port move A20, which the output port shows."""
    board = Board()
    for command, expected in ((0xDD, 0), (0xDF, 2)):
        board.out(0x64, command)
        board.out(0x64, 0xD0)
        assert board.answers()[0] & 2 == expected


@pytest.fixture(scope="module")
def qemu() -> Iterator[QtestMachine]:
    if not available():
        pytest.skip("qemu-system-x86_64 is not installed")
    with QtestMachine([]) as machine:
        yield machine


_KEYBOARD = st.one_of(
    st.sampled_from([(0xEE,), (0xF2,), (0xF4,), (0xF5,), (0xF6,), (0xFF,), (0xF0, 0), (0xF0, 2), (0xF3, 0x20)]),
    st.tuples(st.just(0xED), st.integers(0, 7)),
)
_MOUSE = st.sampled_from(
    [(0xE6,), (0xE7,), (0xE8, 3), (0xE9,), (0xEA,), (0xF0,), (0xF2,), (0xF3, 60), (0xF5,), (0xF6,), (0xFF,)]
)
_OPERATIONS = st.one_of(
    st.tuples(st.just("controller"), st.sampled_from([(0xAA,), (0xA9,), (0xAB,), (0x20,), (0xAE,), (0xA8,)])),
    st.tuples(st.just("ctr"), st.sampled_from([(0x47,), (0x45,), (0x44,), (0x07,)])),
    st.tuples(st.just("keyboard"), _KEYBOARD),
    st.tuples(st.just("mouse"), _MOUSE),
    st.tuples(st.just("echo"), st.tuples(st.sampled_from([0xD2, 0xD3]), st.integers(0, 255))),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_OPERATIONS, max_size=15))
def test_answers_agree_with_qemu(qemu: QtestMachine, operations: list[tuple[str, tuple[int, ...]]]) -> None:
    """Whatever controller, keyboard and mouse are told, the bytes that come back are QEMU's, from the same side."""
    board = Board()

    def out(port: int, value: int) -> None:
        board.out(port, value)
        qemu.command(f"outb {port:#x} {value:#x}")

    def compare() -> None:
        for _ in range(16):
            status, theirs = board.inb(0x64), qemu.command("inb 0x64")
            assert status & 0x21 == theirs & 0x21, (hex(status), hex(theirs))
            if not status & 1:
                return
            assert board.inb(0x60) == qemu.command("inb 0x60")

    # Both begin in the same state, whatever ran before.
    while qemu.command("inb 0x64") & 1:
        qemu.command("inb 0x60")
    for port, value in ((0x64, 0xAA), (0x64, 0x60), (0x60, 0x47)):
        out(port, value)
        compare()
    for side in ((), (0xD4,)):
        for command in side:
            out(0x64, command)
        out(0x60, 0xFF)
        compare()
    for kind, data in operations:
        if kind == "controller":
            out(0x64, data[0])
            compare()
            continue
        if kind == "ctr":
            out(0x64, 0x60)
        elif kind == "echo":
            out(0x64, data[0])
            data = data[1:]
        for byte in data:
            if kind == "mouse":
                out(0x64, 0xD4)
            out(0x60, byte)
            compare()
