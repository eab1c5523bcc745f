"""The contract of an accelerator: what executes guest instructions.

Theory of operation. The machine starts one thread for each vCPU; its body is :meth:`VCpu.run`, called again and again.
``run`` executes the guest, calls port and MMIO handlers (with ``machine.lock`` held around each), delivers interrupts
that the machine's interrupt controller presents, sleeps while the guest is halted, and returns when :meth:`VCpu.kick`
was called and ``machine.must_return()`` is true (pause, reset, power-off). ``kick`` may be called from any thread, at
any time, with or without the device lock, and never blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

import attrs

from .memory import GuestMemory
from .ports import PortSpace


@attrs.frozen
class Availability:
    """Whether an accelerator can run here. *reason* says why not, or what it is limited to."""

    ok: bool
    reason: str = ""
    #: It executes guest code at the processor's own speed.
    hardware_speed: bool = False


class InterruptController(Protocol):
    """The board's interrupt inputs, as devices use them. Call with the device lock held."""

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive ISA interrupt line *irq* (0–15), or an I/O APIC input above it, to *level*."""
        ...

    def send_msi(self, address: int, data: int) -> None:
        """A message-signalled interrupt: a 32-bit write of *data* to *address*."""
        ...


class CpuInterrupts(Protocol):
    """What a vCPU without an in-kernel interrupt chip asks. Call with the device lock held."""

    def pending(self) -> bool:
        """An interrupt is waiting for the vCPU."""
        ...

    def acknowledge(self) -> int:
        """The interrupt-acknowledge cycle: its vector (0–255)."""
        ...


class AccelMachine(Protocol):
    """What an accelerator sees of the machine."""

    memory: GuestMemory
    ports: PortSpace
    #: The device lock: an RLock-like context manager, held around handlers and never across host I/O.
    lock: LockLike

    def must_return(self) -> bool:
        """A vCPU's ``run`` must return now (pause, reset, shutdown)."""
        ...

    def cpu_interrupts(self, index: int) -> CpuInterrupts:
        """The interrupt input of vCPU *index*."""
        ...

    def request_reset(self, reason: str) -> None:
        """Ask for a system reset (a triple fault, say)."""
        ...

    def internal_error(self, message: str) -> None:
        """The accelerator cannot go on: the machine stops with status ``internal-error`` and shows *message*."""
        ...


class LockLike(Protocol):
    """A lock used as a context manager."""

    def __enter__(self) -> object: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> bool | None: ...


@attrs.define
class Segment:
    """A segment register with its hidden part. *flags* are the descriptor's attributes as KVM/VMX number them."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    type: int = 3
    s: int = 1
    dpl: int = 0
    present: int = 1
    db: int = 0
    g: int = 0
    l: int = 0  # noqa: E741 - the architecture's name


@attrs.define
class CpuState:
    """Registers to start from: by default the state after RESET (Intel SDM vol. 3, 10.1.1): CS:IP F000:FFF0."""

    eip: int = 0xFFF0
    eflags: int = 2
    regs: dict[str, int] = attrs.field(factory=dict)
    cr0: int = 0x60000010
    cs: Segment = attrs.field(factory=lambda: Segment(0xF000, 0xFFFF0000, 0xFFFF, type=0xB))
    ds: Segment = attrs.field(factory=Segment)
    es: Segment = attrs.field(factory=Segment)
    fs: Segment = attrs.field(factory=Segment)
    gs: Segment = attrs.field(factory=Segment)
    ss: Segment = attrs.field(factory=Segment)
    gdt: tuple[int, int] = (0, 0xFFFF)
    idt: tuple[int, int] = (0, 0xFFFF)


class VCpu(ABC):
    """One virtual CPU."""

    @abstractmethod
    def run(self) -> None:
        """Execute until ``machine.must_return()``. Runs in the vCPU's own thread."""

    @abstractmethod
    def kick(self) -> None:
        """Make ``run`` look at interrupts and ``must_return`` soon. Any thread, never blocks."""

    @abstractmethod
    def reset(self, state: CpuState) -> None:
        """Load *state*; the vCPU is not running."""

    @abstractmethod
    def registers(self) -> dict[str, int]:
        """General registers, EIP, EFLAGS and control registers, for people. The vCPU is not running."""

    def close(self) -> None:
        """Release what the vCPU holds; it is not running."""


class Accelerator(ABC):
    """One accelerator in use by one machine."""

    #: The accelerator has interrupt controllers (PIC, I/O APIC, local APIC) and the PIT of its own.
    irqchip: InterruptController | None = None

    #: A request is served soonest by the vCPU's own thread, within the register access that asks for it: passing it to
    #: another thread costs more than the work. Allows :meth:`dma_written` on that thread, inside a handler.
    serve_kicks: bool = False

    @classmethod
    @abstractmethod
    def availability(cls) -> Availability:
        """Whether it can run here; cheap, and never raises."""

    @abstractmethod
    def __init__(self, machine: AccelMachine, options: dict[str, str]) -> None:
        """Set up for *machine*, popping the *options* of ``-accel NAME,…`` that are understood."""

    @abstractmethod
    def create_vcpu(self, index: int) -> VCpu:
        """Make vCPU *index*. The memory map is complete or will be told by :meth:`memory_changed`."""

    @abstractmethod
    def memory_changed(self, memory: GuestMemory) -> None:
        """The flat map changed. May be called inside a handler (PAM, BAR moves), with the device lock held."""

    def dma_written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Devices wrote these (guest-physical address, length) ranges of RAM: drop what was translated from them.

        Called on any thread but a vCPU's, *without* the device lock, before the guest is told of the completion;
        returns when no stale translation can be executed any more.
        """

    def bind_kick(self, address: int, size: int, fd: int, *, port: bool, value: int | None = None) -> bool:
        """Turn guest writes to *address* into signals of eventfd *fd* (ioeventfd). False: not offered here."""
        return False

    def unbind_kick(self, address: int, size: int, fd: int, *, port: bool, value: int | None = None) -> None:
        """Undo :meth:`bind_kick`."""

    def bind_msi(self, fd: int, address: int, data: int) -> bool:
        """Turn signals of eventfd *fd* into the interrupt of *data* written to *address* (irqfd), or into another one
        if *fd* is bound already. False: not offered here.
        """
        return False

    def unbind_msi(self, fd: int) -> None:
        """Undo :meth:`bind_msi`."""

    def close(self) -> None:
        """Release everything; vCPUs are closed."""
