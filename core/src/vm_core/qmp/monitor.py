"""What monitors control: a machine, its drives and its character devices, and the thread commands run in.

Theory of operation. Commands may wait (a stop drains requests in flight, a new medium is opened), and completions need
the machine's I/O thread; so commands of all monitors run one after another in a thread of their own, the
:class:`CommandThread`. Events are written from wherever they happen, whole messages at a time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from .protocol import QmpError

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..chardev import Chardev
    from ..devices.bus import Bus
    from ..devices.device import Device
    from ..machine.accel import VCpu


class Events(Protocol):
    """The machine's event hub."""

    def subscribe(self, listener: Callable[[str, dict[str, Any]], object], /) -> object: ...

    def emit(self, name: str, /, **data: Any) -> None: ...


class MonitoredMachine(Protocol):
    """What monitors need of a machine; :class:`vm_core.machine.machine.Machine` is one."""

    @property
    def events(self) -> Events: ...

    @property
    def status(self) -> str: ...

    @property
    def buses(self) -> Mapping[str, Bus]: ...

    @property
    def vcpus(self) -> Sequence[VCpu]: ...

    def stop(self) -> None: ...

    def cont(self) -> None: ...

    def system_reset(self) -> None: ...

    def system_powerdown(self) -> None: ...

    def quit(self) -> None: ...


@attrs.define(eq=False)
class Drive:
    """A drive as ``query-block`` shows it: its id, its backend, the device in front, and how it was set up."""

    id: str
    backend: BlockBackend
    device: Device | None = None
    engine: str = "threads"
    detect_zeroes: str = "off"


@attrs.define(eq=False)
class Monitor:
    """Everything that commands act on. *open_medium* opens a file as a CD-ROM's medium (file, format) → node."""

    machine: MonitoredMachine
    drives: Sequence[Drive] = ()
    name: str | None = None
    version: dict[str, Any] = attrs.field(factory=dict)
    chardevs: Sequence[Chardev] = ()
    accelerator: str = ""
    cpus: int = 1
    open_medium: Callable[[str, str | None], Any] | None = None

    def drive(self, id: str) -> Drive:
        """The drive of that id, by its own name or its device's. Raises QmpError."""
        for drive in self.drives:
            if drive.id == id or (drive.device is not None and drive.device.id == id):
                return drive
        raise QmpError(f"Device '{id}' not found", "DeviceNotFound")


class CommandThread:
    """Runs functions one after another in a thread of its own; without *running* only once :meth:`start` was called."""

    def __init__(self, *, running: bool = True) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        if running:
            self._thread.start()

    def start(self) -> None:
        """Begin with what was submitted."""
        self._thread.start()

    def submit(self, function: Callable[[], object]) -> None:
        """Run *function* after all that was submitted before. Any thread; never blocks."""
        self._queue.put(function)

    def close(self, timeout: float = 2.0) -> None:
        """Finish what was submitted and end, or give up after *timeout* seconds."""
        self._queue.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            try:
                function()
            except Exception:  # a bug in one command must not end the monitor
                import traceback

                traceback.print_exc()
