"""The accelerator: one vCPU that runs on any host."""

from __future__ import annotations

from collections.abc import Sequence

from vm_core.errors import UsageError
from vm_core.machine.accel import Accelerator, AccelMachine, Availability, VCpu
from vm_core.machine.memory import GuestMemory

from .cpu import UnicornCpu
from .state import LayoutError, find_layout


class UnicornAccelerator(Accelerator):
    """Guest code is translated by the Unicorn library."""

    @classmethod
    def availability(cls) -> Availability:
        """It runs wherever the library's wheel does, in the version whose state this plugin knows."""
        try:
            find_layout()
        except LayoutError:
            return Availability(
                False, f"unicorn {_version()} keeps CPU state in an unknown way: pip install 'unicorn==2.1.4'"
            )
        return Availability(True, "translates guest code; one vCPU")

    def __init__(self, machine: AccelMachine, options: dict[str, str]) -> None:
        self._machine = machine
        self._choice = options.pop("stop", "auto")
        if self._choice not in ("auto", "native", "count"):
            raise UsageError(f"-accel unicorn,stop={self._choice}: it is one of auto, native, count")
        self._cpu: UnicornCpu | None = None

    def create_vcpu(self, index: int) -> VCpu:
        """The one vCPU. Raises UsageError for a second."""
        if index or self._cpu is not None:
            raise UsageError("-smp: unicorn runs one vCPU (kvm runs several)")
        try:
            self._cpu = UnicornCpu(self._machine, self._choice)
        except ValueError as error:
            raise UsageError(f"-accel unicorn: {error}") from error
        return self._cpu

    def memory_changed(self, memory: GuestMemory) -> None:
        """Followed before the next block."""
        if self._cpu is not None:
            self._cpu.memory_changed()

    def dma_written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Translations of what devices wrote are dropped."""
        if self._cpu is not None:
            self._cpu.dma_written(ranges)


def _version() -> str:
    from importlib.metadata import version

    return version("unicorn")
