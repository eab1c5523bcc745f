"""Telling from what firmware, boot loader and kernel print how far a boot has come: the PHASE events."""

from __future__ import annotations

import re

from .events import EventHub

#: The device, and not the address that is jumped to in the end.
_BOOTING = re.compile(r"Booting from (?![0-9a-f]{4}:[0-9a-f]{4})(?P<what>.+?)\.{0,3}$")
_NOTHING = re.compile(r"(No bootable device.*|Boot failed.*)")
_FIRMWARE = re.compile(r"(SeaBIOS \(version [^)]*\))")

#: On the serial console: (phase, pattern).
_SERIAL = (
    ("boot-loader", re.compile(rb"(GNU GRUB  version [0-9.~a-z-]+|SYSLINUX [0-9.]+|ISOLINUX [0-9.]+)")),
    ("kernel", re.compile(rb"(Linux version [^\s]+)")),
)
#: Longer than what any of the patterns needs.
_OVERLAP = 96


class PhaseWatcher:
    """Looks at both streams until the kernel has announced itself, and again after each reset."""

    def __init__(self, events: EventHub) -> None:
        self._events = events
        self._tail = b""
        self._seen: set[str] = set()

    def reset(self) -> None:
        """A new boot."""
        self._tail = b""
        self._seen.clear()

    def firmware_line(self, line: str) -> None:
        """A line of the firmware's debug console."""
        if found := _FIRMWARE.match(line):
            self._events.emit("PHASE", phase="firmware", text=found[1])
        elif found := _BOOTING.match(line):
            self._events.emit("PHASE", phase="boot-device", text=found["what"])
        elif found := _NOTHING.match(line):
            self._events.emit("PHASE", phase="boot-device", text=found[1])

    def serial(self, data: bytes) -> None:
        """Output of the first serial port."""
        if "kernel" in self._seen:
            return
        text = self._tail + data
        self._tail = text[-_OVERLAP:]
        for phase, pattern in _SERIAL:
            if phase not in self._seen and (found := pattern.search(text)) is not None and found.end() < len(text):
                self._seen.add(phase)
                self._events.emit("PHASE", phase=phase, text=found[1].decode("latin-1"))

    def direct_kernel(self, name: str) -> None:
        """A kernel is entered without firmware."""
        self._events.emit("PHASE", phase="kernel", text=name)
