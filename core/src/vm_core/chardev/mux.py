"""One terminal shared by a serial port and a monitor, with Ctrl-a commands between them.

Theory of operation. A :class:`Mux` sits on a real character device and offers one :class:`Channel` to each frontend.
What is typed goes to the channel in focus; output of all channels goes out, so the guest's console is never lost. The
bytes typed are looked at one by one: Ctrl-a begins a command, ``Ctrl-a Ctrl-a`` sends one Ctrl-a to the guest.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .base import Chardev, Loop, ignore

#: Ctrl-a.
ESCAPE = 0x01

HELP = (
    b"\r\n"
    b"C-a h    print this help\r\n"
    b"C-a x    end the machine\r\n"
    b"C-a t    toggle time stamps\r\n"
    b"C-a c    switch between the guest's console and the monitor\r\n"
    b"C-a C-a  send C-a\r\n"
)


class Channel(Chardev):
    """A frontend's end of a mux."""

    kind = "mux"

    def __init__(self, mux: Mux, number: int) -> None:
        super().__init__(mux.below.id)
        self.mux = mux
        self.number = number
        #: Called when the focus comes here by Ctrl-a c.
        self.on_focus: Callable[[], object] = ignore

    @property
    def focused(self) -> bool:
        """What is typed comes here."""
        return self.mux.focus is self

    def open(self, loop: Loop) -> None:
        self.mux.open(loop)

    def write(self, data: bytes) -> None:
        self.mux.output(data)

    def drain(self, timeout: float = 1.0) -> None:
        self.mux.below.drain(timeout)

    def close(self) -> None:
        self.mux.close()


class Mux:
    """The sharing of *below*. *on_quit* is called for Ctrl-a x."""

    def __init__(self, below: Chardev, on_quit: Callable[[], object]) -> None:
        self.below = below
        self.on_quit = on_quit
        self.channels: list[Channel] = []
        self.focus: Channel | None = None
        self._escaped = False
        self._stamps = False
        self._line_start = True
        self._began = time.monotonic()
        self._opened = False

    def channel(self) -> Channel:
        """A channel for one more frontend; the first one made has the focus."""
        made = Channel(self, len(self.channels))
        self.channels.append(made)
        self.focus = self.focus or made
        return made

    def open(self, loop: Loop) -> None:
        """Open what is below, once."""
        if not self._opened:
            self._opened = True
            self.below.connect(self.input, self._on_open, self._on_close)
            self.below.open(loop)

    def close(self) -> None:
        """Close what is below."""
        self.below.close()

    def _on_open(self) -> None:
        for channel in self.channels:
            channel.on_open()

    def _on_close(self) -> None:
        for channel in self.channels:
            channel.on_close()

    def input(self, data: bytes) -> None:
        """Bytes typed: to the channel in focus, commands taken out."""
        plain = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == ESCAPE:
                    plain.append(byte)
                else:
                    self._send(plain)
                    self._command(chr(byte))
            elif byte == ESCAPE:
                self._escaped = True
            else:
                plain.append(byte)
        self._send(plain)

    def _send(self, plain: bytearray) -> None:
        if plain and self.focus is not None:
            self.focus.on_data(bytes(plain))
        plain.clear()

    def _command(self, key: str) -> None:
        if key in "h?":
            self.below.write(HELP)
        elif key == "x":
            self.below.write(b"vm: ended by Ctrl-a x\r\n")
            self.on_quit()
        elif key == "t":
            self._stamps = not self._stamps
            self._began = time.monotonic()
        elif key == "c" and self.channels:
            assert self.focus is not None
            self.focus = self.channels[(self.focus.number + 1) % len(self.channels)]
            self.focus.on_focus()

    def output(self, data: bytes) -> None:
        """Bytes of a channel, with the time before each line where that is wanted."""
        if self._stamps:
            data = self._stamped(data)
        self.below.write(data)

    def _stamped(self, data: bytes) -> bytes:
        result = bytearray()
        for byte in data:
            if self._line_start:
                seconds = time.monotonic() - self._began
                result += b"[%02d:%02d:%02d.%03d] " % (
                    seconds // 3600,
                    seconds // 60 % 60,
                    seconds % 60,
                    seconds * 1000 % 1000,
                )
                self._line_start = False
            result.append(byte)
            self._line_start = byte == 0x0A
        return bytes(result)
