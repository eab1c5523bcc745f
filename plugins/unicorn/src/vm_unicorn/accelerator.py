"""The accelerator: one vCPU, on any host that the engine's wheel supports."""

from __future__ import annotations

from collections.abc import Sequence

from vm_core.errors import UsageError
from vm_core.machine.accel import Accelerator, AccelMachine, Availability, VCpu
from vm_core.machine.memory import GuestMemory

from .cpu import UnicornCpu

MODES = ("auto", "native", "block", "count")


class UnicornAccelerator(Accelerator):
    """Guest code is translated by the Unicorn engine."""

    @classmethod
    def availability(cls) -> Availability:
        """It runs wherever it is installed."""
        return Availability(True, "translates 32-bit guests' code; one vCPU")

    def __init__(self, machine: AccelMachine, options: dict[str, str]) -> None:
        self._machine = machine
        self._mode = options.pop("mode", "auto")
        if self._mode not in MODES:
            raise UsageError(f"-accel unicorn,mode={self._mode}: one of {', '.join(MODES)}")
        self._cpu: UnicornCpu | None = None

    def create_vcpu(self, index: int) -> VCpu:
        """The one vCPU. Raises UsageError for a second."""
        if index or self._cpu is not None:
            raise UsageError("-smp: unicorn runs one vCPU; -accel kvm runs more")
        self._cpu = UnicornCpu(self._machine, self._mode)
        # Stopped by instruction counts, the guest may be in the middle of a block that a device writes to.
        self.serve_kicks = self._cpu.looks_at_every_block
        return self._cpu

    def memory_changed(self, memory: GuestMemory) -> None:
        """Followed before the next block begins."""
        if self._cpu is not None:
            self._cpu.memory_changed()

    def dma_written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Translations of what devices wrote are dropped before the next block begins."""
        if self._cpu is not None:
            self._cpu.dma_written(ranges)
