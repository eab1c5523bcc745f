"""What ``vm`` shows while a guest boots: nothing, plain lines, or (on a terminal) a live picture.

A :class:`Status` is told of phases as they happen and of the assembled stack; when the guest's console takes the
terminal over it is told to be silent.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import attrs

from ..errors import UsageError

if TYPE_CHECKING:
    from ..qmp.monitor import Drive

#: The phases of a boot, in order, and what people call them.
PHASES: dict[str, str] = {
    "plugins": "plugins loaded",
    "images": "images opened",
    "devices": "devices realised",
    "firmware": "firmware",
    "boot-device": "boot device",
    "boot-loader": "boot loader",
    "kernel": "kernel",
}


@attrs.define
class Phase:
    """One phase that has begun. Times are seconds of the monotonic clock."""

    name: str
    text: str
    began: float
    ended: float | None = None


@attrs.define
class Assembly:
    """What the picture shows besides the drives."""

    title: str
    drives: Sequence[Drive]
    #: Where the guest's console is, for the last line.
    console: str = ""
    #: It is on this terminal.
    console_here: bool = False


class Status:
    """The silent one, and the base of the others: it keeps the phases."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.phases: list[Phase] = []
        self.assembly: Assembly | None = None
        self.paused = False
        self.failed = False
        self._lock = threading.Lock()

    def begin(self, name: str, text: str = "") -> None:
        """Phase *name* begins, and with it the one before it ends. A second call only changes its text."""
        now = time.monotonic()
        with self._lock:
            last = self.phases[-1] if self.phases else None
            if last is not None and last.name == name:
                last.text = text or last.text
            else:
                if last is not None and last.ended is None:
                    last.ended = now
                self.phases.append(Phase(name, text, now))
            phase = self.phases[-1]
        self.changed(phase)

    def end(self, text: str = "") -> None:
        """The phase that runs ends, with *text* as what came of it."""
        with self._lock:
            if not self.phases:
                return
            phase = self.phases[-1]
            phase.ended = time.monotonic()
            phase.text = text or phase.text
        self.changed(phase)

    def assembled(self, assembly: Assembly) -> None:
        """The machine is complete."""
        self.assembly = assembly

    def event(self, name: str, data: dict[str, Any]) -> None:
        """An event of the machine."""
        if name == "PHASE":
            self.begin(str(data.get("phase", "")), str(data.get("text", "")))
        elif name == "RESET":
            self.begin("firmware", "reset")
        elif name == "RESUME":
            self.paused = False
            with self._lock:
                if self.phases and self.phases[-1].text == "paused":
                    self.phases[-1].text = ""

    def changed(self, phase: Phase) -> None:
        """*phase* began, ended or has another text."""

    def warn(self, text: str) -> None:
        """Something the user should know."""
        print(f"vm: warning: {' '.join(text.removeprefix('WARNING: ').split())}", file=sys.stderr)

    def hand_over(self) -> None:
        """The guest's console has the terminal from now on. Any thread; returns when nothing more will be written."""

    def await_console(self, data: bytes) -> bytes:
        """The guest's first output, *data*, waits: return when the terminal is its own, with what is to be printed."""
        self.hand_over()
        return data

    def want_console(self) -> None:
        """Somebody wants to see the guest's console now: a key was pressed. Any thread."""

    def fail(self) -> None:
        """The phase that runs did not succeed; the error follows."""
        self.failed = True

    def close(self) -> None:
        """The machine has ended, or could not be made."""


class PlainStatus(Status):
    """A line on standard error for each phase, from when there is a machine: until then an error is to stand alone."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        #: Lines that wait for the machine to be there.
        self._held: list[str] | None = []
        self._stream = stream
        self._told: set[tuple[str, str, bool]] = set()

    def changed(self, phase: Phase) -> None:
        # The steps of the program are told when they are done, those of the guest when they begin.
        own = phase.name in ("plugins", "images", "devices")
        if own and phase.ended is None:
            return
        key = (phase.name, phase.text, phase.ended is None)
        if key in self._told or (not own and phase.ended is not None):
            return
        self._told.add(key)
        at = (phase.ended if own and phase.ended is not None else time.monotonic()) - self.began
        self._write(f"[{at:8.3f}] {PHASES.get(phase.name, phase.name)}{': ' if phase.text else ''}{phase.text}")

    def assembled(self, assembly: Assembly) -> None:
        from .picture import drive_layers, plain

        super().assembled(assembly)
        held, self._held = self._held or [], None
        for line in held:
            self._write(line)
        self._write(assembly.title)
        for line in plain([drive_layers(drive) for drive in assembly.drives], "  "):
            self._write(line)

    def _write(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text)
            return
        try:
            self._stream.write(f"vm: {text}\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            pass


def make(kind: str | None, *, nographic: bool) -> Status:
    """The status that ``--status`` asks for.

    ``auto`` is rich where standard input and output are terminals, and plain lines elsewhere; with -nographic there is
    nothing but the guest, as with QEMU.
    """
    kind = kind or "auto"
    if kind not in ("auto", "rich", "plain", "off"):
        raise UsageError(f"--status {kind}: one of auto, rich, plain, off is needed")
    if kind == "auto":
        if nographic:
            kind = "off"
        else:
            kind = "rich" if sys.stdout.isatty() and sys.stdin.isatty() else "plain"
    if kind == "off":
        return Status()
    if kind == "plain":
        return PlainStatus(sys.stderr)
    from .richstatus import RichStatus

    return RichStatus()
