"""The contract of a character device.

Theory of operation. A :class:`Chardev` is made from the command line, has one frontend (a serial port, a monitor), and
is opened once the I/O thread runs. Bytes that arrive are handed to *on_data* on the I/O thread; ``write`` may be called
from any thread and keeps the order of its calls. Connections come and go (sockets): *on_open* and *on_close* tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Loop(Protocol):
    """What character devices need of the machine's I/O thread."""

    def call_soon(self, function: Callable[[], object], /) -> None: ...

    def add_reader(self, fd: int, function: Callable[[], object], /) -> None: ...

    def remove_reader(self, fd: int, /) -> object: ...

    def add_writer(self, fd: int, function: Callable[[], object], /) -> None: ...

    def remove_writer(self, fd: int, /) -> object: ...


def ignore(*_: object) -> None:
    """A frontend that is not there."""


class Chardev:
    """One character device. *id* names it, *filename* is what ``query-chardev`` shows."""

    kind = "null"

    def __init__(self, id: str) -> None:
        self.id = id
        self.filename = self.kind
        #: The frontend's callbacks, set before :meth:`open`.
        self.on_data: Callable[[bytes], object] = ignore
        self.on_open: Callable[[], object] = ignore
        self.on_close: Callable[[], object] = ignore
        #: A frontend is connected.
        self.frontend_open = False

    def connect(
        self,
        on_data: Callable[[bytes], object],
        on_open: Callable[[], object] = ignore,
        on_close: Callable[[], object] = ignore,
    ) -> None:
        """Connect the frontend."""
        self.on_data, self.on_open, self.on_close = on_data, on_open, on_close
        self.frontend_open = True

    def open(self, loop: Loop) -> None:
        """Begin. Raises VmError where the host refuses."""
        loop.call_soon(self.on_open)

    def write(self, data: bytes) -> None:
        """Send *data*. What is written while nobody is connected is lost, as on a cable."""

    def drain(self, timeout: float = 1.0) -> None:
        """Give what was written up to *timeout* seconds to leave."""

    def close(self) -> None:
        """End: restore and release everything. A second call does nothing."""


class Null(Chardev):
    """Nowhere: reads nothing, forgets what is written."""
