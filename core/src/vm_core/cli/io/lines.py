"""Lines of standard input, read while asynchronous requests go on."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .session import Session

CHUNK = 65536


class Lines:
    """The lines that come out of a descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = b""
        self._ended = False

    def next(self, session: Session) -> str | None:
        """The next line, without its end; None where there is none. Finished requests are reported while it waits."""
        session.poll()
        while True:
            line, newline, rest = self._data.partition(b"\n")
            if newline or (self._ended and line):
                self._data = rest
                return os.fsdecode(line)
            if self._ended:
                return None
            self._wait(session)
            piece = os.read(self._fd, CHUNK)
            self._ended = not piece
            self._data += piece

    def _wait(self, session: Session) -> None:
        """Wait for more to read."""
        if not session.busy:
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def wake() -> None:
            with suppress(BlockingIOError):
                os.write(writer, b"x")

        queue = session.queue
        queue.on_finish = wake
        try:
            while session.busy:
                queue.poll()
                session.out.flush()
                ready, _, _ = select.select([self._fd, reader], [], [], 1.0)
                if self._fd in ready:
                    return
                if reader in ready:
                    os.read(reader, CHUNK)
        finally:
            queue.on_finish = None
            os.close(reader)
            os.close(writer)
