"""A serial port of the board: a UART at its ports, a character device at its line.

Theory of operation. Bytes that the guest sends are gathered for a few milliseconds, since drivers send them one by one,
and written by the I/O thread. Bytes that arrive wait here until the UART's FIFO takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .chipset.uart import Uart

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..chardev import Chardev
    from .machine import Machine

#: First port and interrupt line of COM1–COM4.
PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))

#: Seconds that output is gathered, and bytes that go at once.
GATHER = 0.004
ENOUGH = 1024


class SharedLine:
    """An ISA line that several ports drive: up while any of them is."""

    def __init__(self, machine: Machine, irq: int) -> None:
        self._machine = machine
        self._irq = irq
        self._up: set[int] = set()

    def driver(self, number: int) -> Callable[[bool], None]:
        """The end that port *number* drives."""

        def drive(level: bool) -> None:
            was = bool(self._up)
            if level:
                self._up.add(number)
            else:
                self._up.discard(number)
            if bool(self._up) != was:
                self._machine.irqs.set_irq(self._irq, not was)

        return drive


class SerialPort:
    """Port *number* (0: COM1), connected to *chardev*. *on_output* sees what the guest sends, on the I/O thread."""

    def __init__(
        self,
        machine: Machine,
        number: int,
        line: SharedLine,
        chardev: Chardev,
        on_output: Callable[[bytes], object] = lambda data: None,
    ) -> None:
        self.base, self.irq = PORTS[number]
        self._machine = machine
        self._chardev = chardev
        self._on_output = on_output
        self._out = bytearray()
        self._gathering = False
        self._in = bytearray()
        self._offering = False
        self.uart = Uart(line.driver(number), self._transmit, self._offer)
        machine.ports.add(self.base, 8, self.uart)
        chardev.connect(self._arrived, self._opened, self._hung_up)

    def reset(self) -> None:
        """Reset the UART; what was sent before still leaves, what is typed ahead stays."""
        self.uart.reset()

    # Output, with the lock held.

    def _transmit(self, byte: int) -> None:
        self._out.append(byte)
        if not self._gathering:
            self._gathering = True
            self._machine.iothread.call_later(GATHER, self._flush)
        elif len(self._out) == ENOUGH:
            self._machine.iothread.call_soon(self._flush)

    def _flush(self) -> None:
        with self._machine.lock:
            data = bytes(self._out)
            self._out.clear()
            self._gathering = False
        if data:
            self._chardev.write(data)
            self._on_output(data)

    def close(self) -> None:
        """Let the last bytes leave."""
        self._flush()

    # Input, on the I/O thread.

    def _arrived(self, data: bytes) -> None:
        with self._machine.lock:
            self._in += data
            self._offer()

    def _offer(self) -> None:
        """Give the UART what it takes. Its own changes ask for more while it is being given some."""
        if self._offering or not self._in:
            return
        self._offering = True
        try:
            room = self.uart.room
            if room > 0:
                data = bytes(self._in[:room])
                del self._in[:room]
                self.uart.receive(data)
        finally:
            self._offering = False

    def _opened(self) -> None:
        with self._machine.lock:
            self.uart.set_connected(True)

    def _hung_up(self) -> None:
        with self._machine.lock:
            self.uart.set_connected(False)
