"""One run of a machine: assemble it from the command line, start it, wait for its end, take it apart."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, VmError
from ..options import nest, parse_json, split
from . import settings
from .consoles import Consoles
from .images import Images
from .status import Assembly, Status, make

if TYPE_CHECKING:
    from ..machine.config import DeviceConfig, MachineConfig
    from ..machine.machine import Machine
    from ..qmp.monitor import Drive, Monitor
    from .arguments import CommandLine

#: Seconds after which the waiting main thread runs handlers of signals that did not wake it.
_LOOK_FOR_SIGNALS = 0.5


class Run:
    """The parts of one run, taken apart in :meth:`close` in the order that loses nothing."""

    def __init__(self, line: CommandLine) -> None:
        self.line = line
        self.machine: Machine | None = None
        self.images: Images | None = None
        self.failure: str | None = None
        self.started = False
        self.consoles = Consoles(line, self.quit)
        try:
            self.status: Status = make(line.value("status"), nographic="nographic" in line)
        except BaseException:
            self.consoles.close()
            raise

    def quit(self) -> None:
        """End the machine: Ctrl-a x."""
        if self.machine is not None:
            self.machine.quit()

    def assemble(self) -> Machine:
        """Load plugins, open images, build the machine and put the monitors on it."""
        from ..plugins import Health, registry

        line, status = self.line, self.status
        status.begin("plugins")
        config = self.config = self._settings()
        healthy = [entry for entry in registry().entries() if entry.health is Health.OK]
        distributions = {entry.distribution for entry in healthy}
        status.end(f"{len(healthy)} drivers of {len(distributions)} distributions")

        self.images = Images(line, status.warn)
        status.begin("images")
        self.images.open()
        status.end(_count(len(self.images.drives), "drive"))

        status.begin("devices")
        self._connect(config, self.images)
        from ..machine.board import build_machine

        machine = self.machine = build_machine(config)
        self._find_devices(machine, self.images)
        status.end(", ".join(machine.devices) or "none")

        from ..qmp.monitor import CommandThread

        self.commands = CommandThread(running=False)
        monitor = self._monitor(machine, config, self.images)
        self.consoles.start_monitors(monitor, self.commands)
        machine.events.subscribe(self._event)
        return machine

    def _settings(self) -> MachineConfig:
        from ..machine.config import MachineConfig

        line = self.line
        settings.only_none(line)
        board, accelerators = settings.machine(line)
        for name in ("initrd", "append"):
            if name in line and "kernel" not in line:
                raise UsageError(f"-{name} is for a kernel: add -kernel FILE")
        return MachineConfig(
            board=board,
            name=settings.name(line) or "vm",
            ram=settings.memory(line),
            cpus=settings.cpus(line),
            accelerators=accelerators,
            bios=line.value("bios"),
            kernel=line.value("kernel"),
            initrd=line.value("initrd"),
            append=line.value("append") or "",
            boot=settings.boot(line),
            rtc_base=settings.rtc_base(line),
            serials=list(self.consoles.serials),
            no_reboot="no-reboot" in line,
            no_shutdown="no-shutdown" in line,
        )

    def _connect(self, config: MachineConfig, images: Images) -> None:
        """Drives by interface, and devices with the drives they name."""
        from ..machine.config import DriveConfig

        for spec, drive in zip(images.specs, list(images.drives), strict=True):
            if spec.interface != "none":
                options = {"serial": spec.serial} if spec.serial is not None else {}
                config.drives.append(
                    DriveConfig(drive.backend, spec.interface, spec.media, spec.index or 0, spec.id, options)
                )
        for given in self.line.all("device"):
            config.devices.append(_device(given.value, images))

    def _find_devices(self, machine: Machine, images: Images) -> None:
        """Tell each drive its device, by the backend they share."""
        for drive in images.drives:
            drive.device = next((each for each in machine.devices.values() if each.backend is drive.backend), None)
            drive.backend.on_error.append(_io_error_events(machine, drive))

    def _monitor(self, machine: Machine, config: MachineConfig, images: Images) -> Monitor:
        from ..qmp.monitor import Monitor
        from ..version import qapi_version

        return Monitor(
            machine,
            images.drives,
            settings.name(self.line),
            qapi_version(),
            self.consoles.devices,
            _accelerator(machine),
            config.cpus,
            images.open_medium,
        )

    def _event(self, name: str, data: dict[str, Any]) -> None:
        if name == "INTERNAL_ERROR":
            self.failure = str(data.get("message") or "the machine cannot go on")
            if self.machine is not None and "no-shutdown" not in self.line:
                self.machine.quit()
        self.status.event(name, data)

    def go(self, machine: Machine) -> int:
        """Start *machine* and wait for its end; the exit status."""
        assert self.images is not None
        paused = "S" in self.line
        self.status.paused = paused
        self.status.assembled(
            Assembly(
                _title(machine, self.config), self.images.drives, self.consoles.console, self.consoles.console_here
            )
        )
        if self.consoles.stdio is not None:
            self.consoles.stdio.before_output = self.status.await_console
            self.consoles.stdio.before_input = self.status.want_console
        with self._signals(machine):
            self.status.begin("firmware" if "kernel" not in self.line else "kernel", "paused" if paused else "")
            # Reset first, then let input in, then run: a reset would lose what was typed ahead.
            machine.start(paused=True)
            self.consoles.open(machine)
            self.started = True
            self.commands.start()
            if not paused:
                machine.cont()
            # Not one long wait: of two signals at once the kernel may give the first to another thread, whose C handler
            # leaves the Python handler to this one without waking it. `timeout` sends SIGTERM and SIGCONT together.
            while machine.wait(_LOOK_FOR_SIGNALS) is None:
                pass
        return 0

    @contextlib.contextmanager
    def _signals(self, machine: Machine) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP end the machine in order: everything written is flushed."""
        from ..machine.runstate import ExitReason

        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(number: int, frame: object) -> None:
            if not self.started:  # still waiting for somebody to connect
                raise SystemExit(128 + number)
            machine.quit(ExitReason.HOST_SIGNAL)

        def resumed(number: int, frame: object) -> None:
            if self.consoles.stdio is not None:
                self.consoles.stdio.resumed()

        handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), end)
        handlers[signal.SIGCONT] = resumed
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """End everything. What was written is flushed, the terminal restored."""
        with contextlib.ExitStack() as stack:  # last in, first out
            stack.callback(self.consoles.close)
            stack.callback(self.status.close)
            if self.images is not None:
                stack.callback(self.images.close)
            if self.machine is not None:
                stack.callback(self.machine.close)
            commands = getattr(self, "commands", None)
            if commands is not None:
                stack.callback(commands.close)


