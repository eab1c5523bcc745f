"""A ``vm`` process with the guest's serial console on its standard streams."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import time
from types import TracebackType

import pytest

from . import vm_command

# A control sequence of a terminal (ECMA-48, 5.4), or the beginning of one at the end of what was read.
SEQUENCE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|[^\[])")
UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*)?\Z")


class Guest:
    """Starts ``vm -nographic`` with *arguments*; read with :meth:`expect`, type with :meth:`send`.

    *command* starts another program with the same grammar, the peer for example.
    """

    def __init__(self, *arguments: str, command: list[str] | None = None, env: dict[str, str] | None = None) -> None:
        self.arguments = [*(command or vm_command()), "-nographic", "-no-reboot", *arguments]
        self.process = subprocess.Popen(
            self.arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self.seen = b""
        self._text = b""
        self._begun = b""
        self._at = 0
        self._errors = b""

    def expect(self, pattern: str, timeout: float = 60) -> re.Match[bytes]:
        """Wait until *pattern* appears in what the guest printed since the last match.

        Control sequences do not count: firmware that mirrors a screen puts one between any two characters, as its
        timer falls.
        """
        wanted = re.compile(pattern.encode())
        deadline = time.monotonic() + timeout
        while True:
            found = wanted.search(self._text, self._at)
            if found:
                self._at = found.end()
                return found
            if not self._read(deadline - time.monotonic()):
                pytest.fail(f"{pattern!r} did not appear\n{self.report()}")

    def _read(self, timeout: float) -> bool:
        """Take in what the process prints next; False at its end or when *timeout* seconds have passed."""
        out, err = self.process.stdout, self.process.stderr
        assert out is not None
        assert err is not None
        ready, _, _ = select.select([out, err], [], [], max(timeout, 0))
        if err in ready:
            self._errors += os.read(err.fileno(), 65536)
        if out in ready:
            data = os.read(out.fileno(), 65536)
            self.seen += data
            fresh = self._begun + data
            begun = UNFINISHED.search(fresh)
            self._begun = begun[0] if begun else b""
            self._text += SEQUENCE.sub(b"", fresh[: len(fresh) - len(self._begun)])
            return bool(data)
        return bool(ready) and self.process.poll() is None

    def send(self, text: str) -> None:
        """Type *text* on the guest's console."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait(self, timeout: float = 60) -> int:
        """Read to the end of the guest's output and return the exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        try:
            return self.process.wait(max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            pytest.fail(f"the machine did not end\n{self.report()}")

    def kill(self) -> None:
        """kill -9, then take in what was printed before."""
        self.process.kill()
        self.process.wait(10)
        while self._read(0.2):
            pass

    def report(self) -> str:
        """What was run, what it printed last and its errors."""
        if self.process.stderr is not None and self.process.poll() is not None:
            self._errors += self.process.stderr.read() or b""
        tail = self.seen[-3000:].decode(errors="replace")
        return f"{' '.join(self.arguments)}\nexit: {self.process.poll()}\nstderr: {self._errors.decode()}\n…{tail}"

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
