"""Run states, threads, resets and the end of a machine, with processors that execute scripts instead of guests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vm_core.block.request import Op, Request
from vm_core.errors import FatalError, UsageError
from vm_core.machine.accel import Accelerator, AccelMachine, Availability, CpuState, VCpu
from vm_core.machine.machine import ExitReason, Machine, RunState
from vm_core.machine.memory import GuestMemory, Region, RegionKind

Script = Callable[[Machine], object]


class ScriptCpu(VCpu):
    """Calls the accelerator's script again and again, as a guest would execute instructions."""

    def __init__(self, accel: ScriptAccelerator) -> None:
        self.accel = accel
        self.wake = threading.Event()
        self.resets: list[CpuState] = []
        self.rounds = 0

    def run(self) -> None:
        machine = self.accel.machine
        while not machine.must_return():
            with machine.lock:
                self.rounds += 1
                self.accel.script(machine)
            self.wake.wait(0.001)
            self.wake.clear()

    def kick(self) -> None:
        self.wake.set()

    def reset(self, state: CpuState) -> None:
        self.resets.append(state)

    def registers(self) -> dict[str, int]:
        return {"rounds": self.rounds}


class ScriptAccelerator(Accelerator):
    def __init__(self, machine: AccelMachine, options: dict[str, str]) -> None:
        assert isinstance(machine, Machine)
        self.machine = machine
        self.script: Script = lambda machine: None
        self.written: list[tuple[int, int]] = []
        self.closed = False

    @classmethod
    def availability(cls) -> Availability:
        return Availability(True)

    def create_vcpu(self, index: int) -> ScriptCpu:
        return ScriptCpu(self)

    def memory_changed(self, memory: GuestMemory) -> None:
        pass

    def dma_written(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.written += ranges

    def close(self) -> None:
        self.closed = True


class Bench:
    """A machine on scripts, with its events written down."""

    def __init__(self, cpus: int = 2, script: Script = lambda machine: None, **attributes: Any) -> None:
        memory = GuestMemory(1 << 20)
        memory.add(Region("ram", 0, 1 << 20, RegionKind.RAM))
        self.machine = machine = Machine(memory)
        machine.cpu_count = cpus
        for name, value in attributes.items():
            setattr(machine, name, value)
        self.accel = ScriptAccelerator(machine, {})
        self.accel.script = script
        machine.use_accelerator(self.accel)
        self.events: list[str] = []
        machine.events.subscribe(lambda name, data: self.events.append(name))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.machine.close()

    @property
    def cpus(self) -> list[ScriptCpu]:
        return [cpu for cpu in self.machine.vcpus if isinstance(cpu, ScriptCpu)]

    def rounds(self) -> int:
        return sum(cpu.rounds for cpu in self.cpus)

    def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.001)


def test_stop_and_cont() -> None:
    """Between stop and cont no vCPU does anything and virtual time stands still."""
    with Bench() as bench:
        machine = bench.machine
        machine.start()
        bench.until(lambda: all(cpu.rounds for cpu in bench.cpus))
        machine.stop()
        assert machine.status is RunState.PAUSED
        rounds, now = bench.rounds(), machine.clock.now_ns()
        time.sleep(0.02)
        assert (bench.rounds(), machine.clock.now_ns()) == (rounds, now)
        machine.cont()
        bench.until(lambda: bench.rounds() > rounds)
        assert machine.clock.now_ns() >= now
        assert bench.events == ["RESUME", "STOP", "RESUME"]


def test_a_paused_start_waits() -> None:
    """Started paused the processors are reset and wait for cont."""
    with Bench() as bench:
        bench.machine.start(paused=True)
        assert bench.machine.status is RunState.PRELAUNCH
        time.sleep(0.02)
        assert bench.rounds() == 0
        assert all(len(cpu.resets) == 1 for cpu in bench.cpus)
        bench.machine.cont()
        bench.until(bench.rounds)


def test_stopping_and_resuming_from_many_threads() -> None:
    """Concurrent stops, conts and resets neither deadlock nor lose a vCPU."""
    with Bench() as bench:
        machine = bench.machine
        machine.start()
        actions = (machine.stop, machine.cont, machine.system_reset)

        def work(seed: int) -> None:
            for n in range(30):
                actions[(n * 7 + seed) % 3]()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        machine.cont()
        rounds = bench.rounds()
        bench.until(lambda: bench.rounds() > rounds)


def test_the_guest_resets_the_machine() -> None:
    """A reset asked for inside a handler resets devices in order and all vCPUs, and the guest goes on."""
    order: list[str] = []
    once = []

    def script(machine: Machine) -> None:
        if not once:
            once.append(1)
            machine.request_reset("test")

    with Bench(script=script) as bench:
        machine = bench.machine
        machine.on_reset += [lambda: order.append("chipset"), lambda: order.append("serial")]
        machine.after_reset.append(lambda: order.append("after"))
        machine.start()
        bench.until(lambda: all(len(cpu.resets) == 2 for cpu in bench.cpus))
        assert order == ["chipset", "serial", "after"] * 2
        rounds = bench.rounds()
        bench.until(lambda: bench.rounds() > rounds)
        assert bench.events[:2] == ["RESUME", "RESET"]


def test_power_off_ends_the_machine() -> None:
    """The guest's power-off is the reason that wait returns."""
    with Bench(script=lambda machine: machine.request_shutdown()) as bench:
        bench.machine.start()
        assert bench.machine.wait(10) is ExitReason.GUEST_SHUTDOWN
        assert bench.machine.status is RunState.SHUTDOWN
        assert "SHUTDOWN" in bench.events


