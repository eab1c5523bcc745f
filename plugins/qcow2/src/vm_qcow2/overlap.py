"""Where an image's metadata is, so that nothing else is written over it.

Refcounts should see to that; in a damaged or malicious image they do not. Before clusters are taken or guest data is
written in place, they are looked up here; a hit marks the image as corrupt, and the write fails with EIO. Which kinds
of metadata are looked up is the user's choice (``overlap-check``).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .geometry import OFFSET_MASK

if TYPE_CHECKING:
    from vm_core.errors import BlockError

    from .store import Store

#: The kinds of metadata, as QEMU's messages call them, by the option that switches looking them up.
OPTIONS = {
    "main-header": "qcow2_header",
    "active-l1": "active L1 table",
    "active-l2": "active L2 table",
    "refcount-table": "refcount table",
    "refcount-block": "refcount block",
    "snapshot-table": "snapshot table",
    "inactive-l1": "inactive L1 table",
    "inactive-l2": "inactive L2 table",
    "bitmap-directory": "bitmap directory",
}
HEADER, ACTIVE_L1, ACTIVE_L2, REFCOUNT_TABLE, REFCOUNT_BLOCK, SNAPSHOT_TABLE, INACTIVE_L1, INACTIVE_L2, BITMAPS = (
    OPTIONS.values()
)
_CONSTANT = frozenset((HEADER, ACTIVE_L1, REFCOUNT_TABLE, SNAPSHOT_TABLE, BITMAPS))
_CACHED = _CONSTANT | {ACTIVE_L2, REFCOUNT_BLOCK, INACTIVE_L1}
#: What ``overlap-check`` takes.
TEMPLATES: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": _CACHED | {INACTIVE_L2},
}

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
        self._ends: list[tuple[int, str]] = [(1, HEADER)]
        #: Kinds that are looked up.
        self.checks: frozenset[str] = TEMPLATES["cached"]
        #: Why nothing can be looked up: tables of a snapshot that should be known cannot be read.
        self.broken: BlockError | None = None

    def add(self, first: int, count: int, kind: str) -> None:
        """These clusters hold *kind*."""
        if kind not in self.checks:
            return
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
        """While opening: *kind* lies at *offset*, or should; tables in one place are left to the check of writes."""
        bits = self.store.geometry.cluster_bits
        if length:
            first = offset >> bits
            self.add(first, (offset + length - 1 >> bits) - first + 1, kind)

    def register_tables(self, entries: Iterable[int], kind: str) -> None:
        """The same for tables of one cluster each, by the entries that point at them."""
        bits = self.store.geometry.cluster_bits
        kinds = self._kinds
        if kind not in self.checks:
            return
        for entry in entries:
            if entry and len(kinds) < MAX_TABLES:
                kinds.setdefault((entry & OFFSET_MASK) >> bits, kind)
        self._sorted = None

    def find(self, first: int, count: int) -> tuple[int, str] | None:
        """The first cluster found in the range that holds metadata, and what."""
        end = first + count
        position = bisect_right(self._starts, first) - 1
        if position >= 0 and self._ends[position][0] > first and (position or HEADER in self.checks):
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
        if self.broken is not None:
            raise self.broken
        found = self.find(first, count)
        if found is not None:
            raise self.store.mark_corrupt(f"Preventing invalid write on metadata (overlaps with {found[1]})")
