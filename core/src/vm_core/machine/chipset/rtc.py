"""The MC146818 real-time clock with 128 bytes of CMOS memory.

Theory of operation. The date is the host's (or one that the user gave), plus what the guest set it off by; the time
registers are computed when they are read. One timer runs each second for the update and alarm flags and interrupts, a
second one only while the guest wants periodic interrupts. CMOS beyond the clock's 14 registers holds what PC firmware
expects there: memory sizes and the boot order.

Sources: Motorola MC146818A data sheet; the CMOS map as SeaBIOS reads it (src/hw/rtc.h).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from ...devices.registers import Register, load
from ...errors import UsageError
from ..clock import NANOSECONDS, Clock

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR, A, B, C, D = range(6, 14)
CENTURY = 0x32
#: Where IBM's PS/2 kept the century; read by some systems.
CENTURY_PS2 = 0x37

#: Register B: no updates; periodic, alarm, update interrupt; binary numbers; 24 hours.
B_SET, B_PIE, B_AIE, B_UIE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
#: Register C: any interrupt; periodic, alarm, update flag.
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10

#: The update cycle: UIP is up for 244 µs before the registers change.
UPDATE_NS = 244_000

REGISTERS = (
    Register("seconds", 0x00, help="seconds of the time"),
    Register("seconds_alarm", 0x01, help="seconds of the alarm; 0xc0 and above: any"),
    Register("minutes", 0x02, help="minutes of the time"),
    Register("minutes_alarm", 0x03, help="minutes of the alarm"),
    Register("hours", 0x04, help="hours of the time; bit 7: PM in 12-hour mode"),
    Register("hours_alarm", 0x05, help="hours of the alarm"),
    Register("weekday", 0x06, help="1 (Sunday) to 7"),
    Register("day", 0x07, help="day of the month"),
    Register("month", 0x08, help="1 to 12"),
    Register("year", 0x09, help="0 to 99"),
    Register("a", 0x0A, reset=0x26, help="bit 7 update in progress, 6-4 divider, 3-0 periodic rate", writable=0x7F),
    Register("b", 0x0B, reset=0x02, help="modes and interrupt enables"),
    Register("c", 0x0C, access="ro", help="interrupt flags, cleared by reading"),
    Register("d", 0x0D, access="ro", reset=0x80, help="bit 7: the battery is good"),
)


def parse_base(text: str) -> Callable[[], int]:
    """``-rtc base=``: what the clock shows, as a function giving nanoseconds since 1970 in the guest's zone."""
    if text == "utc":
        return time.time_ns
    if text == "localtime":
        return lambda: time.time_ns() + time.localtime().tm_gmtoff * NANOSECONDS
    try:
        start = datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise UsageError(f"-rtc base={text}: utc, localtime or a date like 2026-11-21T16:01:21 is needed") from None
    base = int(start.timestamp()) * NANOSECONDS - time.monotonic_ns()
    return lambda: base + time.monotonic_ns()