def test_no_shutdown_stops_and_a_reset_revives() -> None:
    """Under -no-shutdown the machine stays, refuses to continue, and runs again after a reset."""
    off = [True]

    def script(machine: Machine) -> None:
        if off:
            off.clear()
            machine.request_shutdown()

    with Bench(script=script, no_shutdown=True) as bench:
        machine = bench.machine
        machine.start()
        bench.until(lambda: machine.status is RunState.SHUTDOWN)
        assert machine.wait(0.02) is None
        with pytest.raises(UsageError, match="system_reset it first"):
            machine.cont()
        machine.system_reset()
        assert machine.status is RunState.PAUSED
        rounds = bench.rounds()
        machine.cont()
        bench.until(lambda: bench.rounds() > rounds)


def test_no_reboot_ends_at_a_reset() -> None:
    """Under -no-reboot a reset of the guest ends the machine, without running anything again."""
    with Bench(script=lambda machine: machine.request_reset("test"), no_reboot=True) as bench:
        bench.machine.start()
        assert bench.machine.wait(10) is ExitReason.GUEST_RESET
        assert all(len(cpu.resets) == 1 for cpu in bench.cpus)


def test_quit_from_outside() -> None:
    """quit ends a running machine with its reason."""
    with Bench() as bench:
        bench.machine.start()
        bench.machine.quit(ExitReason.HOST_SIGNAL)
        assert bench.machine.wait(10) is ExitReason.HOST_SIGNAL
    assert bench.accel.closed


def test_a_vcpu_that_fails_stops_the_machine() -> None:
    """What escapes from a vCPU is an internal error: the machine stops, keeps the message, and cannot continue."""

    def script(machine: Machine) -> None:
        raise ValueError("broken device")

    with Bench(cpus=1, script=script) as bench:
        machine = bench.machine
        machine.start()
        bench.until(lambda: machine.status is RunState.INTERNAL_ERROR)
        assert "broken device" in machine.error
        assert "INTERNAL_ERROR" in bench.events
        with pytest.raises(UsageError, match="cannot go on"):
            machine.cont()


def test_a_callback_that_fails_stops_the_machine() -> None:
    """An error on the I/O thread is not swallowed either."""
    with Bench() as bench:
        bench.machine.start()
        bench.machine.iothread.call_soon(lambda: 1 // 0)
        bench.until(lambda: bench.machine.status is RunState.INTERNAL_ERROR)
        assert "ZeroDivisionError" in bench.machine.error


def test_stop_with_the_lock_held_returns_at_once() -> None:
    """Asked for with the device lock held, stopping happens as soon as the lock is free."""
    with Bench() as bench:
        machine = bench.machine
        machine.start()
        with machine.lock:
            machine.stop()
        bench.until(lambda: machine.status is RunState.PAUSED)


class SlowBackend:
    """As much of a backend as the machine uses: completes each request on a thread of its own after a while."""

    def __init__(self) -> None:
        self.on_error: list[Any] = []
        self.on_fatal: list[Any] = []
        self.sink: Any = None
        self.pending = 0
        self.quiet = threading.Condition()
        self.retried = 0

    def set_completion_sink(self, sink: Any) -> None:
        self.sink = sink

    def submit(self, requests: list[Request]) -> None:
        with self.quiet:
            self.pending += 1
        threading.Thread(target=self._work, args=(requests,)).start()

    def _work(self, requests: list[Request]) -> None:
        time.sleep(0.02)
        self.sink(requests)
        with self.quiet:
            self.pending -= 1
            self.quiet.notify_all()

    def drain(self) -> None:
        with self.quiet:
            self.quiet.wait_for(lambda: not self.pending)

    def retry(self) -> None:
        self.retried += 1


def test_stopping_waits_for_requests_and_what_they_submit() -> None:
    """When stop returns every request is complete, those too that a completion submitted."""
    with Bench() as bench:
        machine = bench.machine
        backend: Any = SlowBackend()
        machine.attach_backend(backend)
        done: list[str] = []

        def second(request: Request) -> None:
            assert machine.iothread.current
            done.append("second")

        def first(request: Request) -> None:
            done.append("first")
            backend.submit([Request(Op.FLUSH, done=second)])

        machine.start()
        backend.submit([Request(Op.READ, 0, 8, guest=((0x1000, 8),), done=first)])
        machine.stop()
        assert done == ["first", "second"]
        assert bench.accel.written == [(0x1000, 8)]


def test_an_io_error_with_policy_stop() -> None:
    """The machine stops with status io-error; cont asks the backend to try again."""
    with Bench() as bench:
        machine = bench.machine
        backend: Any = SlowBackend()
        machine.attach_backend(backend)
        machine.start()
        for listener in backend.on_error:
            listener(Request(Op.WRITE), "stop")
        bench.until(lambda: machine.status is RunState.IO_ERROR)
        machine.cont()
        assert machine.status is RunState.RUNNING
        assert backend.retried == 1


def test_what_ends_everything_stops_the_machine() -> None:
    """A FatalError of a backend ends the machine with its text; nothing else is told of it."""
    with Bench() as bench:
        machine = bench.machine
        backend: Any = SlowBackend()
        machine.attach_backend(backend)
        machine.start()
        for listener in backend.on_fatal:
            listener(FatalError("the images differ"))
        bench.until(lambda: machine.status is RunState.INTERNAL_ERROR)
        assert machine.error == "the images differ"


def test_closing_twice_and_unstarted() -> None:
    """Closing works in any state, and events tell of nothing that did not happen."""
    bench = Bench()
    bench.machine.close()
    bench.machine.close()
    assert bench.accel.closed
    assert bench.events == []
