"""The 8254: counting, modes, latches, and the timer interrupt, by the data sheet."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_core.machine.chipset.pit import FREQUENCY, Pit, Port61, ticks_to_ns
from vm_core.machine.clock import Clock, ManualClock


class Board:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.edges: list[int] = []
        self._level = False
        self.pit = Pit(self.clock, self._irq)
        self.port61 = Port61(self.clock, self.pit)

    def _irq(self, level: bool) -> None:
        if level and not self._level:
            self.edges.append(self.clock.now_ns())
        self._level = level

    def program(self, counter: int, mode: int, count: int, bcd: int = 0) -> None:
        self.pit.write(3, 1, counter << 6 | 0x30 | mode << 1 | bcd)
        self.pit.write(counter, 1, count & 0xFF)
        self.pit.write(counter, 1, count >> 8)

    def ticks(self, count: int) -> None:
        """Let *count* input clocks pass, counted from time zero without rounding errors."""
        self._ticks = getattr(self, "_ticks", 0) + count
        self.clock.advance(ticks_to_ns(self._ticks) - self.clock.now_ns())

    def value(self, counter: int) -> int:
        self.pit.write(3, 1, counter << 6)
        return self.pit.read(counter, 1) | self.pit.read(counter, 1) << 8

    def status(self, counter: int) -> int:
        self.pit.write(3, 1, 0xE0 | 2 << counter)
        return self.pit.read(counter, 1)


@pytest.mark.parametrize("mode", [2, 3])
def test_a_periodic_mode_interrupts_once_a_period(mode: int) -> None:
    """In modes 2 and 3 the interrupt line rises every count input clocks."""
    board = Board()
    board.program(0, mode, 11932)
    board.clock.advance(1_000_000_000)
    assert len(board.edges) == FREQUENCY // 11932
    period = 11932 * 1_000_000_000 / FREQUENCY
    assert all(abs(at - period * (n + 1)) < 2 for n, at in enumerate(board.edges))


def test_mode_0_interrupts_once() -> None:
    """Mode 0 raises its output when the count is used up, and keeps it."""
    board = Board()
    board.program(0, 0, 1000)
    board.ticks(999)
    assert board.edges == []
    board.ticks(1)
    assert len(board.edges) == 1
    board.ticks(100_000)
    assert len(board.edges) == 1
    assert board.status(0) & 0x80


def test_mode_4_strobes_once() -> None:
    """Mode 4 goes low for one clock at the end: one rising edge behind it."""
    board = Board()
    board.program(0, 4, 1000)
    board.ticks(1000)
    assert not board.status(0) & 0x80
    board.ticks(100_000)
    assert len(board.edges) == 1


def test_a_slow_host_loses_ticks_and_keeps_the_phase() -> None:
    """A timer that is noticed late interrupts once, and next at the following whole period."""
    board = Board()
    board.program(0, 2, 1000)
    board.clock._now = ticks_to_ns(5500)  # nobody looked for five periods
    board.clock.run_due()
    board.clock.advance(ticks_to_ns(6000) - ticks_to_ns(5500))
    assert board.edges == [ticks_to_ns(5500), ticks_to_ns(6000)]


@given(st.integers(1, 0xFFFF), st.integers(0, 200_000))
def test_mode_2_counts_from_the_count_to_one(count: int, passed: int) -> None:
    """The value of mode 2 repeats count, count-1, …, 1."""
    board = Board()
    board.program(1, 2, count)
    board.ticks(passed)
    assert board.value(1) == count - passed % count


@given(st.integers(1, 0xFFFF), st.integers(0, 200_000))
def test_mode_0_counts_down_and_wraps(count: int, passed: int) -> None:
    """The value of mode 0 goes on through zero; its output is high from there on."""
    board = Board()
    board.program(1, 0, count)
    board.ticks(passed)
    assert board.value(1) == (count - passed) & 0xFFFF
    assert bool(board.status(1) & 0x80) == (passed >= count)


def test_mode_3_is_high_for_half_of_the_period() -> None:
    """The square wave of an odd count is high for (n+1)/2 clocks."""
    board = Board()
    board.program(1, 3, 9)
    levels = []
    for _ in range(18):
        levels.append(bool(board.status(1) & 0x80))
        board.ticks(1)
    assert levels == ([True] * 5 + [False] * 4) * 2


def test_a_count_of_zero_is_the_largest() -> None:
    """Zero stands for 65536, or 10000 in BCD."""
    board = Board()
    board.program(1, 2, 0)
    board.ticks(1)
    assert board.value(1) == 0xFFFF
    board.program(1, 2, 0, bcd=1)
    board.ticks(1)
    assert board.value(1) == 0x9999


def test_a_latched_count_is_held_until_it_was_read() -> None:
    """A latch keeps its value over further latches and time, until both bytes were read."""
    board = Board()
    board.program(1, 0, 1000)
    board.pit.write(3, 1, 0x40)
    board.ticks(10)
    board.pit.write(3, 1, 0x40)
    assert board.pit.read(1, 1) | board.pit.read(1, 1) << 8 == 1000
    assert board.value(1) == 990


def test_read_back_gives_status_then_count() -> None:
    """With both latched the status byte comes first: output, null count, access, mode, BCD."""
    board = Board()
    board.program(2, 3, 0x1234)
    board.pit.write(3, 1, 0xC8)
    assert board.pit.read(2, 1) & 0x7F == 0x36
    assert board.pit.read(2, 1) | board.pit.read(2, 1) << 8 == 0x1234


def test_null_count_shows_until_the_count_is_there() -> None:
    """After a control word the status says that no count was loaded yet."""
    board = Board()
    board.pit.write(3, 1, 0x30)
    assert board.status(0) & 0x40
    board.pit.write(0, 1, 0)
    board.pit.write(0, 1, 1)
    assert not board.status(0) & 0x40


def test_port_61_gates_and_shows_counter_2() -> None:
    """A calibration loop: gate on, mode 0, output bit 5 rises after count clocks; a closed gate holds the count."""
    board = Board()
    board.port61.write(0, 1, 0x01)
    board.program(2, 0, 1000)
    board.ticks(999)
    assert not board.port61.read(0, 1) & 0x20
    board.ticks(1)
    assert board.port61.read(0, 1) & 0x21 == 0x21
    board.program(2, 0, 1000)
    board.ticks(300)
    board.port61.write(0, 1, 0x00)
    board.ticks(5000)
    assert board.value(2) == 700
    board.port61.write(0, 1, 0x01)
    board.ticks(700)
    assert board.port61.read(0, 1) & 0x20


def test_refresh_toggles() -> None:
    """Bit 4 of port 0x61 changes every 15 µs: programs count its changes to wait."""
    board = Board()
    seen = set()
    for _ in range(4):
        seen.add(board.port61.read(0, 1) & 0x10)
        board.clock.advance(15_085)
    assert seen == {0, 0x10}


@pytest.mark.parametrize("mode", [0, 4])
def test_a_count_that_ends_while_it_is_written_still_interrupts(mode: int) -> None:
    """One-shot modes tell the end of a count of a few microseconds, however late the program around them is."""

    class LateClock(Clock):
        """Time goes on by 50 µs whenever somebody looks at it."""

        late = 0

        def now_ns(self) -> int:
            self.late += 50_000
            return self.late

    clock = LateClock()
    levels: list[bool] = []
    pit = Pit(clock, levels.append)
    pit.write(3, 1, 0x30 | mode << 1)
    levels.clear()
    pit.write(0, 1, 15)
    pit.write(0, 1, 0)
    assert pit._timer.armed
    assert not any(levels)
    pit._tick()
    assert levels[-1]
    assert pit.counters[0].next_rise() is None