def run(line: CommandLine) -> int:
    """Run the machine of *line* and return the exit status. Raises VmError for what the user can mend."""
    this = Run(line)
    try:
        machine = this.assemble()
        result = this.go(machine)
    except BaseException:
        this.status.fail()
        raise
    finally:
        this.close()
    if this.failure is not None:
        first, *rest = this.failure.splitlines()
        for text in rest:
            print(text, file=sys.stderr)
        raise VmError(first)
    return result


def _device(text: str, images: Images) -> DeviceConfig:
    """One ``-device``."""
    from ..machine.config import DeviceConfig

    values: dict[str, Any]
    if text.lstrip().startswith("{"):
        values = parse_json(text)
    else:
        values = nest(split(text, "driver"))
    driver = values.pop("driver", None)
    if not isinstance(driver, str) or not driver:
        raise UsageError(f"-device {text}: the name of a driver is needed; -device help lists them")
    from ..plugins import registry

    registry().find("device", driver)
    reference = values.pop("drive", None)
    backend = None
    if reference is not None:
        backend = images.backend_of(str(reference), f"-device {driver}").backend
    return DeviceConfig(driver, values, backend)


def _accelerator(machine: Machine) -> str:
    """The name of the accelerator that *machine* runs on."""
    from ..plugins import registry

    implementation = type(machine.accel)
    for each in registry().all("accelerator"):
        module, _, attribute = each.implementation.partition(":")
        if implementation.__module__ == module and implementation.__qualname__ == attribute:
            return each.name
    return implementation.__name__.lower() if machine.accel is not None else "none"


def _title(machine: Machine, config: MachineConfig) -> str:
    from .picture import size

    name = f"{machine.name}: " if machine.name != "vm" else ""
    cpus = _count(config.cpus, "processor")
    return f"{name}{config.board}, {size(config.ram)} RAM, {cpus}, {_accelerator(machine)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _io_error_events(machine: Machine, drive: Drive) -> Any:
    """A listener that makes BLOCK_IO_ERROR events of *drive*'s failed requests (QAPI ``BLOCK_IO_ERROR``)."""
    import errno
    import os

    def tell(request: Any, action: str) -> None:
        node = drive.backend.node
        machine.events.emit(
            "BLOCK_IO_ERROR",
            **{
                "device": drive.id,
                "node-name": node.node_name if node is not None else "",
                "operation": "read" if request.op == 0 else "write",
                "action": action,
                "nospace": request.status == errno.ENOSPC,
                "reason": os.strerror(request.status or errno.EIO),
            },
        )

    return tell
