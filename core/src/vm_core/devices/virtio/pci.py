"""virtio over PCI (virtio 1.2, section 4.1): the function that carries a :class:`VirtioDevice`.

Theory of operation. The function offers the modern interface, the legacy one, or both (a *transitional* device), as
register handlers of its bars; see :mod:`.pci_modern` and :mod:`.pci_legacy`. What they share is here: identity, the ISR
register, interrupts over INTx or MSI-X, and kicks.

A kick is a register write whose handler posts work to the I/O thread; where the accelerator can turn the write itself
into an eventfd signal, the I/O thread waits for that and the vCPU does not even leave the guest. With an accelerator
that says so (:attr:`~vm_core.machine.accel.Accelerator.serve_kicks`), or ``ioeventfd=off``, the thread that kicks does
what the I/O thread would do, in the same order, before its register write returns: whatever the backend answers without
waiting is answered then. Nothing waits for the host there either way.
"""

from __future__ import annotations

import os
import sys
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import UsageError
from ...options import parse_bool, parse_int
from ..pci import COMMAND, COMMAND_MASTER, Bar, PciDevice
from .device import MAX_QUEUE_SIZE, NO_VECTOR, VirtioDevice, Virtqueue
from .features import (
    ANY_LAYOUT,
    EVENT_IDX,
    INDIRECT_DESC,
    NOTIFY_ON_EMPTY,
    RING_PACKED,
    RING_RESET,
    VERSION_1,
    Feature,
)
from .pci_legacy import NOTIFY_OFFSET as LEGACY_NOTIFY
from .pci_legacy import LegacyInterface
from .pci_modern import NOTIFY_MULTIPLIER, NOTIFY_OFFSET, ModernInterface
from .ram import GuestRam

if TYPE_CHECKING:
    from ...block.backend import BlockBackend
    from ...block.request import Request
    from ...machine.machine import Machine
    from ..bus import Bus

VENDOR = 0x1AF4
#: A modern device id is this plus the device type (4.1.2.1).
MODERN_IDS = 0x1040
#: The subsystem id of a non-transitional function: anything from 0x40 on (4.1.2.1).
MODERN_SUBSYSTEM = 0x1100

#: vectors= that means one a queue and one for configuration changes.
AUTO_VECTORS = 0xFFFFFFFF

#: Pieces of work that a kicking thread does itself before it leaves the rest to the I/O thread. Usual are two:
#: completions are delivered, and given back to the driver.
MAX_STEPS = 6

LEGACY_BAR = 0
MSIX_BAR = 1
MODERN_BAR = 4

# Bits of the ISR status (4.1.4.5).
ISR_QUEUE = 1
ISR_CONFIG = 2


class Kick(NamedTuple):
    """A queue's notification address that is bound to an eventfd."""

    address: int
    port: bool
    value: int | None
    fd: int


