"""The 16550A serial port.

Theory of operation. What the guest transmits goes to *transmit* byte by byte and at once, so the transmitter is always
empty; its interrupt (THRE) is nevertheless raised once for each write and each time it is enabled, since interrupt
driven software waits for it. Received bytes go into a FIFO of 16 (or one register); the caller gives as many as
:attr:`Uart.room` says and is called back when there is room again, so nothing is ever lost. Bytes below the FIFO's
trigger level count as timed out at once.

Registers share offsets: 0 and 1 are the divisor while LCR bit 7 (DLAB) is set, 2 is IIR to read and FCR to write. In
loopback the modem control outputs appear as modem status inputs, and sent bytes are received.

Source: National Semiconductor PC16550D data sheet, section 8.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ...devices.registers import Register, decode

#: IER: received data, transmitter empty, line status, modem status.
IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 1, 2, 4, 8
#: IIR, by priority: line status, received data, character timeout, transmitter empty, modem status, none.
IIR_RLS, IIR_RDI, IIR_TIMEOUT, IIR_THRI, IIR_MSI, IIR_NONE = 6, 4, 12, 2, 0, 1
IIR_FIFO = 0xC0
#: LSR: data ready, overrun, parity error, framing error, break, holding register empty, transmitter empty.
LSR_DR, LSR_OE, LSR_PE, LSR_FE, LSR_BI, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
#: MCR: data terminal ready, request to send, two free outputs (the second one gates the interrupt), loopback.
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
#: MSR: clear to send, data set ready, ring, carrier; the low half says which of them changed.
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80

_TRIGGER = (1, 4, 8, 14)

REGISTERS = (
    Register("data", 0, help="received byte, byte to send; divisor low while DLAB"),
    Register("ier", 1, help="interrupt enable; divisor high while DLAB", writable=0x0F),
    Register("iir", 2, access="ro", reset=0x01, help="interrupt identification"),
    Register("fcr", 2, access="wo", help="FIFO control"),
    Register("lcr", 3, help="line control: word length, parity, break, DLAB"),
    Register("mcr", 4, help="modem control", writable=0x1F),
    Register("lsr", 5, access="ro", reset=0x60, help="line status"),
    Register("msr", 6, access="ro", reset=0xB0, help="modem status"),
    Register("scr", 7, help="scratch"),
)


class Uart:
    """One 16550A. Its :meth:`read` and :meth:`write` are the handler of eight ports."""

    def __init__(
        self,
        set_irq: Callable[[bool], object],
        transmit: Callable[[int], object] = lambda byte: None,
        on_room: Callable[[], object] = lambda: None,
    ) -> None:
        self._set_irq = set_irq
        self._transmit = transmit
        self._on_room = on_room
        self._readers, self._writers = decode(self, REGISTERS, 8)
        #: What is connected: carrier, data set ready and clear to send while somebody is there.
        self.connected = True
        self.scr = 0
        self.divisor = 12
        self._received: deque[int] = deque()
        self.reset()

    def reset(self) -> None:
        """Master reset (table 4 of the data sheet): scratch and divisor keep what they hold."""
        self._received.clear()
        self.ier = 0
        self.lcr = 0
        self.mcr = 0
        self.fifo = False
        self._trigger = 1
        self._errors = 0
        self._thre_pending = False
        self.msr = MSR_CTS | MSR_DSR | MSR_DCD if self.connected else 0
        self._level = False
        self._set_irq(False)

    # The ports.

    def read(self, offset: int, size: int) -> int:
        return self._readers[offset]()

    def write(self, offset: int, size: int, value: int) -> None:
        self._writers[offset](value & 0xFF)

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """REP OUTSB."""
        for value in data[::size]:
            self._writers[offset](value)

    # Receiving.

    @property
    def room(self) -> int:
        """Bytes that may be given to :meth:`receive` now. None in loopback: the input is cut off."""
        if self.mcr & MCR_LOOP:
            return 0
        return (16 if self.fifo else 1) - len(self._received)

    def receive(self, data: bytes) -> None:
        """Bytes arrive on the line; no more than :attr:`room`."""
        self._received.extend(data)
        self._update()

    def receive_break(self) -> None:
        """The line is held low: a zero byte with break and framing error."""
        self._received.append(0)
        self._errors |= LSR_BI
        self._update()

    def set_connected(self, connected: bool) -> None:
        """Somebody plugged the cable in or out."""
        if connected != self.connected:
            self.connected = connected
            if not self.mcr & MCR_LOOP:
                self._set_modem(MSR_CTS | MSR_DSR | MSR_DCD if connected else 0)

    # Registers.

    def read_data(self) -> int:
        """RBR, or the divisor's low byte."""
        if self.lcr & 0x80:
            return self.divisor & 0xFF
        received = self._received
        if not received:
            return 0
        value = received.popleft()
        self._update()
        if not self.mcr & MCR_LOOP:
            self._on_room()
        return value

    def write_data(self, value: int) -> None:
        """THR, or the divisor's low byte."""
        if self.lcr & 0x80:
            self.divisor = self.divisor & 0xFF00 | value
            return
        if self.mcr & MCR_LOOP:
            if len(self._received) < (16 if self.fifo else 1):
                self._received.append(value)
            else:
                self._errors |= LSR_OE
        else:
            self._transmit(value)
        self._thre_pending = True
        if self.ier or self._level:
            self._update()

    def read_ier(self) -> int:
        return self.divisor >> 8 if self.lcr & 0x80 else self.ier

    def write_ier(self, value: int) -> None:
        if self.lcr & 0x80:
            self.divisor = self.divisor & 0xFF | value << 8
            return
        value &= 0x0F
        if value & IER_THRI and not self.ier & IER_THRI:
            # Enabling the interrupt of an empty transmitter raises it: drivers start their output so, and test for it.
            self._thre_pending = True
        self.ier = value
        self._update()

    def _cause(self) -> int:
        """The interrupt of the highest priority, as IIR shows it."""
        ier = self.ier
        if self._errors and ier & IER_RLSI:
            return IIR_RLS
        if self._received and ier & IER_RDI:
            return IIR_RDI if len(self._received) >= self._trigger else IIR_TIMEOUT
        if self._thre_pending and ier & IER_THRI:
            return IIR_THRI
        if self.msr & 0x0F and ier & IER_MSI:
            return IIR_MSI
        return IIR_NONE

    def read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRI:
            self._thre_pending = False  # reading it is how this interrupt is ended
            self._update()
        return cause | (IIR_FIFO if self.fifo else 0)

    def write_fcr(self, value: int) -> None:
        fifo = bool(value & 1)
        if value & 2 or fifo != self.fifo:
            self._received.clear()
            self._errors = 0
        if value & 4 or fifo != self.fifo:
            self._thre_pending = True  # a transmitter that is cleared has become empty
        self.fifo = fifo
        self._trigger = _TRIGGER[value >> 6] if fifo else 1
        self._update()
        self._on_room()

    def read_lcr(self) -> int:
        return self.lcr

    def write_lcr(self, value: int) -> None:
        self.lcr = value

    def read_mcr(self) -> int:
        return self.mcr

    def write_mcr(self, value: int) -> None:
        value &= 0x1F
        was, self.mcr = self.mcr, value
        if value & MCR_LOOP:
            # RTS, DTR, OUT1 and OUT2 come back as CTS, DSR, RI and DCD.
            lines = 0
            lines |= MSR_CTS if value & MCR_RTS else 0
            lines |= MSR_DSR if value & MCR_DTR else 0
            lines |= MSR_RI if value & MCR_OUT1 else 0
            lines |= MSR_DCD if value & MCR_OUT2 else 0
            self._set_modem(lines)
        elif was & MCR_LOOP:
            self._set_modem(MSR_CTS | MSR_DSR | MSR_DCD if self.connected else 0)
            self._on_room()
        self._update()

    def _set_modem(self, lines: int) -> None:
        changed = (self.msr ^ lines) >> 4
        # The ring indicator only reports its trailing edge.
        if lines & MSR_RI:
            changed &= ~4
        self.msr = lines | self.msr & 0x0F | changed
        self._update()

    def read_lsr(self) -> int:
        value = LSR_THRE | LSR_TEMT
        if self._received:
            value |= LSR_DR
        if self._errors:
            value |= self._errors
            self._errors = 0
            self._update()
        return value

    def read_msr(self) -> int:
        value = self.msr
        if value & 0x0F:
            self.msr &= 0xF0
            self._update()
        return value

    def read_scr(self) -> int:
        return self.scr

    def write_scr(self, value: int) -> None:
        self.scr = value

    def _update(self) -> None:
        # OUT2 gates the interrupt onto the bus; in loopback it is cut off with the other outputs.
        level = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 and self._cause() != IIR_NONE
        if level != self._level:
            self._level = level
            self._set_irq(level)
