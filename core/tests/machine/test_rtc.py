"""The real-time clock: the date in every mode, setting it, alarms and interrupts, CMOS sizes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_core.errors import UsageError
from vm_core.machine.chipset import rtc
from vm_core.machine.clock import ManualClock

START = datetime(2026, 11, 21, 16, 1, 58, 500_000, tzinfo=UTC)
SECOND = 1_000_000_000


class Board:
    def __init__(self, start: datetime = START) -> None:
        self.clock = ManualClock()
        base = int(start.timestamp()) * SECOND + start.microsecond * 1000
        self.irqs = 0
        self.level = False
        self.rtc = rtc.Rtc(self.clock, self._irq, lambda: base + self.clock.now_ns())

    def _irq(self, level: bool) -> None:
        self.irqs += level and not self.level
        self.level = level

    def get(self, register: int) -> int:
        self.rtc.write(0, 1, register)
        return self.rtc.read(1, 1)

    def put(self, register: int, value: int) -> None:
        self.rtc.write(0, 1, register)
        self.rtc.write(1, 1, value)

    def date(self) -> tuple[int, ...]:
        names = (rtc.CENTURY, rtc.YEAR, rtc.MONTH, rtc.DAY, rtc.HOURS, rtc.MINUTES, rtc.SECONDS)
        return tuple(self.get(name) for name in names)


def test_the_date_is_shown_in_bcd() -> None:
    """Out of the box: BCD, 24 hours, Sunday is day 1."""
    board = Board()
    assert board.date() == (0x20, 0x26, 0x11, 0x21, 0x16, 0x01, 0x58)
    assert board.get(rtc.WEEKDAY) == 7
    board.clock.advance(2 * SECOND)
    assert board.date() == (0x20, 0x26, 0x11, 0x21, 0x16, 0x02, 0x00)


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hours(hour: int, shown: int) -> None:
    """In 12-hour mode midnight is 12 AM and bit 7 is PM; setting understands the same."""
    board = Board(START.replace(hour=hour))
    board.put(rtc.B, 0)
    assert board.get(rtc.HOURS) == shown
    board.put(rtc.HOURS, shown)
    board.put(rtc.B, rtc.B_24H | rtc.B_BINARY)
    assert board.get(rtc.HOURS) == hour


@given(st.datetimes(datetime(1980, 1, 1), datetime(2079, 12, 31)), st.booleans())
def test_a_date_that_is_set_is_shown(date: datetime, binary: bool) -> None:
    """Held by SET and written register by register in any mode, the clock goes on from there."""
    board = Board()
    mode = rtc.B_24H | (rtc.B_BINARY if binary else 0)
    board.put(rtc.B, rtc.B_SET | mode)

    def encode(value: int) -> int:
        return value if binary else value // 10 << 4 | value % 10

    century = date.year // 100
    board.put(rtc.CENTURY, century // 10 << 4 | century % 10)
    values = {
        rtc.YEAR: date.year % 100,
        rtc.MONTH: date.month,
        rtc.DAY: date.day,
        rtc.HOURS: date.hour,
        rtc.MINUTES: date.minute,
        rtc.SECONDS: date.second,
    }
    for register, value in values.items():
        board.put(register, encode(value))
    board.clock.advance(10 * SECOND)
    board.put(rtc.B, mode)
    for register, value in values.items():
        assert board.get(register) == encode(value)
    assert board.get(rtc.WEEKDAY) == date.isoweekday() % 7 + 1


def test_update_in_progress_comes_before_the_second_changes() -> None:
    """UIP is up for the last 244 µs of a second and no longer."""
    board = Board(START.replace(microsecond=0))
    board.clock.advance(SECOND - rtc.UPDATE_NS - 1)
    assert not board.get(rtc.A) & 0x80
    board.clock.advance(1)
    assert board.get(rtc.A) & 0x80
    second = board.get(rtc.SECONDS)
    board.clock.advance(rtc.UPDATE_NS)
    assert not board.get(rtc.A) & 0x80
    assert board.get(rtc.SECONDS) == second + 1


def test_update_interrupt_each_second() -> None:
    """With UIE the line rises each second, once flags were read."""
    board = Board()
    board.put(rtc.B, rtc.B_24H | rtc.B_UIE)
    for n in range(1, 4):
        board.clock.advance(SECOND)
        assert board.irqs == n
        # The periodic flag goes on at its own rate, whether anybody wants its interrupt or not.
        assert board.get(rtc.C) & ~rtc.C_PF == rtc.C_IRQF | rtc.C_UF
        assert not board.level
        assert board.get(rtc.C) == 0


def test_alarm_at_a_time_of_day() -> None:
    """The alarm rings when hours, minutes and seconds match, once; 0xc0 and above match anything."""
    board = Board()
    for register, value in ((rtc.HOURS_ALARM, 0xFF), (rtc.MINUTES_ALARM, 0x02), (rtc.SECONDS_ALARM, 0x01)):
        board.put(register, value)
    board.put(rtc.B, rtc.B_24H | rtc.B_AIE)
    board.clock.advance(2 * SECOND)
    assert board.irqs == 0
    board.clock.advance(SECOND)
    assert board.irqs == 1
    assert board.get(rtc.C) & rtc.C_AF
    board.clock.advance(60 * SECOND)
    assert board.irqs == 1


def test_periodic_interrupt() -> None:
    """Rate 6 is 1024 Hz; without the enable the flag is set and nobody is told."""
    board = Board()
    board.clock.advance(SECOND)
    assert board.get(rtc.C) & rtc.C_PF
    assert board.irqs == 0
    board.put(rtc.B, rtc.B_24H | rtc.B_PIE)
    seen = 0
    for _ in range(1024):
        board.clock.advance(SECOND // 1024 + 1)
        seen += bool(board.get(rtc.C) & rtc.C_PF)
    assert board.irqs >= 1023
    assert seen >= 1023


def test_memory_survives_a_reset() -> None:
    """A reset clears the interrupt enables and leaves memory and date."""
    board = Board()
    board.put(0x40, 0x5A)
    board.put(rtc.B, rtc.B_24H | rtc.B_UIE)
    board.rtc.reset()
    assert board.get(0x40) == 0x5A
    assert board.get(rtc.B) == rtc.B_24H
    assert board.get(rtc.D) == 0x80


def test_sizes_for_firmware() -> None:
    """Extended memory in KiB up to 64 MiB, above 16 MiB and above 4 GiB in units of 64 KiB."""
    cmos = bytearray(128)
    rtc.set_memory_size(cmos, 0xC0000000, 1 << 30)
    assert int.from_bytes(cmos[0x30:0x32], "little") == 0xFFFF
    assert int.from_bytes(cmos[0x34:0x36], "little") == (0xC0000000 - (16 << 20)) >> 16
    assert int.from_bytes(cmos[0x5B:0x5E], "little") == 1 << 14
    rtc.set_memory_size(cmos, 8 << 20, 0)
    assert int.from_bytes(cmos[0x30:0x32], "little") == 7 * 1024
    assert int.from_bytes(cmos[0x34:0x36], "little") == 0


def test_base() -> None:
    """A date as base is where the clock begins; nonsense is refused."""
    now = rtc.parse_base("2001-02-03T04:05:06")() / SECOND
    assert abs(now - datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC).timestamp()) < 5
    with pytest.raises(UsageError, match="base=tomorrow"):
        rtc.parse_base("tomorrow")