class VirtioPci(PciDevice):
    """A PCI function with a virtio device behind it. A subclass gives the ids and makes the device.

    Options: ``disable-legacy``, ``disable-modern``, ``vectors``, ``queue-size``, ``packed``, ``event_idx``,
    ``indirect_desc``, ``any_layout``, ``notify_on_empty``, ``queue_reset``, ``ioeventfd``.
    """

    #: Device id of a transitional function (4.1.2.1), None for types that never had a legacy interface.
    transitional_id: int | None = None
    #: Interfaces that are fixed by the driver's name, rather than chosen by options.
    fixed_interfaces: str | None = None
    default_queue_size = 256

    vendor_id = VENDOR
    subsystem_vendor_id = VENDOR
    interrupt_pin = 1

    virtio: VirtioDevice
    ram: GuestRam
    lock: AbstractContextManager[Any]

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        super().__init__(id, options, backend)
        name = self.driver
        if sys.byteorder != "little":
            raise UsageError(f"{name}: rings are shared with the guest without conversion; big-endian hosts cannot")

        def switch(option: str, default: bool) -> bool:
            return parse_bool(options.pop(option, default), f"{name}: {option}")

        disable_legacy = options.pop("disable-legacy", "auto")
        self.modern_interface = not switch("disable-modern", False)
        # auto: a conventional PCI slot, the only kind there is, has the legacy interface too.
        self.legacy_interface = self.transitional_id is not None and (
            disable_legacy == "auto" or not parse_bool(disable_legacy, f"{name}: disable-legacy")
        )
        if self.fixed_interfaces is not None:
            self.modern_interface = True
            self.legacy_interface = self.fixed_interfaces == "transitional"
        if not self.modern_interface and not self.legacy_interface:
            raise UsageError(f"{name}: with disable-legacy=on and disable-modern=on no interface is left")
        self.queue_size = parse_int(options.pop("queue-size", self.default_queue_size), f"{name}: queue-size")
        if not 2 <= self.queue_size <= MAX_QUEUE_SIZE or self.queue_size & (self.queue_size - 1):
            raise UsageError(f"{name}: queue-size={self.queue_size} is not a power of two from 2 to {MAX_QUEUE_SIZE}")
        switches: list[tuple[Feature, bool]] = [
            (EVENT_IDX, switch("event_idx", True)),
            (INDIRECT_DESC, switch("indirect_desc", True)),
            (ANY_LAYOUT, switch("any_layout", True)),
            (NOTIFY_ON_EMPTY, switch("notify_on_empty", True)),
            (RING_RESET, switch("queue_reset", True) and self.modern_interface),
            (RING_PACKED, switch("packed", False) and self.modern_interface),
            (VERSION_1, self.modern_interface),
        ]
        #: Transport and ring features that the options leave on; the device adds its own.
        self.ring_features = sum(feature.mask for feature, on in switches if on)
        ioeventfd = str(options.pop("ioeventfd", "auto"))
        self._ioeventfd = None if ioeventfd == "auto" else parse_bool(ioeventfd, f"{name}: ioeventfd")
        #: The thread that serves a kick of its own now, and what is to be done on it before it goes on.
        self._serving: int | None = None
        self._to_do: deque[Callable[[], object]] = deque()
        vectors = parse_int(options.pop("vectors", AUTO_VECTORS), f"{name}: vectors")
        if not (0 <= vectors <= 2048 or vectors == AUTO_VECTORS):
            raise UsageError(f"{name}: vectors={vectors}: 0 (no MSI-X) to 2048 are possible")
        self._vectors = vectors
        self.config_vector = NO_VECTOR
        self._isr = 0
        self._config_window: int | None = None
        self._kicks: list[Kick] = []
        self.modern: ModernInterface | None = None
        self.legacy: LegacyInterface | None = None

    @abstractmethod
    def make_virtio(self, machine: Machine) -> VirtioDevice:
        """The device behind the function; its features include :attr:`ring_features`."""

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        self.virtio = virtio = self.make_virtio(machine)
        virtio.transport = self
        self.lock = machine.lock
        if self.legacy_interface:
            assert self.transitional_id is not None
            self.device_id, self.subsystem_id, self.revision = self.transitional_id, virtio.type_id, 0
        else:
            self.device_id, self.subsystem_id, self.revision = MODERN_IDS + virtio.type_id, MODERN_SUBSYSTEM, 1
        super().realize(machine, bus, address)
        self.ram = GuestRam.of(machine.memory)
        self._unsubscribe = machine.events.subscribe(self._machine_event)
        vectors = len(virtio.queues) + 1 if self._vectors == AUTO_VECTORS else self._vectors
        if vectors:
            self.add_msix(vectors, MSIX_BAR, 0, max(0x800, (16 * vectors + 7) & ~7))
        if self.legacy_interface:
            self.legacy = LegacyInterface(self)
            self.legacy.add_to(LEGACY_BAR, virtio.config_size)
        if self.modern_interface:
            self.modern = ModernInterface(self)
            self._config_window = self.modern.add_to(MODERN_BAR)

    def unrealize(self) -> None:
        self.virtio.begin_reset()
        self.virtio.settle()
        self._unbind_kicks(None)
        super().unrealize()
        self.ram.close()
        self._unsubscribe()

    def reset(self) -> None:
        self.virtio.reset_now()
        super().reset()

    def device_was_reset(self) -> None:
        """The registers of the function that a device reset clears (4.1.4.3.1, 4.1.5.1.2.1)."""
        self.config_vector = NO_VECTOR
        self._isr = 0
        self.set_irq(False)
        if self.modern is not None:
            self.modern.clear()
        if self.legacy is not None:
            self.legacy.clear()

    # Kicks and completions, on the I/O thread or on the one that kicks.

    def kicked(self, index: int) -> None:
        """The driver wrote queue *index* to a notification register. Lock held."""
        queues = self.virtio.queues
        if index >= len(queues):
            return
        accel = self.machine.accel
        here = not self._ioeventfd if self._ioeventfd is not None else accel is not None and accel.serve_kicks
        if not here or self._serving is not None:
            self.virtio.kick(queues[index])
            return
        self._serving = get_ident()
        try:
            self.virtio.run(queues[index])
            to_do = self._to_do
            for _ in range(MAX_STEPS):
                if not to_do:
                    break
                to_do.popleft()()
        finally:
            self._serving = None
            while self._to_do:
                self.machine.iothread.call_soon(self._to_do.popleft())

    def completed(self, requests: list[Request]) -> None:
        """The backend's completion sink. Any thread, with or without the lock."""
        if self._serving == get_ident():
            self._to_do.append(partial(self.machine.deliver, requests))
        else:
            self.machine.completed(requests)

    # What the device asks of its transport.

    def call_soon(self, function: Callable[[], object]) -> None:
        if self._serving == get_ident():
            self._to_do.append(function)
        else:
            self.machine.iothread.call_soon(function)

    def can_dma(self) -> bool:
        # A machine that stops waits until nothing is in flight: a ring that is fed by what it reads would keep it
        # waiting for ever.
        return bool(self.config[COMMAND] & COMMAND_MASTER) and not self.machine.must_return()

    def _machine_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "RESUME":
            self.call_soon(self._kick_all)

    def _kick_all(self) -> None:
        """Look for kicks that came at a time when nothing could be done about them."""
        with self.lock:
            for queue in self.virtio.queues:
                self.virtio.kick(queue)

    def notify_queue(self, queue: Virtqueue) -> None:
        if self.msix_enabled:
            if queue.vector != NO_VECTOR:
                self.msix_notify(queue.vector)
        else:
            self._isr |= ISR_QUEUE
            self.set_irq(True)

    def notify_config(self) -> None:
        # This bit is set with MSI-X as well (4.1.4.5.1).
        self._isr |= ISR_CONFIG
        if self.msix_enabled:
            if self.config_vector != NO_VECTOR:
                self.msix_notify(self.config_vector)
        else:
            self.set_irq(True)

    def device_failed(self, reason: str) -> None:
        self.machine.events.emit("DEVICE_FAILED", device=self.id, driver=self.driver, reason=reason)

    # Interrupt registers.

    def read_isr(self) -> int:
        """Read the ISR status: clears it and lowers the line."""
        isr, self._isr = self._isr, 0
        self.set_irq(False)
        return isr

    def checked_vector(self, vector: int) -> int:
        """What a vector register holds after *vector* was written: NO_VECTOR for one that does not exist."""
        return vector if self.msix is not None and vector < self.msix.vectors else NO_VECTOR

    # Configuration space.

    def read_config(self, offset: int, size: int) -> int:
        window = self._config_window
        if window is not None and window + 16 < offset + size and offset < window + 20:
            self._through_window(write=False)
        return super().read_config(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        was_master = self.can_dma()
        super().write_config(offset, size, value)
        if not was_master and self.can_dma():
            self._kick_all()
        window = self._config_window
        if window is not None and window + 16 < offset + size and offset < window + 20:
            self._through_window(write=True)

    def _through_window(self, *, write: bool) -> None:
        """Move pci_cfg_data to or from the bar that the capability names (4.1.4.9)."""
        at = self._config_window
        assert at is not None
        config = self.config
        bar = self.bars.get(config[at + 4])
        offset = int.from_bytes(config[at + 8 : at + 12], "little")
        size = int.from_bytes(config[at + 12 : at + 16], "little")
        if bar is None or size not in (1, 2, 4) or offset % size or offset + size > bar.size:
            return
        if write:
            bar.handler.write(offset, size, int.from_bytes(config[at + 16 : at + 16 + size], "little"))
        else:
            config[at + 16 : at + 20] = bar.handler.read(offset, size).to_bytes(4, "little")

    # Kicks without leaving the guest.

    def bar_moved(self, bar: Bar) -> None:
        # Hosts without eventfds have no accelerator that could signal one.
        if bar.index in (LEGACY_BAR, MODERN_BAR) and self._ioeventfd is not False and hasattr(os, "eventfd"):
            self._unbind_kicks(bar.io)
            if bar.address is not None:
                self._bind_kicks(bar)

    def _bind_kicks(self, bar: Bar) -> None:
        accel = self.machine.accel
        if accel is None:
            return
        for queue in self.virtio.queues:
            if bar.io:
                address, value = (bar.address or 0) + LEGACY_NOTIFY, queue.index
            else:
                address, value = (bar.address or 0) + NOTIFY_OFFSET + NOTIFY_MULTIPLIER * queue.index, None
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            if not accel.bind_kick(address, 2, fd, port=bar.io, value=value):
                os.close(fd)
                return
            self._kicks.append(Kick(address, bar.io, value, fd))
            # Posted, not called: the loop may be waiting for the lock that is held here.
            self.call_soon(partial(self.machine.iothread.add_reader, fd, partial(self._signalled, fd, queue)))

    def _unbind_kicks(self, port: bool | None) -> None:
        for kick in [k for k in self._kicks if port is None or k.port == port]:
            self._kicks.remove(kick)
            if self.machine.accel is not None:
                self.machine.accel.unbind_kick(kick.address, 2, kick.fd, port=kick.port, value=kick.value)
            self.call_soon(partial(self._forget, kick.fd))

    def _forget(self, fd: int) -> None:
        """Stop waiting for an eventfd. On the I/O thread."""
        self.machine.iothread.remove_reader(fd)
        os.close(fd)

    def _signalled(self, fd: int, queue: Virtqueue) -> None:
        """An eventfd became readable. On the I/O thread, without the lock."""
        try:
            os.eventfd_read(fd)
        except BlockingIOError:
            return
        self.virtio.run(queue)
