"""A machine as small as the accelerator's contract allows, and the ways in which tests start guest code on it."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from vm_core.machine.accel import CpuState, Segment
from vm_core.machine.memory import PAGE, GuestMemory, Region, RegionKind
from vm_core.machine.ports import PortSpace
from vm_unicorn.cpu import UnicornCpu

RAM = 4 << 20
ROM = 0xF0000

#: Flat 4 GiB segments of a 32-bit guest, as the descriptor table of :func:`flat_tables` has them.
KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA, TASK = 0x08, 0x10, 0x1B, 0x23, 0x28
GDT, IDT, TSS = 0x1000, 0x1800, 0x2800
CODE, STACK, USER_STACK = 0x8000, 0x7F00, 0x6F00
#: A port whose write ends the program.
EXIT_PORT = 0xF4


class FakeInterrupts:
    """A queue of vectors."""

    def __init__(self) -> None:
        self.queue: deque[int] = deque()

    def pending(self) -> bool:
        return bool(self.queue)

    def acknowledge(self) -> int:
        return self.queue.popleft()


class ExitPort:
    """Ends the program; remembers what was written."""

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self.values: list[int] = []

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self.values.append(value)
        self._machine.stop()


class FakeMachine:
    """4 MiB of RAM, a 64 KiB ROM below 1 MiB, one vCPU, and no devices but a port that ends the program."""

    def __init__(self, mode: str) -> None:
        self.memory = GuestMemory(RAM, rom_size=0x10000)
        self.rom_place = self.memory.rom_space(0x10000)
        self.ram = self.memory.add(Region("ram", 0, RAM, RegionKind.RAM))
        self.rom = self.memory.add(Region("rom", ROM, 0x10000, RegionKind.ROM, backing=self.rom_place, priority=1))
        self.ports = PortSpace()
        self.lock = threading.RLock()
        self.interrupts = FakeInterrupts()
        self.resets: list[str] = []
        self.errors: list[str] = []
        self._return = False
        self.exit = ExitPort(self)
        self.ports.add(EXIT_PORT, 1, self.exit)
        self.cpu = UnicornCpu(self, mode)
        self.memory.listeners.append(lambda memory: self.cpu.memory_changed())

    # The accelerator's view.

    def must_return(self) -> bool:
        return self._return

    def cpu_interrupts(self, index: int) -> FakeInterrupts:
        return self.interrupts

    def request_reset(self, reason: str) -> None:
        self.resets.append(reason)
        self.stop()

    def internal_error(self, message: str) -> None:
        self.errors.append(message)
        self.stop()

    # For tests.

    def stop(self) -> None:
        """Make ``run`` return."""
        self._return = True
        if hasattr(self, "cpu"):
            self.cpu.kick()

    def interrupt(self, vector: int) -> None:
        """Raise an interrupt, from any thread."""
        with self.lock:
            self.interrupts.queue.append(vector)
        self.cpu.kick()

    def put(self, address: int, data: bytes | str) -> None:
        """Store bytes (or hexadecimal text with spaces) in RAM."""
        data = bytes.fromhex(data) if isinstance(data, str) else data
        self.memory.buffer[address : address + len(data)] = data

    def word(self, address: int) -> int:
        """The 32-bit word of RAM at *address*."""
        return int(struct.unpack_from("<I", self.memory.buffer, address)[0])

    def run(
        self, state: CpuState | None = None, *, seconds: float = 10.0, during: Callable[[], Any] | None = None
    ) -> None:
        """Run until the program ends; *during* is called meanwhile, on this thread. Fails after *seconds*."""
        if state is not None:
            self.cpu.reset(state)
        self._return = False
        thread = threading.Thread(target=self.cpu.run, daemon=True)
        thread.start()
        try:
            if during is not None:
                during()
            thread.join(seconds)
            alive = thread.is_alive()
        finally:
            self.stop()
            thread.join(seconds)
        assert not alive, f"the guest does not end: {self.cpu.registers()}"

    def run16(self, code: str, **keywords: Any) -> dict[str, int]:
        """Run real-mode *code* at 0:8000 with the stack below it; it must end with a write to the exit port."""
        self.put(CODE, code)
        zero = Segment(0, 0, 0xFFFF)
        state = CpuState(
            eip=CODE, regs={"esp": STACK}, cr0=0x10, cs=Segment(0, 0, 0xFFFF, type=0xB),
            ds=zero, es=zero, fs=zero, gs=zero, ss=zero, idt=(0, 0x3FF),
        )  # fmt: skip
        self.run(state, **keywords)
        assert not self.errors
        return self.cpu.registers()

    def run32(
        self, code: str, *, cr0: int = 0x11, regs: dict[str, int] | None = None, **keywords: Any
    ) -> dict[str, int]:
        """Run flat 32-bit *code* at ring 0 at 8000h with the tables of :func:`flat_tables`."""
        self.put(CODE, code)
        self.run(flat_state(cr0=cr0, regs=regs), **keywords)
        assert not self.errors
        return self.cpu.registers()

    def flat_tables(self) -> None:
        """GDT (kernel and user segments, a task segment with stack STACK), an empty IDT and the TSS."""
        entries = [0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF]
        entries.append(0x0000890000000067 | (TSS & 0xFFFF) << 16 | (TSS >> 16 & 0xFF) << 32)
        self.put(GDT, struct.pack(f"<{len(entries)}Q", *entries))
        self.put(TSS, struct.pack("<III", 0, STACK, KERNEL_DATA))

    def gate(self, vector: int, address: int, *, kind: int = 0x8E) -> None:
        """Point *vector* to *address*; *kind* 8E: interrupt gate, 8F: trap gate, EE: interrupt gate for ring 3."""
        self.put(IDT + 8 * vector, struct.pack("<HHHH", address & 0xFFFF, KERNEL_CODE, kind << 8, address >> 16))


def flat_state(*, cr0: int = 0x11, regs: dict[str, int] | None = None) -> CpuState:
    """Ring 0, flat segments, GDT and IDT in place, interrupts off."""
    data = Segment(KERNEL_DATA, 0, 0xFFFFFFFF, type=3, db=1, g=1)
    return CpuState(
        eip=CODE, regs={"esp": STACK, **(regs or {})}, cr0=cr0,
        cs=Segment(KERNEL_CODE, 0, 0xFFFFFFFF, type=0xB, db=1, g=1), ds=data, es=data, fs=data, gs=data, ss=data,
        gdt=(GDT, 0x2F), idt=(IDT, 0x7FF),
    )  # fmt: skip


def identity_paging(machine: FakeMachine, *, directory: int = 0x100000, table: int = 0x101000) -> None:
    """Page tables that map the first 4 MiB onto themselves, for user and supervisor, writable."""
    machine.put(directory, struct.pack("<I", table | 7))
    machine.put(table, struct.pack("<1024I", *(i * PAGE | 7 for i in range(1024))))
