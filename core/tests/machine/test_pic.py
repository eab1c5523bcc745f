"""The pair of 8259As: by the data sheet, and against the pair in QEMU."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_core.machine.chipset.pic import ElcrPorts, PicPair, PicPorts
from vm_core.testing.qtest import QtestMachine, available


class Board:
    """A pair with its ports, initialised as a PC's firmware does it: vectors 8 and 0x70."""

    def __init__(self) -> None:
        self.raised = 0
        self.pair = PicPair(self._notify)
        self.ports = {
            0x20: PicPorts(self.pair, self.pair.master),
            0xA0: PicPorts(self.pair, self.pair.slave),
            0x4D0: ElcrPorts(self.pair),
        }
        for port, base, cascade in ((0x20, 8, 4), (0xA0, 0x70, 2)):
            for offset, value in ((0, 0x11), (1, base), (1, cascade), (1, 1)):
                self.out(port + offset, value)

    def _notify(self) -> None:
        self.raised += 1

    def out(self, port: int, value: int) -> None:
        base = port & ~1
        self.ports[base].write(port - base, 1, value)

    def inb(self, port: int) -> int:
        base = port & ~1
        return self.ports[base].read(port - base, 1)

    def pulse(self, irq: int) -> None:
        self.pair.set_irq(irq, True)
        self.pair.set_irq(irq, False)


def test_the_lower_number_is_served_first() -> None:
    """Of two requests the one with the higher priority is acknowledged first, the other after its end of interrupt."""
    board = Board()
    board.pulse(4)
    board.pulse(1)
    assert board.pair.pending()
    assert board.pair.acknowledge() == 8 + 1
    assert not board.pair.pending()
    board.out(0x20, 0x20)
    assert board.pair.acknowledge() == 8 + 4


def test_a_request_interrupts_only_what_is_less_urgent() -> None:
    """While a level is in service, only higher ones show INTR."""
    board = Board()
    board.pulse(3)
    board.pair.acknowledge()
    board.pulse(5)
    assert not board.pair.pending()
    board.pulse(0)
    assert board.pair.acknowledge() == 8


def test_the_second_chip_is_acknowledged_through_the_first() -> None:
    """A line above 7 gives the second chip's vector and is in service in both."""
    board = Board()
    board.pulse(14)
    assert board.pair.acknowledge() == 0x76
    board.out(0x20, 0x0B)
    board.out(0xA0, 0x0B)
    assert (board.inb(0x20), board.inb(0xA0)) == (0x04, 0x40)


def test_a_masked_line_is_remembered() -> None:
    """An edge on a masked line shows once it is unmasked."""
    board = Board()
    board.out(0x21, 0xFF)
    board.pulse(4)
    assert not board.pair.pending()
    board.out(0x21, 0x00)
    assert board.pair.acknowledge() == 12


def test_a_level_line_asks_again_until_it_drops() -> None:
    """A level-triggered line that is up after the end of interrupt interrupts once more; an edge line does not."""
    board = Board()
    board.out(0x4D1, 0x08)  # line 11
    board.pair.set_irq(11, True)
    board.pair.set_irq(12, True)
    assert board.pair.acknowledge() == 0x73
    board.out(0xA0, 0x20)
    board.out(0x20, 0x20)
    assert board.pair.acknowledge() == 0x73
    board.pair.set_irq(11, False)
    board.out(0xA0, 0x20)
    board.out(0x20, 0x20)
    assert board.pair.acknowledge() == 0x74
    board.out(0xA0, 0x20)
    board.out(0x20, 0x20)
    assert not board.pair.pending()


@pytest.mark.parametrize(("irq", "vector", "service"), [(5, 8 + 7, (0, 0)), (10, 0x70 + 7, (4, 0))])
def test_a_level_that_drops_too_early_is_spurious(irq: int, vector: int, service: tuple[int, int]) -> None:
    """The acknowledge cycle finds nothing, answers with input 7, and leaves that input out of service."""
    board = Board()
    board.out(0x4D0, 0x20)
    board.out(0x4D1, 0x04)
    board.pair.set_irq(irq, True)
    if irq >= 8:
        # The first chip is committed before the second one looks: hold its request as the wire would.
        board.pair.slave.irr = 0
    else:
        board.pair.set_irq(irq, False)
    assert board.pair.acknowledge() == vector
    board.out(0x20, 0x0B)
    board.out(0xA0, 0x0B)
    assert (board.inb(0x20), board.inb(0xA0)) == service