class Rtc:
    """Ports 0x70 (index, and NMI mask in bit 7) and 0x71 (data). *set_irq* drives interrupt line 8."""

    def __init__(
        self, clock: Clock, set_irq: Callable[[bool], object], wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self._clock = clock
        self._set_irq = set_irq
        self._wall_ns = wall_ns
        self.cmos = bytearray(128)
        load(REGISTERS, self.cmos)
        self._index = 0
        #: The guest's date minus the host's, in nanoseconds.
        self._offset = 0
        #: The date while SET holds it.
        self._frozen: datetime | None = None
        self._second = clock.timer(self._update)
        self._periodic = clock.timer(self._period)
        self._read_c_at = clock.now_ns()
        self._arm_second()

    def reset(self) -> None:
        """RESET clears interrupt enables and flags; date and memory live on the battery."""
        self.cmos[B] &= ~(B_PIE | B_AIE | B_UIE)
        self.cmos[C] = 0
        self._index = 0
        self._set_irq(False)
        self._arm_periodic()
        self._arm_second()

    # The date.

    def now(self) -> datetime:
        """The date that the guest sees."""
        if self._frozen is not None:
            return self._frozen
        # Not fromtimestamp(ns / 1e9): a float has not enough digits and would round up now and then.
        seconds, ns = divmod(self._wall_ns() + self._offset, NANOSECONDS)
        return _EPOCH + timedelta(seconds=seconds, microseconds=ns // 1000)

    def _set_now(self, date: datetime) -> None:
        since = date - _EPOCH
        ns = (since.days * 86400 + since.seconds) * NANOSECONDS + since.microseconds * 1000
        self._offset = ns - self._wall_ns()

    def _encode(self, value: int) -> int:
        return value if self.cmos[B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.cmos[B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self.cmos[B] & B_24H:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (0x80 if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.cmos[B] & B_24H:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _time_register(self, index: int, date: datetime) -> int:
        if index == HOURS:
            return self._encode_hour(date.hour)
        plain = {
            SECONDS: date.second,
            MINUTES: date.minute,
            WEEKDAY: date.isoweekday() % 7 + 1,
            DAY: date.day,
            MONTH: date.month,
            YEAR: date.year % 100,
        }
        return self._encode(plain[index])

    def _write_time(self, index: int, value: int) -> None:
        date = self.now()
        try:
            if index == SECONDS:
                date = date.replace(second=self._decode(value))
            elif index == MINUTES:
                date = date.replace(minute=self._decode(value))
            elif index == HOURS:
                date = date.replace(hour=self._decode_hour(value))
            elif index == DAY:
                date = _day_of(date, self._decode(value))
            elif index == MONTH:
                date = _month_of(date, self._decode(value))
            elif index == YEAR:
                date = _year_of(date, date.year // 100 * 100 + self._decode(value))
            elif index == CENTURY:
                date = _year_of(date, (value >> 4) * 1000 + (value & 15) * 100 + date.year % 100)
        except ValueError:
            return  # no such date: the chip would count on from nonsense, here it keeps the old one
        if self._frozen is not None:
            self._frozen = date
        else:
            self._set_now(date)

    # Ports.

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF  # the index cannot be read back
        index = self._index
        if index < A and index not in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
            return self._time_register(index, self.now())
        if index == A:
            return self.cmos[A] | (0x80 if self._updating() else 0)
        if index == C:
            return self._read_c()
        if index in (CENTURY, CENTURY_PS2):
            century = self.now().year // 100
            return century // 10 << 4 | century % 10
        return self.cmos[index]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == 0:
            self._index = value & 0x7F
            return
        index = self._index
        if index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
            self.cmos[index] = value
        elif index < A or index in (CENTURY, CENTURY_PS2):
            self._write_time(CENTURY if index == CENTURY_PS2 else index, value)
        elif index == A:
            self.cmos[A] = value & 0x7F
            self._arm_periodic()
        elif index == B:
            self._write_b(value)
        elif index not in (C, D):
            self.cmos[index] = value

    def _updating(self) -> bool:
        """An update is due within 244 µs (never while SET holds the clock or its divider is held)."""
        if self._halted():
            return False
        return (self._wall_ns() + self._offset) % NANOSECONDS >= NANOSECONDS - UPDATE_NS

    def _halted(self) -> bool:
        return bool(self.cmos[B] & B_SET) or self.cmos[A] & 0x70 >= 0x60

    def _write_b(self, value: int) -> None:
        if value & B_SET and not self.cmos[B] & B_SET:
            self._frozen = self.now()
            value &= ~B_UIE  # SET clears the update interrupt enable
        elif not value & B_SET and self._frozen is not None:
            frozen, self._frozen = self._frozen, None
            self._set_now(frozen)
        self.cmos[B] = value
        self._arm_periodic()
        self._arm_second()
        self._update_irq()

    def _read_c(self) -> int:
        """The flags, cleared. The periodic flag is computed where no interrupt keeps a timer for it."""
        flags = self.cmos[C]
        now = self._clock.now_ns()
        period = self._period_ns()
        if period and not self.cmos[B] & B_PIE and now - self._read_c_at >= period:
            flags |= C_PF
        self._read_c_at = now
        self.cmos[C] = 0
        self._set_irq(False)
        return flags

    # Interrupts.

    def _update_irq(self) -> None:
        if self.cmos[C] & self.cmos[B] & (C_PF | C_AF | C_UF):
            self.cmos[C] |= C_IRQF
            self._set_irq(True)
        else:
            self.cmos[C] &= ~C_IRQF
            self._set_irq(False)

    def _arm_second(self) -> None:
        if self._halted():
            self._second.cancel()
            return
        left = NANOSECONDS - (self._wall_ns() + self._offset) % NANOSECONDS
        self._second.arm(self._clock.now_ns() + left)

    def _update(self) -> None:
        """The update cycle has ended."""
        self.cmos[C] |= C_UF
        if self._alarm_matches(self.now()):
            self.cmos[C] |= C_AF
        self._update_irq()
        self._arm_second()

    def _alarm_matches(self, date: datetime) -> bool:
        second, minute, hour = self.cmos[SECONDS_ALARM], self.cmos[MINUTES_ALARM], self.cmos[HOURS_ALARM]
        return (
            (second >= 0xC0 or self._decode(second) == date.second)
            and (minute >= 0xC0 or self._decode(minute) == date.minute)
            and (hour >= 0xC0 or self._decode_hour(hour) == date.hour)
        )

    def _period_ns(self) -> int:
        """Nanoseconds between periodic flags, 0 for none: rates 1 and 2 repeat 8 and 9."""
        rate = self.cmos[A] & 15
        if rate == 0 or self.cmos[A] & 0x70 >= 0x60:
            return 0
        if rate <= 2:
            rate += 7
        return NANOSECONDS * (1 << (rate - 1)) // 32768

    def _arm_periodic(self) -> None:
        period = self._period_ns()
        if period and self.cmos[B] & B_PIE:
            now = self._clock.now_ns()
            self._periodic.arm((now // period + 1) * period)
        else:
            self._periodic.cancel()

    def _period(self) -> None:
        self.cmos[C] |= C_PF
        self._update_irq()
        self._arm_periodic()


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# The guest writes day, month and year one after another, and what is there in between need not be a date: the day is
# kept within the month, and a day that does not exist moves into the next month when the clock goes on, as on the chip.


def _day_of(date: datetime, day: int) -> datetime:
    return date.replace(day=1) + timedelta(days=day - 1)


def _month_of(date: datetime, month: int) -> datetime:
    return _day_of(date.replace(day=1, month=month), min(date.day, _days_in(date.year, month)))


def _year_of(date: datetime, year: int) -> datetime:
    return _day_of(date.replace(day=1, year=year), min(date.day, _days_in(year, date.month)))


def _days_in(year: int, month: int) -> int:
    following = datetime(year + month // 12, month % 12 + 1, 1)
    return (following - timedelta(days=1)).day


def set_memory_size(cmos: bytearray, below_4g: int, above_4g: int) -> None:
    """Where firmware looks for the size of RAM (bytes): base, extended, above 16 MiB, above 4 GiB."""
    extended = min((below_4g >> 10) - 1024, 0xFFFF)
    cmos[0x15:0x17] = (640).to_bytes(2, "little")
    cmos[0x17:0x19] = cmos[0x30:0x32] = max(0, extended).to_bytes(2, "little")
    cmos[0x34:0x36] = max(0, (below_4g - (16 << 20)) >> 16).to_bytes(2, "little")
    cmos[0x5B:0x5E] = (above_4g >> 16).to_bytes(3, "little")
