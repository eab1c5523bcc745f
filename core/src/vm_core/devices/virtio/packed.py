"""Packed virtqueues (virtio 1.2, section 2.8): one ring of descriptors that both sides write, and two event structures.

Layout, little-endian (2.8.13, 2.8.14)::

    descriptor  le64 address   le32 length   le16 id   le16 flags        16 bytes
    event       le16 offset (bits 0-14) and wrap counter (bit 15)   le16 flags (bits 0-1)

A descriptor is available while its AVAIL flag equals the driver's wrap counter and its USED flag does not, and used
when both equal the device's (2.8.1). Positions here are free-running counts of descriptors: the slot is the
position modulo the queue's size, the wrap counter the parity of the lap, starting at 1.

The second 64-bit word of a descriptor holds length, id and flags. It is loaded and stored at once, so a descriptor's
flags never appear without the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import barrier
from .chain import INDIRECT, NEXT, WRITE, Chain, Ring, RingError, RingLayout, ring_view
from .ram import GuestRam

AVAIL = 1 << 7
USED = 1 << 15

# Flags of an event suppression structure (2.8.14).
ENABLE = 0
DISABLE = 1
DESC = 2

OFFSET = 0
FLAGS = 1


class PackedRing(Ring):
    """The device's side of a packed virtqueue."""

    def __init__(self, layout: RingLayout, ram: GuestRam) -> None:
        super().__init__(layout, ram)
        size = layout.size
        if not 0 < size <= 32768:
            raise RingError(f"a packed queue of {size} descriptors; 1 to 32768 are possible")
        self._desc = ring_view(ram, "descriptor ring", layout.desc, 16 * size, 16).cast("Q")
        self._driver_event = ring_view(ram, "driver's event structure", layout.driver, 4, 4).cast("H")
        self._device_event = ring_view(ram, "device's event structure", layout.device, 4, 4).cast("H")
        self._next_avail = 0
        self._next_used = 0
        #: Descriptors taken and not given back.
        self._slots = 0

    def position(self) -> tuple[int, int]:
        return self._next_avail, self._next_used

    def _available(self, position: int) -> int:
        """The second word of the descriptor at *position* if the driver made it available, else -1."""
        lap, slot = divmod(position, self.size)
        word = self._desc[2 * slot + 1]
        flags = word >> 48
        # In even laps the wrap counter is 1: AVAIL set, USED clear. In odd ones the other way round.
        return word if flags & (AVAIL | USED) == (USED if lap & 1 else AVAIL) else -1

    # Available buffers.

    def pop(self) -> list[Chain]:
        chains: list[Chain] = []
        try:
            while (word := self._available(self._next_avail)) >= 0:
                barrier.ordered()
                chain = self._chain(word)
                chains.append(chain)
                self._next_avail += chain.slots
                self._slots += chain.slots
        except RingError:
            if not chains:
                raise
        self.inflight += len(chains)
        return chains

    def _chain(self, word: int) -> Chain:
        desc = self._desc
        size = self.size
        room = size - self._slots
        slot = self._next_avail % size
        flags = word >> 48
        if room < 1:
            raise RingError(f"more buffers in use than the queue's {size} descriptors")
        if flags & INDIRECT:
            if flags & NEXT:
                raise RingError("an indirect descriptor that is part of a chain")
            table = self._indirect_table(desc[2 * slot], word & 0xFFFFFFFF)
            # Every entry belongs to the chain, in order; of the flags only WRITE means anything (2.8.7).
            parts = [(table[i], table[i + 1] & 0xFFFFFFFF, table[i + 1] >> 48 & WRITE) for i in range(0, len(table), 2)]
            return self._map(word >> 32 & 0xFFFF, 1, parts)
        parts = [(desc[2 * slot], word & 0xFFFFFFFF, flags & WRITE)]
        while flags & NEXT:
            # The driver made the first descriptor available last (2.8.6): the others are complete.
            if len(parts) >= room:
                raise RingError(f"a chain of more than {room} descriptors")
            slot += 1
            if slot == size:
                slot = 0
            word = desc[2 * slot + 1]
            flags = word >> 48
            if flags & INDIRECT:
                raise RingError("an indirect descriptor that is part of a chain")
            parts.append((desc[2 * slot], word & 0xFFFFFFFF, flags & WRITE))
        # The id of the last descriptor is the chain's (2.8.6).
        return self._map(word >> 32 & 0xFFFF, len(parts), parts)

    # Used buffers.

    def push(self, used: Sequence[tuple[Chain, int]]) -> bool:
        desc = self._desc
        size = self.size
        old = position = self._next_used
        barrier.ordered()
        for chain, written in used:
            lap, slot = divmod(position, size)
            flags = 0 if lap & 1 else AVAIL | USED
            if written:
                flags |= WRITE
            desc[2 * slot + 1] = written | chain.id << 32 | flags << 48
            # Used entries are one descriptor each; the rest of the chain is skipped (2.8.6).
            position += chain.slots
        self._next_used = position
        self._slots -= position - old
        self.inflight -= len(used)
        barrier.full()
        wanted = self._driver_event[FLAGS] & 3
        if wanted == DESC and self.layout.event_idx:
            barrier.ordered()
            event = self._driver_event[OFFSET]
            # The positions that offset and wrap counter name recur every two laps: is one of them in [old, new)?
            named = (event & 0x7FFF) + (0 if event & 0x8000 else size)
            return (named - old) % (2 * size) < position - old
        return wanted != DISABLE

    # Kicks.

    def disable_kicks(self) -> None:
        # With event indices the driver is silent by itself once it has passed the offset it was told.
        if not self.layout.event_idx:
            self._device_event[FLAGS] = DISABLE

    def enable_kicks(self) -> bool:
        if self.layout.event_idx:
            lap, slot = divmod(self._next_avail, self.size)
            self._device_event[OFFSET] = slot | (0 if lap & 1 else 0x8000)
            barrier.ordered()
            self._device_event[FLAGS] = DESC
        else:
            self._device_event[FLAGS] = ENABLE
        barrier.full()
        return self._available(self._next_avail) >= 0
