"""Where an image's metadata is, so that nothing else is written over it.

Refcounts should see to that; in a damaged or malicious image they do not. Before clusters are taken or guest data is
written in place, they are looked up here; a hit marks the image as corrupt, and the write fails with EIO.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from .geometry import COPIED, OFFSET_MASK
from .store import Store

#: One-cluster tables up to this many are kept (tens of MiB); only images of many TiB in small clusters have more.
MAX_TABLES = 400_000
#: Ranges of up to this many clusters are looked up one by one.
SHORT = 64


class MetadataMap:
    """Cluster numbers of metadata, by kind."""

    def __init__(self, store: Store) -> None:
        self.store = store
        #: Tables of one cluster.
        self._kinds: dict[int, str] = {}
        #: Their numbers in order, made when a long range is looked up; None after changes.
        self._sorted: list[int] | None = None
        #: Tables of many clusters: sorted starts, with (end, kind).
        self._starts: list[int] = [0]
        self._ends: list[tuple[int, str]] = [(1, "header")]

    def add(self, first: int, count: int, kind: str) -> None:
        """These clusters hold *kind*."""
        if count == 1:
            self._kinds[first] = kind
            self._sorted = None
        elif count:
            position = bisect_left(self._starts, first)
            self._starts.insert(position, first)
            self._ends.insert(position, (first + count, kind))

    def remove(self, first: int, count: int) -> None:
        """These clusters, added before, are free now."""
        if count == 1:
            if self._kinds.pop(first, None) is not None:
                self._sorted = None
        else:
            position = bisect_left(self._starts, first)
            if position < len(self._starts) and self._starts[position] == first:
                del self._starts[position], self._ends[position]

    def register(self, offset: int, length: int, kind: str) -> None:
        """While opening: *kind* lies at *offset*. Raises ImageError where something else does too."""
        bits = self.store.geometry.cluster_bits
        first = offset >> bits
        count = (offset + length - 1 >> bits) - first + 1
        if length:
            known = self.find(first, count)
            if known is not None:
                raise self.store.error(f"{kind} at {offset:#x} overlaps the {known[1]}")
            self.add(first, count, kind)

    def register_tables(self, entries: Iterable[int], kind: str) -> None:
        """The same for tables of one cluster each, by the entries that point at them.

        Several entries may share a table that none of them may change.
        """
        bits = self.store.geometry.cluster_bits
        kinds = self._kinds
        for entry in entries:
            if entry:
                cluster = (entry & OFFSET_MASK) >> bits
                known = kinds.get(cluster)
                if known is None and cluster < self._ends[-1][0]:
                    found = self.find(cluster, 1)
                    known = found and found[1]
                if known is not None and (known != kind or entry & COPIED):
                    raise self.store.error(f"{kind} at {cluster << bits:#x} overlaps the {known}")
                if len(kinds) < MAX_TABLES:
                    kinds[cluster] = kind
                    self._sorted = None

    def find(self, first: int, count: int) -> tuple[int, str] | None:
        """The first cluster found in the range that holds metadata, and what."""
        end = first + count
        position = bisect_right(self._starts, first) - 1
        if position >= 0 and self._ends[position][0] > first:
            return first, self._ends[position][1]
        position += 1
        if position < len(self._starts) and self._starts[position] < end:
            return self._starts[position], self._ends[position][1]
        kinds = self._kinds
        if count == 1:
            if first in kinds:
                return first, kinds[first]
        elif count <= SHORT:
            for cluster in range(first, end):
                if cluster in kinds:
                    return cluster, kinds[cluster]
        else:
            if self._sorted is None:
                self._sorted = sorted(kinds)
            position = bisect_left(self._sorted, first)
            if position < len(self._sorted) and self._sorted[position] < end:
                return self._sorted[position], kinds[self._sorted[position]]
        return None

    def check(self, first: int, count: int) -> None:
        """Raise EIO, and mark the image as corrupt, if writing these clusters would overwrite metadata."""
        found = self.find(first, count)
        if found is not None:
            offset = found[0] << self.store.geometry.cluster_bits
            raise self.store.mark_corrupt(f"a write to {offset:#x} would overwrite the {found[1]}")
