"""Split virtqueues (virtio 1.2, section 2.7): a descriptor table, an available ring and a used ring.

Layout, little-endian (2.7.5, 2.7.6, 2.7.8); indices run freely modulo 65536::

    descriptor  le64 address   le32 length   le16 flags   le16 next                               16 bytes
    available   le16 flags     le16 idx      le16 ring[size]              le16 used_event         6 + 2 * size
    used        le16 flags     le16 idx      { le32 id, le32 length }[size]  le16 avail_event     6 + 8 * size

A descriptor is read as two 64-bit words, the second of which holds length, flags and next: one load, so that they
belong together even if the driver scribbles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import barrier
from .chain import INDIRECT, NEXT, WRITE, Chain, Ring, RingError, RingLayout, ring_view
from .ram import GuestRam

#: In the available ring's flags: the driver wants no interrupts (2.7.7). Not used with event indices.
NO_INTERRUPT = 1
#: In the used ring's flags: the device wants no kicks (2.7.10). Not used with event indices.
NO_NOTIFY = 1

FLAGS = 0
IDX = 1
RING = 2


class SplitRing(Ring):
    """The device's side of a split virtqueue."""

    def __init__(self, layout: RingLayout, ram: GuestRam) -> None:
        super().__init__(layout, ram)
        size = layout.size
        if not 0 < size <= 32768 or size & (size - 1):
            raise RingError(f"a split queue of {size} descriptors is not a power of two up to 32768")
        self._desc = ring_view(ram, "descriptor table", layout.desc, 16 * size, 16).cast("Q")
        self._avail = ring_view(ram, "available ring", layout.driver, 6 + 2 * size, 2).cast("H")
        used = ring_view(ram, "used ring", layout.device, 6 + 8 * size, 4)
        self._used = used.cast("H")
        self._elements = used[4 : 4 + 8 * size].cast("Q")
        self._used_event = RING + size
        self._avail_event = RING + 4 * size
        #: Free-running indices: the next available entry to take, the next used entry to fill.
        self._last_avail = 0
        self._next_used = 0

    def position(self) -> tuple[int, int]:
        return self._last_avail, self._next_used

    # Available buffers.

    def pop(self) -> list[Chain]:
        avail = self._avail
        last = self._last_avail
        count = (avail[IDX] - last) & 0xFFFF
        if not count:
            return []
        size = self.size
        if count > size - self.inflight:
            raise RingError(f"{count} new buffers and {self.inflight} in use are more than the queue's {size}")
        barrier.ordered()
        first = RING + (last & size - 1)
        beyond = first + count - RING - size
        if beyond > 0:
            heads = avail[first : RING + size].tolist() + avail[RING : RING + beyond].tolist()
        else:
            heads = avail[first : first + count].tolist()
        chains: list[Chain] = []
        try:
            for head in heads:
                chains.append(self._chain(head))
        except RingError:
            if not chains:
                raise
        self._last_avail = (last + len(chains)) & 0xFFFF
        self.inflight += len(chains)
        return chains

    def _chain(self, head: int) -> Chain:
        parts: list[tuple[int, int, int]] = []
        desc = self._desc
        size = self.size
        i = head
        while True:
            if i >= size:
                raise RingError(f"descriptor {i} of a queue of {size}")
            if len(parts) >= size:
                raise RingError(f"the chain at descriptor {head} is a loop")
            word = desc[2 * i + 1]
            flags = word >> 32 & 0xFFFF
            if flags & INDIRECT:
                if flags & NEXT:
                    raise RingError("an indirect descriptor that names a next one")
                parts.extend(_table_parts(self._indirect_table(desc[2 * i], word & 0xFFFFFFFF)))
                break
            parts.append((desc[2 * i], word & 0xFFFFFFFF, flags & WRITE))
            if not flags & NEXT:
                break
            i = word >> 48
        return self._map(head, 1, parts)

    # Used buffers.

    def push(self, used: Sequence[tuple[Chain, int]]) -> bool:
        old = self._next_used
        elements = self._elements
        mask = self.size - 1
        new = old
        for chain, written in used:
            elements[new & mask] = chain.id | written << 32
            new += 1
        self.inflight -= len(used)
        barrier.ordered()
        self._used[IDX] = self._next_used = new & 0xFFFF
        barrier.full()
        avail = self._avail
        if self.layout.notify_on_empty and not self.inflight and avail[IDX] == self._last_avail:
            return True
        if self.layout.event_idx:
            # Interrupt if the driver's index lies in [old, new) (2.7.7.1, 2.7.7.2).
            return (new - avail[self._used_event] - 1) & 0xFFFF < new - old
        return not avail[FLAGS] & NO_INTERRUPT

    # Kicks.

    def disable_kicks(self) -> None:
        # With event indices the driver is silent by itself once its index has passed avail_event.
        if not self.layout.event_idx:
            self._used[FLAGS] = NO_NOTIFY

    def enable_kicks(self) -> bool:
        if self.layout.event_idx:
            self._used[self._avail_event] = self._last_avail
        else:
            self._used[FLAGS] = 0
        barrier.full()
        return bool(self._avail[IDX] != self._last_avail)


def _table_parts(table: list[int]) -> Iterator[tuple[int, int, int]]:
    """Follow the chain in an indirect table, which starts at its first entry (2.7.5.3)."""
    size = len(table) // 2
    i = 0
    for _ in range(size):
        if i >= size:
            raise RingError(f"descriptor {i} of an indirect table of {size}")
        word = table[2 * i + 1]
        flags = word >> 32 & 0xFFFF
        if flags & INDIRECT:
            raise RingError("an indirect descriptor in an indirect table")
        yield table[2 * i], word & 0xFFFFFFFF, flags & WRITE
        if not flags & NEXT:
            return
        i = word >> 48
    raise RingError("the chain in an indirect table is a loop")
