"""The machine: memory, ports, interrupts, clock, threads and run states, and the devices that were put into it.

Theory of operation. A :class:`Machine` is a frame without devices; a board (see :mod:`vm_core.machine.board`) fills it.
Three kinds of thread touch it. Each *vCPU thread* runs guest code and calls register handlers with :attr:`Machine.lock`
held. The *I/O thread* waits for timers, sockets and completed requests. *Callers* (the command line, tests) start and
stop it. Stopping, resuming and resetting are always done by the I/O thread, one after another, so that nothing they do
can overlap; a caller on another thread waits for the result, unless it holds the device lock or is a vCPU: then the
work is queued and the call returns at once.

To *stop* is: every vCPU returns from ``run``, backends are drained and their completions handled, virtual time stands
still. Everything else that changes a machine (reset, power-off) happens in that state.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, VmError
from .accel import Accelerator, CpuInterrupts, CpuState, InterruptController, LockLike, VCpu
from .bootorder import BootOrder
from .clock import Clock
from .events import EventHub
from .iothread import IoThread
from .memory import GuestMemory
from .ports import PortSpace
from .runstate import ExitReason, RunState

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..block.request import Request
    from ..devices.bus import Bus
    from ..devices.device import Device
    from .chipset.dma8237 import IsaDma

__all__ = ["ExitReason", "Machine", "RunState"]

#: Seconds between forced switches of the interpreter's lock while a machine runs. The default of 5 ms is longer than
#: a timer tick of the guest: the I/O thread would deliver every tick late while a vCPU thread is in a handler.
SWITCH_INTERVAL = 0.0005


class NoInterrupts:
    """Interrupt inputs of a machine without an interrupt controller, and of vCPUs that nothing is connected to."""

    def set_irq(self, irq: int, level: bool) -> None:
        """Nobody hears it."""

    def send_msi(self, address: int, data: int) -> None:
        """Nobody hears it."""

    def pending(self) -> bool:
        """Never."""
        return False

    def acknowledge(self) -> int:
        """The vector that a bus with nobody on it shows."""
        return 0xFF


class Machine:
    """A machine of *memory*, without any device or processor yet. See the module's text."""

    def __init__(
        self,
        memory: GuestMemory,
        *,
        name: str = "vm",
        iothread: IoThread | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.memory = memory
        self.ports = PortSpace()
        #: The device lock. Held around register handlers and timer callbacks, never across host I/O.
        self.lock: LockLike = threading.RLock()
        self.events = EventHub()
        self.iothread = iothread or IoThread(self._callback_failed)
        self.clock = clock or Clock(self.iothread)
        self.iothread.on_alarm = self._run_timers
        #: Interrupt inputs: the board's controllers, or the accelerator's.
        self.irqs: InterruptController = NoInterrupts()
        self.accel: Accelerator | None = None
        #: What a vCPU starts from after RESET; a board that boots a kernel directly replaces it.
        self.reset_state: Callable[[int], CpuState] = lambda index: CpuState()
        self.buses: dict[str, Bus] = {}
        self.devices: dict[str, Device] = {}
        self.backends: list[BlockBackend] = []
        self.boot_order = BootOrder()
        #: The board that filled this frame; its parts are its attributes.
        self.board: Any = None
        #: The ISA bus' DMA controllers, where the board has some.
        self.dma: IsaDma | None = None
        #: Parts of the board that are no devices (chipset, firmware), reset before the devices, in this order.
        self.on_reset: list[Callable[[], object]] = []
        #: Called after all devices were reset, with the lock held: a board without firmware does its work here.
        self.after_reset: list[Callable[[], object]] = []
        #: Called when the operator presses the power button; set by the board's power management.
        self.on_powerdown: Callable[[], object] | None = None
        #: Called after the machine has ended, to release what a board opened. Last in, first out.
        self.on_close: list[Callable[[], object]] = []
        #: A reset ends the machine (-no-reboot); a power-off only stops it (-no-shutdown).
        self.no_reboot = False
        self.no_shutdown = False
        self.status = RunState.PRELAUNCH
        self.error = ""
        self.cpu_count = 1
        self._cpu_interrupts: dict[int, CpuInterrupts] = {}
        self.vcpus: list[VCpu] = []
        self._threads: list[threading.Thread] = []
        self._gate = threading.Condition()
        #: vCPU threads may be in run().
        self._go = False
        self._quit = False
        self._parked = 0
        self._controlling = False
        self._waiting_controls: list[Callable[[], object]] = []
        self._completions = 0
        self._exit = threading.Event()
        self._exit_reason: ExitReason | None = None
        self._started = False
        self._closed = False
        self._old_switch_interval: float | None = None

    # What an accelerator sees (vm_core.machine.accel.AccelMachine).

    def must_return(self) -> bool:
        """A vCPU's ``run`` must return now."""
        return not self._go

    def cpu_interrupts(self, index: int) -> CpuInterrupts:
        """The interrupt input of vCPU *index*."""
        return self._cpu_interrupts.get(index) or NoInterrupts()

    def connect_interrupts(self, index: int, interrupts: CpuInterrupts) -> None:
        """Let the board's interrupt controller serve vCPU *index*."""
        self._cpu_interrupts[index] = interrupts

    def kick(self, index: int) -> None:
        """vCPU *index* has an interrupt to look at."""
        if index < len(self.vcpus):
            self.vcpus[index].kick()

    def use_accelerator(self, accelerator: Accelerator) -> None:
        """Run on *accelerator*, with its interrupt controllers where it brings some."""
        self.accel = accelerator
        if accelerator.irqchip is not None:
            self.irqs = accelerator.irqchip
        self.memory.listeners.append(accelerator.memory_changed)

    # Devices.

    def add_bus(self, bus: Bus) -> Bus:
        """Make *bus* a place for devices."""
        if bus.name in self.buses:
            raise UsageError(f"there are two buses called {bus.name}")
        self.buses[bus.name] = bus
        return bus

    def find_bus(self, type: str, name: str | None = None) -> Bus:
        """The bus called *name*, or the first one of *type* with room. Raises UsageError."""
        if name is not None:
            found = self.buses.get(name)
            if found is None:
                known = ", ".join(sorted(self.buses)) or "none"
                raise UsageError(f"bus={name}: there is no such bus; there is: {known}")
            if found.type != type:
                raise UsageError(f"bus={name}: it is of type {found.type}, a bus of type {type} is needed")
            return found
        candidates = [bus for bus in self.buses.values() if bus.type == type]
        if not candidates:
            raise UsageError(f"the machine has no {type} bus: add a controller that provides one with -device")
        return next((bus for bus in candidates if bus.has_room()), candidates[0])

    def add_device(self, driver: str, options: dict[str, Any], backend: BlockBackend | None = None) -> Device:
        """Make a device of the frontend called *driver* and plug it in.

        *options* are those of ``-device``: ``id``, ``bus``, ``addr`` (or ``unit``), ``bootindex`` and the driver's
        own. Raises PluginError for a driver that is not installed, UsageError for options it does not know.
        """
        from .assembly import add_device

        return add_device(self, driver, options, backend)

    def attach_backend(self, backend: BlockBackend) -> None:
        """Let *backend* complete its requests on the I/O thread, and stop with the machine."""
        if backend in self.backends:
            return
        self.backends.append(backend)
        backend.set_completion_sink(self._completed)
        backend.on_error.append(self._io_error)
        backend.on_fatal.append(lambda error: self.internal_error(str(error)))

    def _completed(self, requests: list[Request]) -> None:
        """Completed requests, on whatever thread the backend completes them."""
        self.iothread.call_soon(lambda: self._deliver(requests))

    def _deliver(self, requests: Sequence[Request]) -> None:
        self._completions += 1
        accel = self.accel
        if accel is not None:
            ranges = [piece for request in requests if request.guest for piece in request.guest]
            if ranges:
                accel.dma_written(ranges)
        for request in requests:
            if request.done is not None:
                request.done(request)

    def completed(self, requests: list[Request]) -> None:
        """The completion sink of every backend, for devices that put one of their own in front of it. Any thread."""
        self._completed(requests)

    def deliver(self, requests: Sequence[Request]) -> None:
        """Handle completions on this thread: the I/O thread, or a vCPU's where the accelerator serves kicks."""
        self._deliver(requests)

    def _io_error(self, request: Request, action: str) -> None:
        """A request failed on a backend whose policy is *action* (``report``, ``ignore`` or ``stop``)."""
        if action == "stop":
            self._control(lambda: self._stop(RunState.IO_ERROR), wait=False)

    # Timers and callbacks.

    def _run_timers(self) -> None:
        with self.lock:
            self.clock.run_due()

    def _callback_failed(self, error: BaseException) -> None:
        """Something on the I/O thread raised what is no device's status: a bug, or an error meant for the user."""
        if isinstance(error, VmError):
            self.internal_error(str(error))
        else:
            text = "".join(traceback.format_exception(error))
            self.internal_error(f"I/O thread: {error!r}\n{text}")

    # Control: one operation at a time, on the I/O thread.

    def _control(self, operation: Callable[[], object], *, wait: bool = True) -> None:
        """Run *operation* on the I/O thread; wait for it where that cannot block others for ever."""
        if self._may_wait() and wait:
            if self.iothread.current or not self.iothread.started:
                self._run_control(operation)
            else:
                self.iothread.call(lambda: self._run_control(operation))
        else:
            self.iothread.call_soon(lambda: self._run_control(operation))

    def _may_wait(self) -> bool:
        # The I/O thread takes the lock and waits for vCPUs: whoever holds the lock or is a vCPU must not wait for it.
        # _is_owned() is what threading.Condition itself uses to ask an RLock.
        owned: bool = self.lock._is_owned()  # type: ignore[attr-defined]
        return not owned and threading.current_thread() not in self._threads

    def _run_control(self, operation: Callable[[], object]) -> None:
        self._waiting_controls.append(operation)
        if self._controlling:  # asked by a completion that a running operation handles: it comes next
            return
        self._controlling = True
        try:
            self._waiting_controls.pop(0)()
        finally:
            self._controlling = False
            while self._waiting_controls:
                # Asked for meanwhile by somebody who does not wait: nobody else hears of a failure.
                following = self._waiting_controls.pop(0)
                self._controlling = True
                try:
                    following()
                except Exception as error:
                    self._callback_failed(error)
                finally:
                    self._controlling = False

    def _halt_vcpus(self) -> None:
        """Return when no vCPU is in run(). Called without the device lock."""
        self._go = False
        for vcpu in self.vcpus:
            vcpu.kick()
        with self._gate:
            while self._parked < len(self._threads):
                self._gate.wait()

    def _release_vcpus(self) -> None:
        with self._gate:
            self._go = True
            self._gate.notify_all()

    def _drain(self) -> None:
        """Return when no request is in flight and every completion was handled."""
        while True:
            before = self._completions
            for backend in self.backends:
                backend.drain()
            while self.iothread.run_pending():
                pass
            if self._completions == before:
                return

    def _stop(self, status: RunState) -> None:
        """Hold everything and show *status*."""
        was = self.status
        self._halt_vcpus()
        with self.lock:
            self.clock.stop()
        self._drain()
        self.status = status
        if was is RunState.RUNNING:
            self.events.emit("STOP")
        if status is RunState.INTERNAL_ERROR and was is not status:
            self.events.emit("INTERNAL_ERROR", message=self.error)

    def _resume(self) -> None:
        if self.status not in (RunState.PRELAUNCH, RunState.PAUSED, RunState.IO_ERROR):
            return
        was = self.status
        self.status = RunState.RUNNING
        with self.lock:
            self.clock.start()
        if was is RunState.IO_ERROR:
            for backend in self.backends:
                backend.retry()
        self.events.emit("RESUME")
        self._release_vcpus()

    # What callers use.

    def start(self, *, paused: bool = False) -> None:
        """Make the vCPUs, reset everything and run; *paused*: wait for :meth:`cont`."""
        if self._started or self._closed:
            raise RuntimeError("a machine is started once")
        self._started = True
        self._old_switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._old_switch_interval, SWITCH_INTERVAL))
        self.iothread.start()
        if self.accel is not None:
            self.accel.memory_changed(self.memory)
            self.vcpus = [self.accel.create_vcpu(index) for index in range(self.cpu_count)]
        for index, vcpu in enumerate(self.vcpus):
            thread = threading.Thread(target=self._vcpu_main, args=(vcpu,), name=f"vm-cpu{index}", daemon=True)
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()
        self._control(self._first_start if not paused else self._reset_all)

    def _first_start(self) -> None:
        self._reset_all()
        self._resume()

    def stop(self) -> None:
        """Pause: vCPUs halted, requests drained, time held."""
        self._control(self._pause)

    def _pause(self) -> None:
        if self.status is RunState.RUNNING:
            self._stop(RunState.PAUSED)

    def cont(self) -> None:
        """Go on after :meth:`stop`, an I/O error, or a start in paused state."""
        self._control(self._cont)

    def _cont(self) -> None:
        if self.status is RunState.INTERNAL_ERROR:
            raise UsageError(f"the machine cannot go on: {self.error}")
        if self.status is RunState.SHUTDOWN:
            raise UsageError("the machine is switched off: system_reset it first")
        self._resume()

    def system_reset(self) -> None:
        """Press the reset button."""
        self._control(lambda: self._reset(guest=False))

    def request_reset(self, reason: str) -> None:
        """The guest, or its accelerator, resets the machine; returns at once. *reason* is for people."""
        self._halt_soon()
        self._control(lambda: self._reset(guest=True, reason=reason), wait=False)

    def request_shutdown(self, reason: ExitReason = ExitReason.GUEST_SHUTDOWN) -> None:
        """The power goes off; returns at once."""
        self._halt_soon()
        self._control(lambda: self._shutdown(reason), wait=False)

    def system_powerdown(self) -> None:
        """Press the power button: the guest is asked to shut down."""
        self.events.emit("POWERDOWN")
        if self.on_powerdown is not None:
            with self.lock:
                self.on_powerdown()

    def quit(self, reason: ExitReason = ExitReason.HOST_QMP_QUIT) -> None:
        """End the machine, whatever the guest thinks; :meth:`wait` returns soon."""
        self._control(lambda: self._shutdown(reason, final=True), wait=False)

    def internal_error(self, message: str) -> None:
        """Stop with status ``internal-error`` and keep *message* for people. Any thread; returns at once."""
        if not self.error:
            self.error = message
        self._halt_soon()
        self._control(lambda: self._stop(RunState.INTERNAL_ERROR), wait=False)

    def _halt_soon(self) -> None:
        """Let no vCPU begin another instruction for long; a queued operation decides what comes next."""
        self._go = False
        for vcpu in self.vcpus:
            vcpu.kick()

    def _reset(self, *, guest: bool, reason: str = "") -> None:
        if self.status is RunState.INTERNAL_ERROR and guest:
            return
        self.events.emit("RESET", guest=guest, reason=reason or "host-qmp-system-reset")
        if self.no_reboot:
            self._shutdown(ExitReason.GUEST_RESET if guest else ExitReason.HOST_QMP_SYSTEM_RESET, final=True)
            return
        running = self.status is RunState.RUNNING
        self._halt_vcpus()
        self._drain()
        self._reset_all()
        self.error = ""
        if self.status in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR, RunState.IO_ERROR):
            self.status = RunState.PAUSED
        if running:
            self._release_vcpus()

    def _reset_all(self) -> None:
        """Everything back to its power-on state; vCPUs are halted and requests drained."""
        with self.lock:
            for part in self.on_reset:
                part()
            for device in self.devices.values():
                device.reset()
            for part in self.after_reset:
                part()
        for index, vcpu in enumerate(self.vcpus):
            vcpu.reset(self.reset_state(index))

    def _shutdown(self, reason: ExitReason, *, final: bool = False) -> None:
        if self._exit.is_set():
            return
        if self.status is not RunState.SHUTDOWN:
            if self._started:
                self.events.emit("SHUTDOWN", guest=reason.guest, reason=str(reason))
            self._stop(RunState.SHUTDOWN)
        if final or not self.no_shutdown:
            self._exit_reason = reason
            self._exit.set()

    def wait(self, timeout: float | None = None) -> ExitReason | None:
        """Wait until the machine has ended and return why; None when *timeout* seconds passed first."""
        self._exit.wait(timeout)
        return self._exit_reason

    @property
    def exit_reason(self) -> ExitReason | None:
        """Why the machine ended, None while it has not."""
        return self._exit_reason

    def close(self) -> None:
        """End the threads and release everything. A second call does nothing."""
        if self._closed:
            return
        self._control(lambda: self._shutdown(ExitReason.HOST_QMP_QUIT, final=True))
        self._closed = True
        with self._gate:
            self._quit = True
            self._gate.notify_all()
        for thread in self._threads:
            thread.join()
        for vcpu in self.vcpus:
            vcpu.close()
        for release in reversed(self.on_close):
            release()
        self.iothread.close()
        if self.accel is not None:
            self.accel.close()
        if self._old_switch_interval is not None:
            sys.setswitchinterval(self._old_switch_interval)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # vCPU threads.

    def _vcpu_main(self, vcpu: VCpu) -> None:
        gate = self._gate
        while True:
            with gate:
                self._parked += 1
                gate.notify_all()
                while not self._go and not self._quit:
                    gate.wait()
                if self._quit:
                    return
                self._parked -= 1
            try:
                vcpu.run()
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                with contextlib.suppress(Exception):
                    text = f"{_show_registers(vcpu)}\n{text}"
                self.internal_error(f"vCPU: {error!r}\n{text}")


def _show_registers(vcpu: VCpu) -> str:
    return " ".join(f"{name}={value:x}" for name, value in vcpu.registers().items())
