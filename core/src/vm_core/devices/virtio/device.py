"""A virtio device as every transport sees it: status, feature negotiation, queues and configuration space.

Theory of operation. A :class:`VirtioDevice` belongs to a :class:`Transport` (a PCI function, a vhost-user connection),
which calls it for register accesses *with the device lock held* and is called back for interrupts. A kick only marks
its queue and posts :meth:`VirtioDevice.run` to the I/O thread. There everything available is popped under the lock, the
lock is let go, and the batch goes to :meth:`VirtioDevice.handle`. When requests are done the subclass calls
:meth:`VirtioDevice.complete`; all that are done by the next turn of the loop are pushed together, with one interrupt.

Reset. Requests in flight hold views of guest memory. A reset (of the device or of one queue) with requests in flight
therefore is not over at once: the status register keeps its old value until the last one has come back, as virtio 1.2
(2.1.2 and 4.1.4.3.1) allows and drivers wait for. A driver that does not wait, and the legacy interface, which has no
such rule, makes the device wait instead (:meth:`VirtioDevice.settle`).

States of a queue: *disabled* (no ring) → *enabled* (the ring is mapped at the first look) → *resetting* → disabled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .chain import Chain, Ring, RingError, RingLayout
from .features import (
    ANY_LAYOUT,
    EVENT_IDX,
    INDIRECT_DESC,
    LEGACY_MASK,
    LEGACY_ONLY,
    NOTIFY_ON_EMPTY,
    RING_PACKED,
    RING_RESET,
    VERSION_1,
    Feature,
    Status,
)
from .packed import PackedRing
from .ram import GuestRam
from .split import SplitRing

#: A queue or the configuration without an MSI-X vector (4.1.5.1.2).
NO_VECTOR = 0xFFFF
#: The longest queue that is offered.
MAX_QUEUE_SIZE = 1024
#: Looks at a queue before other work of the I/O thread gets a turn.
MAX_ROUNDS = 16


class Transport(Protocol):
    """What a device needs of the transport that carries it."""

    ram: GuestRam
    lock: AbstractContextManager[Any]

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run *function* soon, on the I/O thread and without the lock, or on the thread that kicks now. Any thread."""
        ...

    def can_dma(self) -> bool:
        """The device may reach guest memory now. Called with the lock held."""
        ...

    def notify_queue(self, queue: Virtqueue) -> None:
        """Send the used buffer notification of *queue*. Called with the lock held."""
        ...

    def notify_config(self) -> None:
        """Send the configuration change notification. Called with the lock held."""
        ...

    def device_was_reset(self) -> None:
        """A reset is over; the transport's own registers return to their defaults. Called with the lock held."""
        ...

    def device_failed(self, reason: str) -> None:
        """The driver broke a rule and the device stopped, for people to see. Called with the lock held."""
        ...


class Virtqueue:
    """The registers of one queue. Addresses are guest-physical; see :class:`RingLayout` for their names."""

    __slots__ = (
        "desc", "device", "driver", "enabled", "index", "max_size", "resetting", "ring", "scheduled", "size", "vector",
    )  # fmt: skip

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.scheduled = False
        self.clear()

    def clear(self) -> None:
        """To the state after a reset."""
        self.size = self.max_size
        self.desc = self.driver = self.device = 0
        self.enabled = False
        self.resetting = False
        self.vector = NO_VECTOR
        self.ring: Ring | None = None

    @property
    def inflight(self) -> int:
        """Chains that were taken and not given back."""
        return self.ring.inflight if self.ring is not None else 0


