"""An IDE bus: one channel of a controller with its cable of two drives, and its way to the machine.

Requests complete on the I/O thread. Where the accelerator says that the vCPU's own thread serves a request soonest
(:attr:`~vm_core.machine.accel.Accelerator.serve_kicks`), whatever the backend answers without waiting is handled before
the register access that asked for it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from typing import TYPE_CHECKING

from vm_core.block.node import Buffer
from vm_core.block.request import Op, Request
from vm_core.devices.ata import BusMaster, Channel, Drive
from vm_core.devices.bus import Bus
from vm_core.errors import UsageError

if TYPE_CHECKING:
    from vm_core.block.backend import BlockBackend
    from vm_core.devices.device import Device
    from vm_core.machine.machine import Machine

UNITS = ("0", "1")


class IdeBus(Bus):
    """Bus *name* with interrupt line *irq*. It is the host of its :class:`~vm_core.devices.ata.Channel`."""

    def __init__(self, name: str, parent: Device, machine: Machine, irq: int, busmaster: BusMaster) -> None:
        super().__init__("ide", name, parent)
        self.machine = machine
        self.irq = irq
        self.busmaster = busmaster
        self.channel = Channel(self, busmaster)
        self._backends: dict[int, BlockBackend] = {}
        #: The thread that is in :meth:`submit` and handles answers itself, and what it was answered.
        self._serving: int | None = None
        self._answers: list[Request] = []

    def free_address(self, device: Device | None) -> str | None:
        """The first unit without a drive."""
        return next((unit for unit in UNITS if unit not in self.devices), None)

    def choose(self, device: Device, address: str | None) -> int:
        """The unit number that *address* names, or a free one. Raises UsageError."""
        if address is None:
            address = self.free_address(device)
            if address is None:
                raise UsageError(f"{device.driver}: {self.name} has two drives already")
        if address not in UNITS:
            raise UsageError(f"{device.driver}: unit={address}: an IDE bus has units 0 and 1")
        holder = self.devices.get(address)
        if holder is not None:
            raise UsageError(f"{device.driver}: {self.name} unit {address} is taken by {holder.id or holder.driver}")
        return int(address)

    def attach(self, device: Device, drive: Drive, backend: BlockBackend) -> None:
        """Plug in *drive*, which stores on *backend*."""
        self.devices[str(drive.unit)] = device
        self._backends[drive.unit] = backend
        self.channel.attach(drive.unit, drive)

    def detach(self, drive: Drive) -> None:
        """Unplug *drive*."""
        self.channel.detach(drive.unit)
        self.devices.pop(str(drive.unit), None)
        self._backends.pop(drive.unit, None)

    # The channel's host (vm_core.devices.ata.ChannelHost).

    def submit(self, drive: Drive, requests: list[Request]) -> None:
        def done(request: Request) -> None:
            with self.machine.lock:
                drive.complete(request)

        for request in requests:
            request.done = done
        backend = self._backends[drive.unit]
        if not self._serve_here():
            backend.submit(requests)
            return
        self._serving = get_ident()
        try:
            backend.submit(requests)
        finally:
            self._serving = None
            answers, self._answers = self._answers, []
        if answers:
            self.machine.deliver(answers)

    def _serve_here(self) -> bool:
        """This thread is a vCPU's and may handle completions; with the lock held."""
        accel = self.machine.accel
        return accel is not None and accel.serve_kicks and not self.machine.iothread.current

    def completed(self, requests: list[Request]) -> None:
        """The backends' completion sink. Any thread, with or without the lock."""
        if self._serving == get_ident():
            self._answers += requests
        else:
            self.machine.completed(requests)

    def set_write_cache(self, drive: Drive, enabled: bool) -> None:
        def done(request: Request) -> None:
            with self.machine.lock:
                drive.complete(request)

        self._backends[drive.unit].set_write_cache(enabled, done)

    def copy(self, drive: Drive, views: Sequence[Buffer], guest: Sequence[tuple[int, int]], data: Buffer) -> None:
        machine = self.machine

        def copy() -> None:
            at = 0
            for view in views:
                view[:] = data[at : at + len(view)]
                at += len(view)
            if machine.accel is not None:
                machine.accel.dma_written(guest)
            with machine.lock:
                drive.complete(Request(Op.READ))

        if self._serve_here():
            copy()
        else:
            # Elsewhere the accelerator must be told without the lock, and not by a vCPU.
            machine.iothread.call_soon(copy)

    def set_irq(self, level: bool) -> None:
        self.machine.irqs.set_irq(self.irq, level)

    def now(self) -> int:
        return self.machine.clock.now_ns()
