"""L2 entries (*Cluster mapping*), and the runs in which they are handled: many clusters at a time.

A run is found by comparing whole slices of a table with what a run would hold, in growing steps: the comparison is one
of memory, so long runs cost next to nothing a cluster.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from .geometry import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO, Geometry


class State(IntEnum):
    """What an L2 entry says of its cluster."""

    UNALLOCATED = 0
    #: Reads as zeroes, no host cluster.
    ZERO = 1
    #: Reads as zeroes, a host cluster is set aside.
    ZERO_ALLOCATED = 2
    DATA = 3
    COMPRESSED = 4


class Run(NamedTuple):
    """*clusters* entries from number *at* on in one state. *host* is the first one, the others follow it; 0: none.

    For COMPRESSED, always one entry, *entry* says where. *copied*: refcount one, may be written in place.
    """

    state: State
    at: int
    clusters: int
    host: int
    copied: bool
    entry: int


class BadEntryError(Exception):
    """An entry that means nothing: *entry* at *index*."""

    def __init__(self, index: int, entry: int, reason: str) -> None:
        super().__init__(f"L2 entry {entry:#018x} {reason}")
        self.index = index
        self.entry = entry


def run_length(entries: array[int], index: int, stop: int, step: int) -> int:
    """How many entries from *index* on each are *step* more than the one before."""
    first = entries[index]
    count = 1
    # Most runs of fragmented images end at once.
    if index + 1 < stop and entries[index + 1] != first + step:
        return 1
    chunk = 16
    while index + count < stop:
        size = min(chunk, stop - index - count)
        piece = entries[index + count : index + count + size]
        start = first + count * step
        wanted = array("Q", range(start, start + size * step, step)) if step else array("Q", (first,)) * size
        if piece != wanted:
            for have, want in zip(piece, wanted, strict=True):
                if have != want:
                    return count
                count += 1
        count += size
        if chunk < 4096:
            chunk *= 4
    return count


def runs(entries: array[int], start: int, stop: int, geometry: Geometry) -> Iterator[Run]:
    """The runs of the entries from *start* to *stop*. Raises BadEntryError at the first entry that means nothing."""
    cluster_size = geometry.cluster_size
    unaligned = cluster_size - 1 & OFFSET_MASK
    index = start
    while index < stop:
        entry = entries[index]
        if entry == 0:
            count = run_length(entries, index, stop, 0)
            yield Run(State.UNALLOCATED, index, count, 0, False, 0)
        elif entry & COMPRESSED:
            if entry & COPIED:
                raise BadEntryError(index, entry, "is compressed and says that it may be written in place")
            count = 1
            yield Run(State.COMPRESSED, index, 1, 0, False, entry)
        else:
            host = entry & OFFSET_MASK
            if entry & L2_RESERVED or (entry & ZERO and geometry.version < 3):
                raise BadEntryError(index, entry, "has reserved bits set")
            if host & unaligned:
                raise BadEntryError(index, entry, f"points at {host:#x}, not aligned to clusters")
            copied = bool(entry & COPIED)
            if host:
                count = run_length(entries, index, stop, cluster_size)
                yield Run(State.ZERO_ALLOCATED if entry & ZERO else State.DATA, index, count, host, copied, entry)
            elif entry & ZERO and not copied:
                count = run_length(entries, index, stop, 0)
                yield Run(State.ZERO, index, count, 0, False, entry)
            else:
                raise BadEntryError(index, entry, "says that it may be written in place, but points nowhere")
        index += count


def make_run(host: int, count: int, cluster_size: int) -> array[int]:
    """Entries for *count* data clusters at *host* on, each with refcount one."""
    start = host | COPIED
    return array("Q", range(start, start + count * cluster_size, cluster_size))
