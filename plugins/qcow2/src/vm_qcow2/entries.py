"""L2 entries (*Cluster mapping*), and the runs in which they are handled: many clusters at a time.

A run is found by comparing whole slices of a table with what a run would hold, in growing steps, so that long runs cost
next to nothing a cluster.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from .geometry import COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS, ZERO, Geometry

#: Allocation bitmaps (*Extended L2 Entries*): every subcluster in use, every one reading as zeroes.
ALL_ALLOCATED = 0x0000_0000_FFFF_FFFF
ALL_ZERO = 0xFFFF_FFFF_0000_0000
_UNIFORM = (0, ALL_ALLOCATED, ALL_ZERO)


class State(IntEnum):
    """What an L2 entry says of its cluster."""

    UNALLOCATED = 0
    #: Reads as zeroes, no host cluster.
    ZERO = 1
    #: Reads as zeroes, a host cluster is set aside.
    ZERO_ALLOCATED = 2
    DATA = 3
    COMPRESSED = 4
    #: The backing image's bytes; a host cluster is set aside (only subclusters).
    UNALLOCATED_ALLOCATED = 5
    #: It means nothing; always one entry.
    BAD = 6


class Run(NamedTuple):
    """*clusters* entries from number *at* on in one state. *host* is the first one, the others follow it; 0: none.

    For COMPRESSED, always one entry, *entry* says where. *copied*: refcount one, may be written in place. In runs of
    subclusters (:func:`subruns`) *at* and *clusters* count those. With an external data file *host* can be 0 and mean
    it: :attr:`placed` tells.
    """

    state: State
    at: int
    clusters: int
    host: int
    copied: bool
    entry: int

    @property
    def placed(self) -> bool:
        """Whether host clusters belong to it, each its own."""
        return self.state in _PLACED


INVALID = "Invalid cluster entry found"
_PLACED = (State.DATA, State.ZERO_ALLOCATED, State.UNALLOCATED_ALLOCATED)


class BadEntryError(Exception):
    """An entry that means nothing: *entry* at *index*. The text is QEMU's, to which it adds where the entry is."""

    def __init__(self, index: int, entry: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.entry = entry


#: Entries that are compared at once, one size after the other.
_CHUNKS = (16, 64, 256, 1024, 4096)


@cache
def _ramp(count: int, step: int) -> tuple[int, int]:
    """One, and the multiples of *step* from zero on, in each of *count* 64-bit lanes of a number."""
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
    return ones, sum(lane * step << 64 * lane for lane in range(count)) if step else 0


def run_length(entries: array[int], index: int, stop: int, step: int) -> int:
    """How many entries from *index* on each are *step* more than the one before.

    Whole slices are compared as one number with the number that a run would be.
    """
    first = entries[index]
    # Most runs of fragmented images end at once.
    if index + 1 >= stop or entries[index + 1] != first + step:
        return 1
    count = 1
    chunk = 0
    while index + count < stop:
        size = _CHUNKS[chunk]
        if chunk < len(_CHUNKS) - 1:
            chunk += 1
        value = first + count * step
        if value + size * step >= 1 << 64:
            return count
        ones, ramp = _ramp(size, step)
        piece = entries[index + count : min(index + count + size, stop)]
        if sys.byteorder == "big":
            piece.byteswap()
        have = int.from_bytes(piece.tobytes(), "little")
        want = value * ones + ramp
        if len(piece) < size:
            want &= (1 << 64 * len(piece)) - 1
        differ = have ^ want
        if differ:
            return count + ((differ & -differ).bit_length() - 1 >> 6)
        count += len(piece)
    return count


def runs(entries: array[int], start: int, stop: int, geometry: Geometry) -> Iterator[Run]:
    """The runs of the entries from *start* to *stop*. Raises BadEntryError at the first entry that means nothing.

    Of extended entries this is the half that tells about whole clusters: DATA, UNALLOCATED or COMPRESSED.
    """
    cluster_size = geometry.cluster_size
    unaligned = cluster_size - 1 & OFFSET_MASK
    zero = 0 if geometry.extended else ZERO
    nowhere = COPIED if geometry.external else 0
    index = start
    while index < stop:
        entry = entries[index]
        if entry == 0:
            count = run_length(entries, index, stop, 0)
            yield Run(State.UNALLOCATED, index, count, 0, False, 0)
        elif entry & COMPRESSED:
            count = 1
            yield Run(State.COMPRESSED, index, 1, 0, False, entry)
        else:
            host = entry & OFFSET_MASK
            if entry & ZERO and geometry.version < 3:
                raise BadEntryError(index, entry, "Zero cluster entry found in pre-v3 image")
            if host & unaligned:
                raise BadEntryError(index, entry, f"Cluster allocation offset {host:#x} unaligned")
            if host or entry & nowhere:
                count = run_length(entries, index, stop, cluster_size)
                state = State.ZERO_ALLOCATED if entry & zero else State.DATA
                yield Run(state, index, count, host, bool(entry & COPIED), entry)
            else:
                count = run_length(entries, index, stop, 0)
                yield Run(State.ZERO if entry & zero else State.UNALLOCATED, index, count, 0, False, entry)
        index += count


def subruns(entries: array[int], bitmaps: array[int], start: int, stop: int, geometry: Geometry) -> Iterator[Run]:
    """The runs of the subclusters from *start* to *stop* under extended entries; a compressed cluster is one run."""
    size = geometry.cluster_size >> 5
    for run in runs(entries, start >> 5, (stop - 1 >> 5) + 1, geometry):
        index, after = run.at, run.at + run.clusters
        while index < after:
            bitmap = bitmaps[index]
            low, high = max(start, index << 5), min(stop, index + 1 << 5)
            host = run.host + (index - run.at) * geometry.cluster_size
            if run.state is State.COMPRESSED:
                # Its bitmap means nothing.
                yield Run(State.COMPRESSED, low, high - low, 0, False, run.entry)
                index += 1
            elif bitmap in _UNIFORM:
                count = min(run_length(bitmaps, index, after, 0), after - index)
                if bitmap == ALL_ALLOCATED and not run.placed:
                    raise BadEntryError(index, entries[index], INVALID)
                high = min(stop, index + count << 5)
                state = _substate(bitmap & 1, bitmap >> 32 & 1, run.placed)
                first = host + (low - (index << 5)) * size if run.placed else 0
                yield Run(state, low, high - low, first, run.copied, entries[index])
                index += count
            else:
                if bitmap & bitmap >> 32 or (bitmap & ALL_ALLOCATED and not run.placed):
                    raise BadEntryError(index, entries[index], INVALID)
                base = index << 5
                while low < high:
                    sub = low - base
                    allocated, zero = bitmap >> sub & 1, bitmap >> sub + 32 & 1
                    # Bits that differ from the first one's pair, from there on.
                    differ = (bitmap >> sub ^ (ALL_ALLOCATED if allocated else 0)) & ALL_ALLOCATED >> sub
                    differ |= (bitmap >> sub + 32 ^ (ALL_ALLOCATED if zero else 0)) & ALL_ALLOCATED >> sub
                    count = (differ & -differ).bit_length() - 1 if differ else SUBCLUSTERS - sub
                    count = min(count, high - low)
                    first = host + sub * size if run.placed else 0
                    yield Run(_substate(allocated, zero, run.placed), low, count, first, run.copied, entries[index])
                    low += count
                index += 1


def all_runs(entries: array[int], bitmaps: array[int] | None, start: int, stop: int, geometry: Geometry) -> list[Run]:
    """The runs of the units from *start* to *stop* – of clusters without *bitmaps* –, damage among them as BAD."""
    per_entry = 1 if bitmaps is None else SUBCLUSTERS
    found: list[Run] = []
    while start < stop:
        try:
            if bitmaps is None:
                found.extend(runs(entries, start, stop, geometry))
            else:
                found.extend(subruns(entries, bitmaps, start, stop, geometry))
            return found
        except BadEntryError as error:
            bad = error
        # What stands before it is read once more, up to there.
        first = max(start, bad.index * per_entry)
        after = min(stop, (bad.index + 1) * per_entry)
        while found and found[-1].at >= start:
            found.pop()
        if start < first:
            found.extend(all_runs(entries, bitmaps, start, first, geometry))
        found.append(Run(State.BAD, first, after - first, 0, False, bad.entry))
        start = after
    return found


def damage(entry: int, bitmap: int, geometry: Geometry) -> str:
    """What is wrong with one BAD entry, in QEMU's words."""
    try:
        one = array("Q", (entry,))
        if geometry.extended:
            list(subruns(one, array("Q", (bitmap,)), 0, SUBCLUSTERS, geometry))
        else:
            list(runs(one, 0, 1, geometry))
    except BadEntryError as error:
        return str(error)
    return INVALID


def _substate(allocated: int, zero: int, placed: bool) -> State:
    if allocated:
        return State.DATA
    if zero:
        return State.ZERO_ALLOCATED if placed else State.ZERO
    return State.UNALLOCATED_ALLOCATED if placed else State.UNALLOCATED


def bitmap_range(first: int, count: int) -> int:
    """The allocation bits of *count* subclusters from *first* on; shifted by 32: their zero bits."""
    return (1 << count) - 1 << first


def make_run(host: int, count: int, cluster_size: int) -> array[int]:
    """Entries for *count* data clusters at *host* on, each with refcount one."""
    start = host | COPIED
    return array("Q", range(start, start + count * cluster_size, cluster_size))
