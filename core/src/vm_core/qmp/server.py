"""A QMP server on a character device."""

from __future__ import annotations

import threading
from typing import Any

from ..chardev import Chardev
from . import commands
from .monitor import CommandThread, Monitor
from .protocol import Session

#: Events of the machine that are for the status display only.
_INTERNAL = frozenset({"PHASE"})


class QmpServer:
    """Serves *monitor* to whoever connects to *chardev*; its commands run in *thread*."""

    def __init__(self, chardev: Chardev, monitor: Monitor, thread: CommandThread) -> None:
        self._chardev = chardev
        self._monitor = monitor
        self._thread = thread
        self._session: Session | None = None
        self._writing = threading.Lock()
        chardev.connect(self._on_data, self._on_open, self._on_close)
        monitor.machine.events.subscribe(self._on_event)

    def _on_open(self) -> None:
        session = Session(lambda name, arguments: commands.execute(self._monitor, name, arguments), self._version())
        self._session = session
        self._write(session.greeting())

    def _version(self) -> dict[str, Any]:
        return self._monitor.version

    def _on_close(self) -> None:
        # What came before the end is answered first: whoever pipes commands in closes that side when they are written.
        session = self._session
        self._thread.submit(lambda: self._end(session))

    def _end(self, session: Session | None) -> None:
        if self._session is session:
            self._session = None

    def _on_data(self, data: bytes) -> None:
        session = self._session
        if session is not None:
            self._thread.submit(lambda: self._execute(session, data))

    def _execute(self, session: Session, data: bytes) -> None:
        for reply in session.receive(data):
            if session is self._session:
                self._write(reply)

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        session = self._session
        if session is not None and name not in _INTERNAL:
            message = session.event(name, data)
            if message:
                self._write(message)

    def _write(self, message: bytes) -> None:
        with self._writing:
            self._chardev.write(message)
