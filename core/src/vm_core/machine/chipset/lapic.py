"""The local APIC of one processor: what it has been asked to do, in order of importance, and a timer.

Theory of operation (Intel SDM vol. 3, chapter 11; sections are named beside the code). A vector's upper four bits are
its priority class. A message sets the vector's bit in IRR. While the highest class in IRR is above the processor's
priority (the higher of TPR and of the highest vector in service), an interrupt is pending; the processor's acknowledge
cycle moves that vector from IRR to ISR, and the guest's write to EOI takes the highest vector out of ISR, which may
make the next one pending. For vectors whose message was triggered by level (TMR), EOI is broadcast to the I/O APICs.

LINT0 is where the 8259A pair is connected: with the mode ExtINT and unmasked, an interrupt that the pair presents is
passed on, and the acknowledge cycle goes to it. LINT0 starts that way on the bootstrap processor, as firmware leaves it
("virtual wire"), so a guest that knows nothing of APICs finds a PC with 8259As.

Not here: x2APIC and the TSC deadline mode, which CPUID does not offer; the LINT1 pin, to which nothing is connected;
and messages that ask a processor for something other than taking a vector (NMI, SMI, INIT, start-up): an accelerator
without interrupt chips of its own runs one processor, and has no way to be told of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..accel import CpuInterrupts
from ..clock import Clock
from .apicbus import BROADCAST, ApicBus, ApicMessage, DeliveryMode

#: Where the registers appear; a page.
LAPIC_BASE: Final = 0xFEE00000
LAPIC_SIZE: Final = 0x1000

#: Version 0x14 (integrated), and the number of the highest local vector (11.4.8).
_VERSION: Final = 0x00050014

# Registers (table 11-1), by offset.
_ID: Final = 0x20
_VERSION_REGISTER: Final = 0x30
_TPR: Final = 0x80
_APR: Final = 0x90
_PPR: Final = 0xA0
_EOI: Final = 0xB0
_LDR: Final = 0xD0
_DFR: Final = 0xE0
_SVR: Final = 0xF0
_ISR: Final = 0x100
_TMR: Final = 0x180
_IRR: Final = 0x200
_ESR: Final = 0x280
_ICR_LOW: Final = 0x300
_ICR_HIGH: Final = 0x310
_LVT_TIMER: Final = 0x320
_LVT_THERMAL: Final = 0x330
_LVT_PERFORMANCE: Final = 0x340
_LVT_LINT0: Final = 0x350
_LVT_LINT1: Final = 0x360
_LVT_ERROR: Final = 0x370
_TIMER_INITIAL: Final = 0x380
_TIMER_CURRENT: Final = 0x390
_TIMER_DIVIDE: Final = 0x3E0

#: Local vectors and their writable bits (figure 11-8): vector, mode, polarity, trigger, mask, timer mode.
_LVT_WRITABLE: Final[dict[int, int]] = {
    _LVT_TIMER: 0x300FF,
    _LVT_THERMAL: 0x107FF,
    _LVT_PERFORMANCE: 0x107FF,
    _LVT_LINT0: 0x1A7FF,
    _LVT_LINT1: 0x1A7FF,
    _LVT_ERROR: 0x100FF,
}
_MASKED: Final = 1 << 16
_PERIODIC: Final = 1 << 17

_SVR_ENABLE: Final = 1 << 8

# ESR bits (11.5.3).
_SEND_ILLEGAL_VECTOR: Final = 1 << 5
_RECEIVE_ILLEGAL_VECTOR: Final = 1 << 6
_ILLEGAL_REGISTER: Final = 1 << 7

#: Vectors that are the processor's own exceptions cannot be sent (11.5.2).
_FIRST_VECTOR: Final = 16

#: Nanoseconds of a tick before the divider: a bus clock of 1 GHz.
_TICK_NS: Final = 1
#: A periodic timer fires no oftener, lest a guest keep the I/O thread busy with it.
_MINIMUM_PERIOD_NS: Final = 100_000


class LocalApic:
    """The local APIC with *id*. A ``CpuInterrupts`` for the accelerator, an ``MmioHandler`` for the guest.

    *wake* is called when an interrupt may have become pending; *pic* is what LINT0 is connected to, if anything. All
    is called with the device lock held.
    """

    def __init__(
        self, id: int, bus: ApicBus, clock: Clock, wake: Callable[[], object], pic: CpuInterrupts | None = None
    ) -> None:
        self._initial_id = id
        self._bus = bus
        self._clock = clock
        self._wake = wake
        self._pic = pic
        self._timer = clock.timer(self._timer_expired)
        bus.apics.append(self)
        self.reset()

    def reset(self) -> None:
        """The state after RESET (11.4.7.1), but for LINT0, which is as firmware leaves it."""
        self.id = self._initial_id
        self._tpr = 0
        self._ldr = 0
        self._dfr = 0xFFFFFFFF
        self._svr = 0xFF
        # Sets of vectors, one bit each.
        self._irr = 0
        self._isr = 0
        self._tmr = 0
        self._errors = 0
        self._esr = 0
        self._icr_low = 0
        self._icr_high = 0
        self._lvt = dict.fromkeys(_LVT_WRITABLE, _MASKED)
        if self._pic is not None:
            self._lvt[_LVT_LINT0] = DeliveryMode.EXTINT << 8
        self._timer.cancel()
        self._initial_count = 0
        self._divide = 0
        #: When the timer last began to count down, in virtual nanoseconds.
        self._counting_since = 0

    # What the processor asks.

    def pending(self) -> bool:
        """An interrupt is waiting for the processor."""
        return self._deliverable() is not None or self._external()

    def acknowledge(self) -> int:
        """The interrupt-acknowledge cycle: the vector, from here or from the 8259As."""
        vector = self._deliverable()
        if vector is not None:
            self._irr &= ~(1 << vector)
            self._isr |= 1 << vector
            return vector
        if self._pic is not None and self._external():
            return self._pic.acknowledge()
        return self._svr & 0xFF  # the spurious vector: what was pending has gone (11.9)

    def _deliverable(self) -> int | None:
        """The vector that the processor should take now (11.8.4)."""
        if not self._irr:
            return None
        vector = self._irr.bit_length() - 1
        return vector if vector >> 4 > self.processor_priority >> 4 else None

    def _external(self) -> bool:
        """LINT0 passes an interrupt of the 8259As on."""
        lint0 = self._lvt[_LVT_LINT0]
        if lint0 & _MASKED or lint0 >> 8 & 7 != DeliveryMode.EXTINT or self._pic is None:
            return False
        return self._pic.pending()

    def pic_changed(self) -> None:
        """The 8259As' output may have changed."""
        if self._external():
            self._wake()

    # What the bus asks.

    @property
    def software_enabled(self) -> bool:
        """Bit 8 of the spurious vector register: the guest has switched this APIC on."""
        return bool(self._svr & _SVR_ENABLE)

    @property
    def processor_priority(self) -> int:
        """PPR (11.8.3.1): TPR, or the class of the highest vector in service where that is higher."""
        service = self._isr.bit_length() - 1 if self._isr else 0
        return self._tpr if self._tpr >> 4 >= service >> 4 else service & 0xF0

    def answers_to(self, destination: int) -> bool:
        """This APIC is among those that the logical *destination* names (11.6.2.2)."""
        address = self._ldr >> 24
        if self._dfr >> 28 == 0xF:  # flat: a bit for each APIC
            return bool(address & destination)
        if destination >> 4 not in (address >> 4, 0xF):  # cluster: a number, and a bit for each of its four
            return False
        return bool(address & destination & 0xF)

    def accept(self, message: ApicMessage) -> bool:
        """Take *message*; False where it is refused, or is of a kind that this machine's processors cannot be told."""
        if message.mode not in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY) or not self.software_enabled:
            return False
        if message.vector < _FIRST_VECTOR:
            self._error(_RECEIVE_ILLEGAL_VECTOR)
            return False
        bit = 1 << message.vector
        self._irr |= bit
        if message.level:
            self._tmr |= bit
        else:
            self._tmr &= ~bit
        if self._deliverable() is not None:
            self._wake()
        return True

    # Registers.

    def read(self, offset: int, size: int) -> int:
        """A register, or part of one. They are 32 bits wide, 16 bytes apart."""
        shift = 8 * (offset & 3)
        if offset & 0xC:
            return 0
        return self._read(offset & 0xFF0) >> shift & (1 << 8 * size) - 1

    def _read(self, at: int) -> int:
        if at in self._lvt:
            return self._lvt[at]
        if _ISR <= at < _ESR:
            bits = (self._isr, self._tmr, self._irr)[(at - _ISR) >> 7]
            return bits >> 2 * (at & 0x70) & 0xFFFFFFFF
        if at in (_APR, _EOI):  # arbitration went with the APIC bus; EOI is write-only
            return 0
        simple = {
            _ID: self.id << 24,
            _VERSION_REGISTER: _VERSION,
            _TPR: self._tpr,
            _PPR: self.processor_priority,
            _LDR: self._ldr,
            _DFR: self._dfr,
            _SVR: self._svr,
            _ESR: self._esr,
            _ICR_LOW: self._icr_low,
            _ICR_HIGH: self._icr_high,
            _TIMER_INITIAL: self._initial_count,
            _TIMER_CURRENT: self._current_count(),
            _TIMER_DIVIDE: self._divide,
        }
        if at not in simple:
            self._error(_ILLEGAL_REGISTER)
            return 0
        return simple[at]

    def write(self, offset: int, size: int, value: int) -> None:
        """Set a register. Anything but 32 aligned bits is undefined (11.4.1), and has no effect here."""
        if size != 4 or offset & 0xF:
            return
        if offset in _LVT_WRITABLE:
            self._write_lvt(offset, value)
        elif offset == _EOI:
            self._end()
        elif offset == _TPR:
            self._tpr = value & 0xFF
        elif offset == _ID:
            self.id = value >> 24
        elif offset == _LDR:
            self._ldr = value & 0xFF000000
        elif offset == _DFR:
            self._dfr = value | 0x0FFFFFFF
        elif offset == _SVR:
            self._write_svr(value)
        elif offset == _ESR:
            # A write makes visible what was noted since the one before (11.5.3).
            self._esr, self._errors = self._errors, 0
        elif offset == _ICR_LOW:
            self._icr_low = value & 0xCCFFF
            self._send()
        elif offset == _ICR_HIGH:
            self._icr_high = value & 0xFF000000
        elif offset == _TIMER_INITIAL:
            self._initial_count = value
            self._start_timer()
        elif offset == _TIMER_DIVIDE:
            now_left = self._current_count()
            self._divide = value & 0xB
            self._rescale_timer(now_left)
        elif offset not in (_VERSION_REGISTER, _APR, _PPR, _TIMER_CURRENT) and not _ISR <= offset < _ESR:
            self._error(_ILLEGAL_REGISTER)
        if self.pending():
            self._wake()

    def _write_lvt(self, offset: int, value: int) -> None:
        value &= _LVT_WRITABLE[offset]
        if not self.software_enabled:
            value |= _MASKED
        was = self._lvt[offset]
        self._lvt[offset] = value
        if offset == _LVT_TIMER and (was ^ value) & _PERIODIC:
            self._arm_timer(self._clock.now_ns())

    def _write_svr(self, value: int) -> None:
        self._svr = value & 0x1FF
        if not self.software_enabled:  # 11.4.7.2: every local vector is masked, and stays so
            for at in self._lvt:
                self._lvt[at] |= _MASKED

    def _end(self) -> None:
        """EOI (11.8.5)."""
        if not self._isr:
            return
        vector = self._isr.bit_length() - 1
        bit = 1 << vector
        self._isr &= ~bit
        if self._tmr & bit:
            self._bus.end(vector)

    def _send(self) -> None:
        """The interrupt that ICR describes (11.6.1)."""
        low = self._icr_low
        mode = low >> 8 & 7
        if mode in (DeliveryMode.FIXED, DeliveryMode.LOWEST_PRIORITY) and low & 0xFF < _FIRST_VECTOR:
            self._error(_SEND_ILLEGAL_VECTOR)
            return
        message = ApicMessage(
            vector=low & 0xFF,
            destination=self._icr_high >> 24,
            mode=mode,
            logical=bool(low & 1 << 11),
            # Fixed messages between processors are edges whatever bit 15 says, which is for INIT.
        )
        shorthand = low >> 18 & 3
        if shorthand == 0:
            targets = self._bus.targets(message.destination, message.logical)
        elif shorthand == 1:
            targets = [self]
        else:
            targets = self._bus.targets(BROADCAST, False)
            if shorthand == 3:
                targets.remove(self)
        self._bus.deliver_to(targets, message)

    def _error(self, bit: int) -> None:
        """Note an error and raise its local interrupt (11.5.3)."""
        self._errors |= bit
        self._local(_LVT_ERROR)

    def _local(self, source: int) -> None:
        """Deliver the local vector *source* to this processor."""
        entry = self._lvt[source]
        if entry & _MASKED:
            return
        vector = entry & 0xFF
        if vector >= _FIRST_VECTOR:
            self.accept(ApicMessage(vector, self.id))
        elif source != _LVT_ERROR:
            self._error(_RECEIVE_ILLEGAL_VECTOR)

    # The timer (11.5.4). One shot or periodic; counts down from the initial count, which starts it when written.

    def _divisor(self) -> int:
        """Bits 0, 1 and 3 of the divide register: 2, 4, … 128, and 1 for all of them set."""
        code = self._divide & 3 | self._divide >> 1 & 4
        return 2 << code if code != 7 else 1

    def _span_ns(self) -> int:
        return self._initial_count * self._divisor() * _TICK_NS

    def _current_count(self) -> int:
        span = self._span_ns()
        if not span:
            return 0
        elapsed = self._clock.now_ns() - self._counting_since
        if self._lvt[_LVT_TIMER] & _PERIODIC:
            elapsed %= span
        return max(0, span - elapsed) // (self._divisor() * _TICK_NS)

    def _start_timer(self) -> None:
        self._counting_since = now = self._clock.now_ns()
        # At the time of writing even the shortest count lies ahead: it must not be taken for one that has passed.
        self._arm_timer(now)

    def _rescale_timer(self, left: int) -> None:
        """Go on from count *left* at another divisor."""
        if self._initial_count:
            ran = (self._initial_count - left) * self._divisor() * _TICK_NS
            now = self._clock.now_ns()
            self._counting_since = now - ran
            self._arm_timer(now)

    def _arm_timer(self, now: int) -> None:
        """Set the alarm for the first time after *now* at which the count reaches zero."""
        span = self._span_ns()
        if not span:
            self._timer.cancel()
            return
        elapsed = now - self._counting_since
        if not self._lvt[_LVT_TIMER] & _PERIODIC:
            if elapsed < span:
                self._timer.arm(self._counting_since + span)
            else:
                self._timer.cancel()
            return
        due = self._counting_since + span * (elapsed // span + 1)
        if span < _MINIMUM_PERIOD_NS:
            due = max(due, now + _MINIMUM_PERIOD_NS)
        self._timer.arm(due)

    def _timer_expired(self) -> None:
        if self._lvt[_LVT_TIMER] & _PERIODIC:
            self._arm_timer(self._clock.now_ns())
        self._local(_LVT_TIMER)