def test_intr_is_told_once_a_rise() -> None:
    """The processor is notified when INTR goes up, not for every request behind it."""
    board = Board()
    board.pulse(3)
    board.pulse(4)
    assert board.raised == 1


def test_lines_that_are_always_edge_triggered() -> None:
    """ELCR has no bits for lines 0, 1, 2, 8 and 13."""
    board = Board()
    board.out(0x4D0, 0xFF)
    board.out(0x4D1, 0xFF)
    assert (board.inb(0x4D0), board.inb(0x4D1)) == (0xF8, 0xDE)


def test_in_special_mask_mode_a_masked_level_is_not_ended_by_a_plain_eoi() -> None:
    """8259A data sheet, "Special Mask Mode": the non-specific EOI passes over masked levels in service."""
    board = Board()
    board.pulse(2 + 1)
    board.pair.acknowledge()
    board.out(0x21, 0x08)
    board.out(0x20, 0x68)
    board.pulse(6)
    assert board.pair.acknowledge() == 8 + 6
    board.out(0x20, 0x20)
    board.out(0x20, 0x0B)
    assert board.inb(0x20) == 0x08


@pytest.fixture(scope="module")
def qemu() -> Iterator[QtestMachine]:
    if not available():
        pytest.skip("qemu-system-x86_64 is not installed")
    with QtestMachine(["-no-hpet"]) as machine:
        # The timer is made quiet: mode 0 raises its output once, a microsecond from now.
        for port, value in ((0x43, 0x30), (0x40, 1), (0x40, 0)):
            machine.command(f"outb {port:#x} {value:#x}")
        time.sleep(0.1)
        yield machine


_OPERATIONS = st.one_of(
    st.tuples(st.just("line"), st.sampled_from([0, 1, 3, 4, 5, 6, 7]), st.booleans()),
    st.tuples(st.just("ocw2"), st.integers(0, 7), st.integers(0, 7)),
    st.tuples(st.just("mask"), st.integers(0, 255), st.just(0)),
    st.tuples(st.just("special"), st.booleans(), st.just(0)),
    st.tuples(st.just("poll"), st.just(0), st.just(0)),
)


@pytest.mark.parametrize(("port", "device", "icw3"), [(0x20, 6, 4), (0xA0, 7, 2)])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_registers_agree_with_qemu(qemu: QtestMachine, port: int, device: int, icw3: int, data: st.DataObject) -> None:
    """After any sequence of lines, masks, ends of interrupt, rotations and polls, IRR, ISR and IMR are QEMU's."""
    board = Board()
    pic = board.pair.master if port == 0x20 else board.pair.slave
    auto_eoi = data.draw(st.booleans())
    for line in range(8):
        if line != 2 or port != 0x20:
            qemu.command(f"set_irq_in /machine/unattached/device[{device}] unnamed-gpio-in {line} 0")

    def out(offset: int, value: int) -> None:
        board.out(port + offset, value)
        qemu.command(f"outb {port + offset:#x} {value:#x}")

    def compare(offset: int) -> int:
        ours, theirs = board.inb(port + offset), qemu.command(f"inb {port + offset:#x}")
        assert ours == theirs, (hex(ours), hex(theirs))
        return ours

    for offset, value in ((0, 0x11), (1, 0x40), (1, icw3), (1, 3 if auto_eoi else 1)):
        out(offset, value)
    special = False
    for kind, first, second in data.draw(st.lists(_OPERATIONS, max_size=25)):
        if kind == "line":
            pic.set_line(int(first), bool(second))
            board.pair._update()
            level = int(bool(second))
            qemu.command(f"set_irq_in /machine/unattached/device[{device}] unnamed-gpio-in {first} {level}")
        elif kind == "ocw2":
            if special and first in (1, 5):
                continue  # QEMU ends masked levels here, against the data sheet
            out(0, int(first) << 5 | int(second))
        elif kind == "mask":
            out(1, int(first))
        elif kind == "special":
            special = bool(first)
            out(0, 0x68 if special else 0x48)
        else:
            out(0, 0x0C)
            ours, theirs = board.inb(port), qemu.command(f"inb {port:#x}")
            # Bits 0-2 mean something only when bit 7 says that there was a request.
            assert ours & 0x80 == theirs & 0x80
            assert not ours & 0x80 or ours == theirs
        out(0, 0x0A)
        compare(0)
        out(0, 0x0B)
        compare(0)
        compare(1)
