"""A machine of the tests' own, without a board: 1 MiB of RAM, ports, a lock, and a vCPU thread that can be stopped."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

from vm_core.machine.accel import CpuInterrupts, CpuState, Segment
from vm_core.machine.memory import GuestMemory, Region, RegionKind
from vm_core.machine.ports import PortSpace
from vm_kvm.accelerator import KvmAccelerator
from vm_kvm.system import KvmUnavailableError, System

#: Where test programs begin: 0000:1000.
ORIGIN = 0x1000
#: A port whose every write stops the machine.
DONE = 0xF4
#: Descriptor tables of flat 32-bit guests.
GDT = 0x800
IDT = 0x4000


def kvm_missing() -> str:
    """Why KVM cannot be used here, empty if it can."""
    try:
        System().close()
    except KvmUnavailableError as e:
        return str(e)
    return ""


_missing = kvm_missing()
needs_kvm = pytest.mark.skipif(bool(_missing), reason=_missing or "KVM is here")


@attrs.define
class Recorder:
    """A handler that records accesses, and reads from *answers* (oldest first; then all ones)."""

    log: list[tuple[Any, ...]] = attrs.field(factory=list)
    answers: list[int] = attrs.field(factory=list)
    hook: Callable[[], object] | None = None

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size))
        return self.answers.pop(0) if self.answers else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size, value))
        if self.hook is not None:
            self.hook()


class Guest:
    """A machine that runs a program in real mode (an ``AccelMachine``)."""

    def __init__(
        self, code: bytes, *, ram: int = 1 << 20, rom: int = 0, cpus: int = 1, protected: bool = False
    ) -> None:
        self.protected = protected
        self.memory = GuestMemory(ram, rom_size=rom)
        self.memory.add(Region("ram", 0, ram, RegionKind.RAM))
        self.memory.write(ORIGIN, code)
        self.ports = PortSpace()
        self.lock = threading.RLock()
        self.resets: list[str] = []
        self.errors: list[str] = []
        self._stop = True
        self.done = Recorder(hook=self.halt)
        self.ports.add(DONE, 1, self.done)
        self.accel = KvmAccelerator(self, {})
        self.memory.listeners.append(self.accel.memory_changed)
        self.accel.memory_changed(self.memory)
        self.cpus = [self.accel.create_vcpu(index) for index in range(cpus)]
        self.reset()

    def reset(self) -> None:
        """Every vCPU to its state after RESET, the first at the program: in real mode, or in flat 32-bit mode."""
        start = CpuState(eip=ORIGIN, cs=Segment(0, 0, 0xFFFF, type=0xB), regs={"esp": 0x8000})
        if self.protected:
            start.cr0 |= 1
            start.cs = Segment(8, 0, 0xFFFFFFFF, type=0xB, g=1, db=1)
            start.ds = start.es = start.ss = Segment(16, 0, 0xFFFFFFFF, type=3, g=1, db=1)
            start.gdt = (GDT, 23)
            start.idt = (IDT, 0x7FF)
            self.memory.write(GDT, struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
        self.accel.irqchip.reset()
        for cpu in self.cpus:
            cpu.reset(start)

    def gate(self, vector: int, address: int) -> None:
        """Let the flat 32-bit guest handle *vector* at *address* (a 32-bit interrupt gate; Intel SDM vol. 3, 7.11)."""
        self.memory.write(IDT + 8 * vector, struct.pack("<HHHH", address & 0xFFFF, 8, 0x8E00, address >> 16))

    # AccelMachine.

    def must_return(self) -> bool:
        return self._stop

    def cpu_interrupts(self, index: int) -> CpuInterrupts:
        raise AssertionError("the kernel delivers interrupts")

    def request_reset(self, reason: str) -> None:
        self.resets.append(reason)
        self.halt()

    def internal_error(self, message: str) -> None:
        self.errors.append(message)
        self.halt()

    # Running.

    def halt(self) -> None:
        """Make every vCPU return. Any thread."""
        self._stop = True
        for cpu in self.cpus:
            cpu.kick()

    def run(self, timeout: float = 10.0) -> None:
        """Run until something halts the machine; fails the test after *timeout* seconds."""
        with self.running():
            deadline = time.monotonic() + timeout
            while not self._stop and time.monotonic() < deadline:
                time.sleep(0.001)
            late = not self._stop
        assert not late, f"the guest did not finish in {timeout} s: {self.cpus[0].registers()}"

    @contextlib.contextmanager
    def running(self, *, fails: bool = False) -> Iterator[None]:
        """vCPUs run in threads of their own inside the ``with``, and have returned after it; *fails*: with an error."""
        self._stop = False

        def body(cpu: Any) -> None:
            while not self._stop:
                cpu.run()

        threads = [threading.Thread(target=body, args=(cpu,), daemon=True) for cpu in self.cpus]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.halt()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive(), "a vCPU did not return when it was kicked"
            assert fails == bool(self.errors), self.errors

    def close(self) -> None:
        for cpu in self.cpus:
            cpu.close()
        self.accel.close()


@contextlib.contextmanager
def guest(code: bytes, **options: Any) -> Iterator[Guest]:
    """A guest for the time of a ``with``."""
    made = Guest(code, **options)
    try:
        yield made
    finally:
        made.close()


def until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Wait for *condition*; fails the test after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.0005)
