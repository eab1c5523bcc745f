"""The 8254 timer: three 16-bit counters at 1.193182 MHz, and system control port 0x61.

Theory of operation. A counter is not counted: its value and its OUT pin are computed from the virtual time since it was
loaded. Only counter 0 needs a timer, for the moments at which its OUT rises and interrupts on line 0. Counter 1 (DRAM
refresh on old boards) counts and is connected to nothing; counter 2's gate and output are in port 0x61.

A guest that is too slow for its tick loses ticks: they are not made up, but the phase is kept.

Sources: Intel 82C54 data sheet (231244-006), 82371SB (PIIX3) data sheet 2.5.4 and 2.5.7 for port 0x61.
"""

from __future__ import annotations

from collections.abc import Callable

from ..clock import NANOSECONDS, Clock

#: Hz.
FREQUENCY = 1_193_182


def ticks_to_ns(ticks: int) -> int:
    """The first nanosecond at which *ticks* input clocks have passed."""
    return -(-ticks * NANOSECONDS // FREQUENCY)


class Counter:
    """One counter of the 8254."""

    def __init__(self, clock: Clock, changed: Callable[[], object]) -> None:
        self._clock = clock
        #: Called when mode or count changed.
        self._changed = changed
        self.gate = True
        self.reset()

    def reset(self) -> None:
        """Undefined after power-on by the data sheet; here: mode 3 with the longest count, not yet loaded."""
        self.mode = 3
        self.bcd = False
        #: 1: low byte, 2: high byte, 3: low then high.
        self.access = 3
        #: Input clocks of one period: 1 to 65536.
        self.count = 0x10000
        #: A count was written since the mode: without one nothing counts.
        self.loaded = False
        #: Modes 0 and 4: the count was written and its end not yet told. It may lie in the past by the time somebody
        #: looks (a dozen microseconds are a count that systems use), and is no less an edge of OUT for that.
        self.pending = False
        #: When counting began, in input clocks.
        self.start = self._now()
        #: The gate is low in a mode that stops then: ticks counted before that.
        self.held: int | None = None
        self.write_low: int | None = None
        self.read_high = False
        self.latch: int | None = None
        self.status: int | None = None

    def _now(self) -> int:
        """Input clocks since virtual time began."""
        return self._clock.now_ns() * FREQUENCY // NANOSECONDS

    def elapsed(self) -> int:
        """Input clocks since counting began."""
        return self.held if self.held is not None else self._now() - self.start

    @property
    def modulus(self) -> int:
        """What a count of zero stands for."""
        return 10_000 if self.bcd else 0x10000

    def value(self) -> int:
        """The counting element, as a number below :attr:`modulus`."""
        passed = self.elapsed()
        count = self.count
        if self.mode == 2:
            left = count - passed % count
        elif self.mode == 3:
            left = count - 2 * passed % count
        else:
            left = count - passed
        return left % self.modulus

    def out(self) -> bool:
        """The OUT pin."""
        passed = self.elapsed()
        mode = self.mode
        if mode in (0, 1):
            return self.loaded and passed >= self.count
        if not self.loaded:
            return True
        if mode == 2:
            return not self.gate or passed % self.count != self.count - 1
        if mode == 3:
            return not self.gate or passed % self.count < (self.count + 1) // 2
        return passed != self.count

    def next_rise(self) -> int | None:
        """Virtual time of the next rising edge of OUT that was not told; None if another write must come first."""
        if not self.loaded or self.held is not None:
            return None
        mode = self.mode
        if mode in (2, 3):
            ticks = (self.elapsed() // self.count + 1) * self.count
        elif mode in (0, 4) and self.pending:
            ticks = self.count + (1 if mode == 4 else 0)
        else:
            return None
        return ticks_to_ns(self.start + ticks)

    def set_gate(self, gate: bool) -> None:
        """Modes 0 and 4 pause while the gate is low; a rising gate starts modes 1 and 5 and restarts 2 and 3."""
        if gate == self.gate:
            return
        if self.mode in (0, 4):
            if gate:
                self._resume()
            elif self.held is None:
                self.held = self.elapsed()
        elif gate:
            self.held = None
            self.start = self._now()
        elif self.mode in (2, 3):
            self.held = 0
        self.gate = gate
        self._changed()

    def _resume(self) -> None:
        if self.held is not None:
            self.start = self._now() - self.held
            self.held = None

    # Registers.

    def control(self, access: int, mode: int, bcd: bool) -> None:
        """A control word for this counter."""
        self.access = access
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = bcd
        self.loaded = False
        self.pending = False
        self.write_low = None
        self.read_high = False
        self.latch = None
        self.status = None
        self.held = None
        self._changed()

    def latch_count(self) -> None:
        """Hold the count until it was read; a second latch before that does nothing."""
        if self.latch is None:
            self.latch = self._encode(self.value())

    def latch_status(self) -> None:
        """Hold the status byte until it was read."""
        if self.status is None:
            null = 0 if self.loaded else 0x40
            self.status = self.out() << 7 | null | self.access << 4 | self.mode << 1 | self.bcd

    def _encode(self, value: int) -> int:
        return int(str(value), 16) if self.bcd else value

    def read(self) -> int:
        """A byte of the counter's port."""
        if self.status is not None:
            status, self.status = self.status, None
            return status
        value = self.latch if self.latch is not None else self._encode(self.value())
        if self.access == 3:
            high, self.read_high = self.read_high, not self.read_high
            if high:
                self.latch = None
            elif self.latch is None:
                # Both halves of an unlatched read should belong together; real software latches.
                return value & 0xFF
            return value >> 8 if high else value & 0xFF
        self.latch = None
        return value & 0xFF if self.access == 1 else value >> 8

    def write(self, value: int) -> None:
        """A byte to the counter's port."""
        if self.access == 1:
            self._load(value)
        elif self.access == 2:
            self._load(value << 8)
        elif self.write_low is None:
            self.write_low = value
            if self.mode == 0:
                # The first byte stops a count that is under way.
                self.held = self.elapsed()
        else:
            low, self.write_low = self.write_low, None
            self._load(value << 8 | low)

    def _load(self, raw: int) -> None:
        number = _from_bcd(raw) if self.bcd else raw
        self.count = number or self.modulus
        self.loaded = True
        self.pending = True
        self.start = self._now()
        waits = self.mode in (1, 5) or not self.gate
        self.held = 0 if waits else None
        self._changed()


def _from_bcd(raw: int) -> int:
    """Decimal digits of *raw*; digits above 9, which the data sheet leaves open, count as they are."""
    return (raw >> 12) * 1000 + (raw >> 8 & 15) * 100 + (raw >> 4 & 15) * 10 + (raw & 15)


class Pit:
    """Ports 0x40–0x43. *set_irq* drives interrupt line 0."""

    def __init__(self, clock: Clock, set_irq: Callable[[bool], object]) -> None:
        self._clock = clock
        self._set_irq = set_irq
        self._timer = clock.timer(self._tick)
        self.counters = (
            Counter(clock, self._rearm),
            Counter(clock, lambda: None),
            Counter(clock, lambda: None),
        )
        self.counters[2].gate = False

    def reset(self) -> None:
        """Nothing counts until it is programmed, as after power-on."""
        for counter in self.counters:
            counter.reset()
        self.counters[2].gate = False
        self._timer.cancel()
        self._set_irq(False)

    def _rearm(self) -> None:
        counter = self.counters[0]
        # Modes 0 and 1 hold OUT low from the control word on; the others rest high.
        self._set_irq(counter.mode in (0, 1) and not counter.pending and counter.out())
        rise = counter.next_rise()
        if rise is None:
            self._timer.cancel()
        else:
            self._timer.arm(rise)

    def _tick(self) -> None:
        """OUT of counter 0 rises. In modes 2 and 3 it was low a moment before."""
        counter = self.counters[0]
        counter.pending = False
        if counter.mode != 0:
            self._set_irq(False)
        self._set_irq(True)
        rise = counter.next_rise()
        if rise is not None:
            self._timer.arm(rise)

    def read(self, offset: int, size: int) -> int:
        return 0xFF if offset == 3 else self.counters[offset].read()

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset != 3:
            self.counters[offset].write(value)
            return
        select = value >> 6
        if select == 3:
            # Read-back: bit 5 clear latches counts, bit 4 clear latches status, bits 1–3 choose counters.
            for n, counter in enumerate(self.counters):
                if value & 2 << n:
                    if not value & 0x20:
                        counter.latch_count()
                    if not value & 0x10:
                        counter.latch_status()
        elif value & 0x30:
            self.counters[select].control(value >> 4 & 3, value >> 1 & 7, bool(value & 1))
        else:
            self.counters[select].latch_count()


class Port61:
    """System control port B. Bit 0: gate of counter 2, 1: speaker, 4: refresh, toggling every 15 µs, 5: OUT of 2."""

    def __init__(self, clock: Clock, pit: Pit) -> None:
        self._clock = clock
        self._counter = pit.counters[2]
        self._speaker = 0

    def reset(self) -> None:
        """Silent."""
        self._speaker = 0

    def read(self, offset: int, size: int) -> int:
        refresh = self._clock.now_ns() // 15_085 & 1
        counter = self._counter
        return counter.gate | self._speaker | refresh << 4 | counter.out() << 5

    def write(self, offset: int, size: int, value: int) -> None:
        self._speaker = value & 2
        self._counter.set_gate(bool(value & 1))
