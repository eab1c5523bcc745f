"""The accelerator ``none``: vCPUs that execute nothing. For looking at a machine, and for driving it from outside."""

from __future__ import annotations

import threading

from .accel import Accelerator, AccelMachine, Availability, CpuState, VCpu
from .memory import GuestMemory


class IdleCpu(VCpu):
    """Waits."""

    def __init__(self, machine: AccelMachine) -> None:
        self._machine = machine
        self._wake = threading.Event()

    def run(self) -> None:
        while not self._machine.must_return():
            self._wake.wait()
            self._wake.clear()

    def kick(self) -> None:
        self._wake.set()

    def reset(self, state: CpuState) -> None:
        pass

    def registers(self) -> dict[str, int]:
        return {}


class NoAccelerator(Accelerator):
    """See the module's text."""

    @classmethod
    def availability(cls) -> Availability:
        return Availability(True, "executes nothing")

    def __init__(self, machine: AccelMachine, options: dict[str, str]) -> None:
        self._machine = machine

    def create_vcpu(self, index: int) -> VCpu:
        return IdleCpu(self._machine)

    def memory_changed(self, memory: GuestMemory) -> None:
        pass
