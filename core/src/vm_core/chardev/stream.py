"""Character devices on file descriptors: the terminal, a file, a pseudo-terminal, a pair of named pipes.

Terminals and pipes are shared with other programs, so they are never made non-blocking: reading follows readiness, and
writing happens in a thread of its own, with a bounded queue between it and the guest.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import termios
import threading
from collections.abc import Callable
from typing import Any

from ..errors import UsageError
from .base import Chardev, Loop

#: A guest that prints faster than its output is read waits once this many bytes are queued.
_QUEUE_LIMIT = 4 << 20


class Writer:
    """Writes queued bytes to a descriptor in a thread of its own, in order; *before* may change the first of them."""

    def __init__(self, fd: int, name: str, before: Callable[[bytes], bytes] | None = None) -> None:
        self._fd = fd
        self._before = before
        self._queue: list[bytes] = []
        self._size = 0
        self._idle = False
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"chardev {name}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Queue *data*; waits while the queue is full."""
        with self._changed:
            if self._size >= _QUEUE_LIMIT:
                self._changed.wait_for(lambda: self._size < _QUEUE_LIMIT or self._ended)
            if self._ended:
                return
            self._queue.append(data)
            self._size += len(data)
            if self._idle:
                self._idle = False
                self._changed.notify_all()

    def drain(self, timeout: float) -> None:
        """Wait until everything queued was written, *timeout* seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: (self._idle and not self._queue) or self._ended, timeout)

    def close(self) -> None:
        """Stop; what is still queued is lost."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle = not self._queue
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._ended)
                if self._ended:
                    return
                self._idle = False
                data = b"".join(self._queue)
                self._queue.clear()
                self._size = 0
                self._changed.notify_all()
            if self._before is not None:
                data = self._before(data)
                self._before = None
            view = memoryview(data)
            try:
                while view:
                    view = view[os.write(self._fd, view) :]
            except OSError:  # the reader is gone (a closed pipe): the guest's output has nowhere to go
                self.close()
                return


class Stream(Chardev):
    """A pair of descriptors."""

    def __init__(self, id: str) -> None:
        super().__init__(id)
        self._in: int | None = None
        self._out: int | None = None
        self._loop: Loop | None = None
        self._writer: Writer | None = None
        #: Called with the first bytes to be written, in the thread that writes; what it returns is written.
        self.before_output: Callable[[bytes], bytes] | None = None
        #: Called when bytes have come in, before they are handed on.
        self.before_input: Callable[[], object] | None = None

    def start(self, loop: Loop, read_fd: int | None, write_fd: int | None) -> None:
        """Begin on these descriptors."""
        self._loop, self._in, self._out = loop, read_fd, write_fd
        if write_fd is not None:
            self._writer = Writer(write_fd, self.id, self.before_output)
        loop.call_soon(self.on_open)  # before anything is read: what came earlier would be nobody's
        if read_fd is not None:
            fd = read_fd
            loop.call_soon(lambda: self._watch(fd))

    def _watch(self, fd: int) -> None:
        try:
            assert self._loop is not None
            self._loop.add_reader(fd, self._readable)
        except OSError:  # epoll refuses regular files: read them whole, as a shell's < FILE means
            with contextlib.suppress(OSError):
                while data := os.read(fd, 65536):
                    self.on_data(data)
            self.on_close()

    def _readable(self) -> None:
        if self._in is None or self._loop is None:  # closed meanwhile
            return
        try:
            data = os.read(self._in, 4096)
        except OSError:
            data = b""
        if data:
            if self.before_input is not None:
                self.before_input()
            self.on_data(data)
        else:
            self._loop.remove_reader(self._in)
            self.on_close()

    def write(self, data: bytes) -> None:
        if self._writer is not None:
            self._writer.write(data)

    def drain(self, timeout: float = 1.0) -> None:
        if self._writer is not None:
            self._writer.drain(timeout)

    def close(self) -> None:
        if self._loop is not None and self._in is not None:
            with contextlib.suppress(Exception):  # the loop may be closed already
                self._loop.remove_reader(self._in)
        self._in = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Terminal:
    """The controlling terminal's modes: raw while the guest has it, restored on every way out."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[Any] | None = None

    @property
    def is_raw(self) -> bool:
        """The terminal is as :meth:`raw` set it."""
        return self._saved is not None

    def raw(self, *, signals: bool) -> None:
        """Characters at once and unechoed; with *signals* Ctrl-C still interrupts ``vm`` itself."""
        if not os.isatty(self._fd):
            return
        mode = termios.tcgetattr(self._fd)
        if self._saved is None:
            self._saved = [*mode[:6], list(mode[6])]
            atexit.register(self.restore)
        mode[0] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        # Output keeps its post-processing, as in QEMU: messages of the program stay readable.
        mode[1] |= termios.OPOST
        mode[2] = (mode[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if not signals:
            mode[3] &= ~termios.ISIG
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSANOW, mode)

    def restore(self) -> None:
        """Back to what it was."""
        if self._saved is not None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)
            self._saved = None


class Stdio(Stream):
    """Standard input and output; on a terminal raw, so that every key reaches the guest.

    *signal* off (as in ``mon:stdio`` and ``-nographic``) gives Ctrl-C to the guest too.
    """

    kind = "stdio"
    _taken: str | None = None

    def __init__(self, id: str, *, signal: bool = True) -> None:
        super().__init__(id)
        if Stdio._taken is not None:
            raise UsageError(f"stdio is used twice, by {Stdio._taken} and {id}: use mon:stdio to share it")
        Stdio._taken = id
        self.signal = signal
        self.terminal = Terminal(0)
        self._line_open = False

    def resumed(self) -> None:
        """The shell has brought us back to the foreground, and has set the terminal up its own way."""
        if self._loop is not None:
            self.terminal.raw(signals=self.signal)

    def open(self, loop: Loop) -> None:
        sys.stdout.flush()
        self.terminal.raw(signals=self.signal)
        self.start(loop, 0, 1)

    def write(self, data: bytes) -> None:
        if data:
            self._line_open = not data.endswith(b"\n")
        super().write(data)

    def close(self) -> None:
        if self._line_open and self.terminal.is_raw:
            self.write(b"\r\n")  # the shell's prompt begins on a line of its own
            self.drain()
        super().close()
        self.terminal.restore()
        Stdio._taken = None


class File(Stream):
    """Everything written goes to a file; nothing comes in."""

    kind = "file"

    def __init__(self, id: str, path: str, *, append: bool = False) -> None:
        super().__init__(id)
        self.path = path
        self.append = append

    def open(self, loop: Loop) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if self.append else os.O_TRUNC)
        try:
            fd = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise UsageError(f"chardev {self.id}: {self.path}: {error.strerror}") from None
        self.start(loop, None, fd)

    def close(self) -> None:
        self.drain()
        fd, self._out = self._out, None
        super().close()
        if fd is not None:
            os.close(fd)


class Pty(Stream):
    """A new pseudo-terminal; its name is printed for a terminal program to open."""

    kind = "pty"

    def open(self, loop: Loop) -> None:
        master, slave = os.openpty()
        mode = termios.tcgetattr(slave)
        mode[0], mode[1], mode[3] = 0, 0, 0
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        # The slave stays open here: without it, reads of the master fail until somebody opens it.
        self._slave = slave
        self.filename = f"pty:{os.ttyname(slave)}"
        print(f"char device redirected to {os.ttyname(slave)} (label {self.id})", file=sys.stderr)
        self.start(loop, master, master)

    def close(self) -> None:
        fd, self._out = self._out, None
        super().close()
        if fd is not None:
            os.close(fd)
            os.close(self._slave)
