"""A serial console in memory, for programs and tests: read what the guest wrote, type into it, wait for a text.

::

    console = Console()
    machine = build_machine(MachineConfig(kernel="vmlinuz", append="console=ttyS0", serials=[console]))
    with machine:
        machine.start()
        console.wait_for("login:", timeout=60)
        console.send("root\\n")
"""

from __future__ import annotations

import re
import threading
import time

from ..chardev.base import Chardev, Loop


class ConsoleTimeoutError(Exception):
    """The text did not come; the message shows the end of what did."""


class Console(Chardev):
    """A character device that keeps everything written to it."""

    kind = "memory"

    def __init__(self, id: str = "console") -> None:
        super().__init__(id)
        self._data = bytearray()
        self._changed = threading.Condition()
        self._searched = 0
        self._loop: Loop | None = None
        self._waiting: list[bytes] = []

    def open(self, loop: Loop) -> None:
        if self._loop is not None:
            return
        self._loop = loop
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            self.send(data)
        super().open(loop)

    def write(self, data: bytes) -> None:
        with self._changed:
            self._data += data
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """Everything written so far."""
        with self._changed:
            return self._data.decode("utf-8", "replace")

    def send(self, data: str | bytes) -> None:
        """Type *data*. What is typed before the machine has the console waits."""
        raw = data.encode() if isinstance(data, str) else data
        if self._loop is None:
            self._waiting.append(raw)
        else:
            self._loop.call_soon(lambda: self.on_data(raw))

    def wait_for(self, pattern: str, timeout: float = 30.0) -> re.Match[bytes]:
        """Wait until *pattern* (a regular expression) appears behind what was found before; returns the match.

        Raises ConsoleTimeoutError after *timeout* seconds.
        """
        compiled = re.compile(pattern.encode(), re.MULTILINE)
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                found = compiled.search(self._data, self._searched)
                if found is not None:
                    self._searched = found.end()
                    # Of a copy: the buffer goes on growing, which a match of it would forbid.
                    copy = compiled.search(bytes(self._data), found.start())
                    del found
                    assert copy is not None
                    return copy
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    tail = bytes(self._data[-2000:]).decode("utf-8", "replace")
                    raise ConsoleTimeoutError(
                        f"{pattern!r} did not appear in {timeout:g} s; the console ends with:\n{tail}"
                    )