class VirtioDevice(ABC):
    """A device with *queues* virtqueues of *queue_size* descriptors that offers *features* (a bit mask)."""

    #: Device type (chapter 5): 2 for a block device.
    type_id = 0

    transport: Transport

    def __init__(self, queues: int, queue_size: int, features: int) -> None:
        self.queues = [Virtqueue(i, queue_size) for i in range(queues)]
        self.features = features
        self._done: deque[tuple[Chain, Any]] = deque()
        self._flush_due = False
        self.config_generation = 0
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self.driver_features = 0
        self.resetting = False
        #: The device or some queue is resetting.
        self._reset_due = False
        #: The driver has set up a queue through the legacy interface.
        self.legacy = False
        #: Why the device stopped, None while it runs.
        self.broken: str | None = None
        for queue in self.queues:
            queue.clear()

    # What a subclass implements.

    @abstractmethod
    def handle(self, queue: Virtqueue, chains: list[Chain]) -> None:
        """Serve a batch without waiting for the host. Each chain goes to :meth:`complete` sooner or later.

        On the I/O thread without the lock, or on the thread that kicks with it.
        """

    @abstractmethod
    def respond(self, chain: Chain, response: Any) -> int:
        """Write the outcome that was given to :meth:`complete` into *chain*; returns the bytes written in all.

        On the I/O thread with the lock held, and only while the driver still expects it.
        """

    @abstractmethod
    def drain(self) -> None:
        """Return when no request of :meth:`handle` touches guest memory any more. Called with the lock held."""

    @property
    def config_size(self) -> int:
        """Bytes of device-specific configuration."""
        return 0

    @abstractmethod
    def read_config(self, offset: int, size: int) -> int:
        """Read the device-specific configuration (1, 2, 4 or 8 bytes). Bytes that do not exist read as zero."""

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Write the device-specific configuration."""

    def accept_features(self, features: int) -> bool:
        """The last word on the driver's choice, at FEATURES_OK."""
        return True

    def driver_ready(self) -> None:
        """The driver has set DRIVER_OK: negotiation is over."""

    def on_reset(self) -> None:
        """The device was reset; registers of the subclass return to their defaults."""

    # Features.

    def has(self, feature: Feature) -> bool:
        """*feature* was negotiated."""
        return bool(self.driver_features >> feature.bit & 1)

    def offered(self, legacy: bool) -> int:
        """The features a driver is shown on the legacy or on the modern interface."""
        return self.features & LEGACY_MASK if legacy else self.features & ~(LEGACY_ONLY | ANY_LAYOUT.mask)

    def _acceptable(self) -> bool:
        """The driver took a subset of what is offered, VERSION_1 among it (6.1, 2.2.2)."""
        features = self.driver_features
        return bool(
            not features & ~self.offered(legacy=False)
            and features >> VERSION_1.bit & 1
            and self.accept_features(features)
        )

    @property
    def features_agreed(self) -> bool:
        """Negotiation is over; the driver's choice stays as it is (2.2.1)."""
        return bool(self.status & (Status.FEATURES_OK | Status.DRIVER_OK))

    @property
    def can_reset_queues(self) -> bool:
        """VIRTIO_F_RING_RESET was negotiated."""
        return self.has(RING_RESET)

    # Status.

    def write_status(self, value: int, *, legacy: bool) -> None:
        """The driver writes the device status field; 0 resets the device."""
        if value == 0:
            self.begin_reset()
            return
        self.settle()
        old = self.status
        # A driver cannot clear bits (2.1.1), nor set the one that is the device's.
        new = (old | value) & ~Status.DEVICE_NEEDS_RESET | (old & Status.DEVICE_NEEDS_RESET)
        if not legacy and new & ~old & Status.FEATURES_OK and not self._acceptable():
            new &= ~Status.FEATURES_OK
        if not legacy and not new & Status.FEATURES_OK:
            # Without agreed features there is nothing that the driver could have made ready (3.1.1).
            new &= ~Status.DRIVER_OK
        self.status = new
        if new & ~old & Status.DRIVER_OK:
            self.driver_ready()
            for queue in self.queues:
                self.kick(queue)

    @property
    def live(self) -> bool:
        """Queues may be used: DRIVER_OK, or a legacy driver, which may start earlier (3.1.2)."""
        return self.legacy or bool(self.status & Status.DRIVER_OK)

    def fail(self, reason: str) -> None:
        """Stop until the driver resets the device (2.1.2). Lock held."""
        if self.broken is not None:
            return
        self.broken = reason
        if self.has(VERSION_1):
            self.status |= Status.DEVICE_NEEDS_RESET
            if self.status & Status.DRIVER_OK:
                self.config_generation = (self.config_generation + 1) & 0xFF
                self.transport.notify_config()
        self.transport.device_failed(reason)

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has new contents. Lock held."""
        self.config_generation = (self.config_generation + 1) & 0xFF
        if self.status & Status.DRIVER_OK:
            self.transport.notify_config()

    # Reset.

    def begin_reset(self) -> None:
        """Reset as soon as nothing is in flight. Lock held."""
        self.resetting = self._reset_due = True
        self._finish_resets()

    def reset_queue(self, queue: Virtqueue) -> None:
        """Reset one queue as soon as nothing of it is in flight (2.6.1). Lock held."""
        queue.resetting = self._reset_due = True
        self._finish_resets()

    def settle(self) -> None:
        """Finish resets that are under way, waiting for requests in flight. Lock held."""
        if self._reset_due:
            self.drain()
            # What comes back now finds another ring in its queue, or none, and is forgotten.
            self._finish_resets(wait=False)

    def reset_now(self) -> None:
        """The machine resets; requests were drained. Lock held."""
        self.drain()
        self.resetting = self._reset_due = True
        self._finish_resets(wait=False)

    def _finish_resets(self, *, wait: bool = True) -> None:
        if not self._reset_due:
            return
        if self.resetting:
            if wait and any(q.inflight for q in self.queues):
                return
            self._clear()
            self.on_reset()
            self.transport.device_was_reset()
            return
        for queue in self.queues:
            if queue.resetting and not (wait and queue.inflight):
                queue.clear()
        self._reset_due = any(q.resetting for q in self.queues)

    # Queues.

    def kick(self, queue: Virtqueue) -> None:
        """Look at *queue* on the I/O thread. Lock held."""
        if queue.enabled and not queue.scheduled:
            queue.scheduled = True
            self.transport.call_soon(lambda: self.run(queue))

    def run(self, queue: Virtqueue) -> None:
        """Serve what is available. On the I/O thread, without the lock."""
        lock = self.transport.lock
        rounds = 0
        while True:
            with lock:
                queue.scheduled = False
                chains = self._take(queue)
                if chains and rounds == MAX_ROUNDS:
                    # The driver is as fast as we are: let others have a turn.
                    self.kick(queue)
            if not chains:
                return
            self.handle(queue, chains)
            if rounds == MAX_ROUNDS:
                return
            rounds += 1

    def _take(self, queue: Virtqueue) -> list[Chain]:
        """Pop what is there; nothing there means that kicks are wanted again."""
        if (
            not queue.enabled
            or queue.resetting
            or self.resetting
            or self.broken is not None
            or not self.live
            or not self.transport.can_dma()
        ):
            return []
        try:
            ring = queue.ring
            if ring is None:
                ring = queue.ring = self._map_ring(queue)
            chains = ring.pop()
            if chains:
                ring.disable_kicks()
            elif ring.enable_kicks():
                chains = ring.pop()
            return chains
        except RingError as e:
            self.fail(f"queue {queue.index}: {e}")
            return []

    def _map_ring(self, queue: Virtqueue) -> Ring:
        layout = RingLayout(
            queue.size,
            queue.desc,
            queue.driver,
            queue.device,
            event_idx=self.has(EVENT_IDX),
            indirect=self.has(INDIRECT_DESC),
            notify_on_empty=self.has(NOTIFY_ON_EMPTY) and not self.has(VERSION_1),
        )
        kind = PackedRing if self.has(RING_PACKED) else SplitRing
        return kind(layout, self.transport.ram)

    def complete(self, chain: Chain, response: Any) -> None:
        """*chain* is done; *response* goes to :meth:`respond`. Any thread; takes no lock."""
        self._done.append((chain, response))
        # The flag is cleared ahead of the emptying: whoever finds it set knows that its entry will still be seen.
        if not self._flush_due:
            self._flush_due = True
            self.transport.call_soon(self.flush)

    def flush(self) -> None:
        """Give back what is complete. On the I/O thread, without the lock."""
        self._flush_due = False
        done = self._done
        batches: dict[Ring, list[tuple[Chain, Any]]] = {}
        while done:
            item = done.popleft()
            batch = batches.get(item[0].ring)
            if batch is None:
                batches[item[0].ring] = [item]
            else:
                batch.append(item)
        with self.transport.lock:
            for ring, batch in batches.items():
                queue = next((q for q in self.queues if q.ring is ring), None)
                if queue is None:
                    continue  # its queue was reset while they were under way
                if self.broken is not None or self.resetting or queue.resetting:
                    ring.inflight -= len(batch)
                elif ring.push([(chain, self.respond(chain, response)) for chain, response in batch]):
                    self.transport.notify_queue(queue)
            self._finish_resets()
