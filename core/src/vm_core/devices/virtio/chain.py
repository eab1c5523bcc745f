"""What a virtqueue carries: buffer chains, and the base class of the two ring layouts.

Theory of operation. A ring is the device's side of one virtqueue in guest RAM. :meth:`Ring.pop` takes everything that
the driver has made available, :meth:`Ring.push` gives back a batch and says whether the driver wants an interrupt,
:meth:`Ring.disable_kicks` and :meth:`Ring.enable_kicks` are the other direction of suppression. Nothing here knows of
threads, transports or devices; the caller holds whatever lock guards the ring.

The driver is not trusted, and it runs on while the device reads: every descriptor is loaded exactly once, into
integers, and everything is decided on those. What breaks a rule of the specification raises :class:`RingError`, upon
which the device stops using its queues and asks for a reset (virtio 1.2, 2.1.2).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...machine.memory import DmaError
from .ram import GuestRam

# Flags of a descriptor, equal in both layouts (2.7.5, 2.8.1).
NEXT = 1
WRITE = 2
INDIRECT = 4

#: Entries of an indirect table that are taken. A driver must not make a chain longer than the queue (2.7.5.3.1), yet
#: drivers are about that trust a device's seg_max more than its queue size; no queue is longer than this either.
MAX_CHAIN = 1024


class RingError(Exception):
    """The driver broke the rules of the ring; the device needs a reset."""


class RingLayout(NamedTuple):
    """Where a queue is, and what was negotiated about it. Addresses are guest-physical.

    *driver* and *device* are the available and the used ring of a split queue, and the driver's and the device's
    event suppression structure of a packed one.
    """

    size: int
    desc: int
    driver: int
    device: int
    event_idx: bool = False
    indirect: bool = False
    #: Legacy VIRTIO_F_NOTIFY_ON_EMPTY: interrupt when the last buffer is used, whatever was asked.
    notify_on_empty: bool = False


class Chain:
    """A buffer that the driver made available: device-readable views first, then device-writable ones.

    *writable_at* has the (guest-physical address, length) pairs of *writable*. *id* is what goes into the used
    entry (the head's index, or the buffer id), *slots* how many descriptors of the ring the chain took.
    """

    __slots__ = ("id", "readable", "ring", "slots", "writable", "writable_at")

    def __init__(
        self,
        ring: Ring,
        id: int,
        slots: int,
        readable: list[memoryview],
        writable: list[memoryview],
        writable_at: list[tuple[int, int]],
    ) -> None:
        self.ring = ring
        self.id = id
        self.slots = slots
        self.readable = readable
        self.writable = writable
        self.writable_at = writable_at

    @property
    def readable_length(self) -> int:
        """Bytes the device may read."""
        return sum(map(len, self.readable))

    @property
    def writable_length(self) -> int:
        """Bytes the device may write."""
        return sum(map(len, self.writable))


class Ring(ABC):
    """The device's side of a virtqueue."""

    def __init__(self, layout: RingLayout, ram: GuestRam) -> None:
        self.layout = layout
        self.size = layout.size
        self.ram = ram
        #: Chains taken and not given back.
        self.inflight = 0

    @abstractmethod
    def pop(self) -> list[Chain]:
        """Take every available chain.

        Raises RingError at the first bad one; good ones ahead of it are returned first, the error by the next call.
        """

    @abstractmethod
    def push(self, used: Sequence[tuple[Chain, int]]) -> bool:
        """Give chains back, each with the number of bytes written into it. True: the driver wants an interrupt."""

    @abstractmethod
    def disable_kicks(self) -> None:
        """Ask the driver not to notify: the device is about to look anyway."""

    @abstractmethod
    def enable_kicks(self) -> bool:
        """Ask the driver to notify about the next chain. True: one has come meanwhile, look again."""

    @abstractmethod
    def position(self) -> tuple[int, int]:
        """Where the device will take the next chain and give back the next, for people and migration."""

    def _map(self, id: int, slots: int, parts: Iterable[tuple[int, int, int]]) -> Chain:
        """Make a chain of (address, length, flags) triples: bounds, and readable ahead of writable (2.7.4.2)."""
        ram = self.ram
        window, start, size = ram.window, ram.start, ram.size
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        writable_at: list[tuple[int, int]] = []
        for address, length, flags in parts:
            if not length:
                continue
            low = address - start
            high = low + length
            if flags & WRITE:
                if low >= 0 and high <= size:
                    writable.append(window[low:high])
                else:
                    try:
                        writable += ram.views(address, length)
                    except DmaError as e:
                        raise RingError(str(e)) from None
                writable_at.append((address, length))
            else:
                if writable:
                    raise RingError("a device-readable descriptor follows a device-writable one")
                if low >= 0 and high <= size:
                    readable.append(window[low:high])
                else:
                    try:
                        readable += ram.views(address, length, write=False)
                    except DmaError as e:
                        raise RingError(str(e)) from None
        return Chain(self, id, slots, readable, writable, writable_at)

    def _indirect_table(self, address: int, length: int) -> list[int]:
        """A snapshot of an indirect table as 64-bit words, two a descriptor."""
        if not self.layout.indirect:
            raise RingError("an indirect descriptor without VIRTIO_F_INDIRECT_DESC")
        if not length or length % 16:
            raise RingError(f"an indirect table of {length} bytes")
        if length > 16 * MAX_CHAIN:
            raise RingError(f"an indirect table of {length // 16} descriptors; {MAX_CHAIN} are the most")
        try:
            return memoryview(self.ram.copy(address, length)).cast("Q").tolist()
        except DmaError as e:
            raise RingError(f"indirect table: {e}") from None


def ring_view(ram: GuestRam, what: str, address: int, length: int, alignment: int) -> memoryview:
    """The memory of a part of a ring. Raises RingError where it is not RAM or not aligned."""
    if address % alignment:
        raise RingError(f"the {what} at {address:#x} is not aligned to {alignment} bytes")
    try:
        return ram.view(address, length)
    except DmaError as e:
        raise RingError(f"{what}: {e}") from None
