"""Ports for people: the firmware's debug console at 0x402 and the POST code at 0x80."""

from __future__ import annotations

from collections.abc import Callable

#: Characters kept of what firmware said.
LOG_SIZE = 256 << 10


class DebugConsole:
    """Port 0x402: bytes written are text; reads answer 0xe9, by which firmware knows that somebody listens.

    *on_line* is called with each line, without its end.
    """

    def __init__(self, on_line: Callable[[str], object] = lambda line: None) -> None:
        self.on_line = on_line
        self.log = bytearray()
        self._line = bytearray()

    def reset(self) -> None:
        """A new boot begins a new line; the log goes on."""
        self._line.clear()

    def read(self, offset: int, size: int) -> int:
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if value == 0x0A:
            self._end_line()
        else:
            self._line.append(value)
            if len(self._line) >= 4096:
                self._end_line()

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """REP OUTSB."""
        for value in data[::size]:
            self.write(offset, 1, value)

    def _end_line(self) -> None:
        line, self._line = self._line, bytearray()
        self.log += line + b"\n"
        if len(self.log) > LOG_SIZE:
            del self.log[: LOG_SIZE // 2]
        self.on_line(line.decode("latin-1").rstrip("\r"))


class PostCode:
    """Port 0x80: the last code written, which also serves programs as a short delay."""

    def __init__(self) -> None:
        self.code = 0

    def read(self, offset: int, size: int) -> int:
        return self.code

    def write(self, offset: int, size: int, value: int) -> None:
        self.code = value & 0xFF
