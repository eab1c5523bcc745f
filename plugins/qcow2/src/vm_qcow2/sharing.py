"""Sharing of clusters between the active tables and snapshots: counting a whole L1 table up or down.

Taking a snapshot copies the L1 table and counts everything below it once more; giving one up counts it once less. With
the counts, the bit COPIED of the tables changes: it says that the count is exactly one. In a snapshot's own tables it
means nothing, so it may be stale there; before such tables become active it is set right.

Everything here is done in memory and in the caches, apart from bits in tables that only snapshots use. What has to be
stable before what is the business of ``snapshotting.py``.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from vm_core.errors import BlockError

from .entries import BadEntryError, Run, State, runs
from .geometry import COPIED, MAX_REFTABLE_BYTES, OFFSET_MASK
from .overlap import ACTIVE_L2, INACTIVE_L2
from .store import alternate

if TYPE_CHECKING:
    from .image import Qcow2
    from .tables import L2Table


class Tree:
    """Everything below one L1 table."""

    def __init__(self, image: Qcow2, l1: array[int], *, active: bool) -> None:
        """*l1* is changed where its COPIED bits do. *active*: it is the image's own, whose L2 tables are cached."""
        self.image = image
        self.l1 = l1
        self.active = active
        self.store = image.store
        self.geometry = image.geometry
        self.refcounts = image.refcounts

    # Counting

    def count(
        self, delta: int, first: int = 0, stop: int | None = None, *, tables: bool = True
    ) -> list[tuple[int, int]]:
        """Add *delta* (1 or -1) to the refcount of each L2 table and cluster; returns runs that are free now.

        Of guest clusters, only those from *first* to before *stop*; of *tables*, all or none. Counting up is undone
        where it fails half way. Raises BlockError.
        """
        part = partial(self._spans, first, len(self.l1) << self.geometry.l2_bits if stop is None else stop, tables)
        freed: list[tuple[int, int]] = []
        done = 0
        try:
            for cluster, clusters in part():
                for start, length in self._shift(cluster, clusters, delta):
                    if freed and sum(freed[-1]) == start:
                        freed[-1] = (freed[-1][0], freed[-1][1] + length)
                    else:
                        freed.append((start, length))
                done += 1
                if self.refcounts.pressure:
                    self.refcounts.settle()
                    self.refcounts.trim()
        except BaseException:
            if delta > 0:
                for cluster, clusters in islice(part(), done):
                    self._shift(cluster, clusters, -delta)
            raise
        return freed

    def _spans(self, low: int, high: int, tables: bool) -> Iterator[tuple[int, int]]:
        """(first, count) of the clusters below the L1 table, each within one refcount block; see :meth:`count`."""
        bits, mask = self.geometry.cluster_bits, self.geometry.refblock_entries - 1
        entries = self.geometry.l2_entries
        for index, offset in self._tables(low >> self.geometry.l2_bits, -(-high >> self.geometry.l2_bits)):
            base = index << self.geometry.l2_bits
            start, stop = max(low - base, 0), min(high - base, entries)
            for run in self._runs(self._table(index, offset), start, stop) if start < stop else ():
                if run.state is State.COMPRESSED:
                    start, length = self.geometry.compressed_extent(run.entry)
                    first, count = start >> bits, (start + length - 1 >> bits) - (start >> bits) + 1
                else:
                    first, count = run.host >> bits, run.clusters
                while count:
                    step = min(count, mask + 1 - (first & mask))
                    yield first, step
                    first += step
                    count -= step
            if tables:
                yield offset >> bits, 1

    def _tables(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Number and offset of each L2 table from number *first* to before *stop*."""
        for index, entry in enumerate(self.l1[first:stop], first):
            offset = entry & OFFSET_MASK
            if offset & self.geometry.cluster_size - 1:
                raise self.store.mark_corrupt(f"L2 table offset {offset:#x} unaligned (L1 index: {alternate(index)})")
            known = self.image.metadata.find(offset >> self.geometry.cluster_bits, 1) if offset else None
            if known is not None and known[1] not in (ACTIVE_L2, INACTIVE_L2):
                raise self.store.mark_corrupt(f"Preventing invalid write on metadata (overlaps with {known[1]})")
            if offset:
                yield index, offset

    def _table(self, index: int, offset: int) -> L2Table:
        """An L2 table; the active one as it is in the cache."""
        if self.active:
            table = self.image.tables.get(index)
            assert table is not None
            return table
        return self.image.tables.read(offset, f"L2 table {index} of a snapshot")

    def _runs(self, table: L2Table, position: int, stop: int) -> Iterator[Run]:
        """The runs with host clusters among the entries from *position* to before *stop*."""
        entries = table.entries
        while position < stop:
            try:
                for run in runs(entries, position, stop, self.geometry):
                    if run.placed or run.state is State.COMPRESSED:
                        yield run
                return
            except BadEntryError as error:
                host = error.entry & OFFSET_MASK
                if host & self.geometry.cluster_size - 1:
                    raise self.store.mark_corrupt(
                        f"{error} (L2 offset: {table.offset:#x}, L2 index: {error.index:#x})"
                    ) from None
                if host:
                    yield Run(State.DATA, error.index, 1, host, bool(error.entry & COPIED), error.entry)
                position = error.index + 1

    def _shift(self, first: int, count: int, delta: int) -> list[tuple[int, int]]:
        """Change the counts of clusters within one block; returns runs that are free now."""
        refcounts = self.refcounts
        index = first >> self.geometry.refblock_bits
        block = refcounts.block(index)
        if block is None:
            raise BlockError.of(errno.EFBIG if index >= MAX_REFTABLE_BYTES // 8 else errno.EAGAIN)
        low = first & self.geometry.refblock_entries - 1
        high = low + count
        piece = block.counts[low:high]
        if delta > 0 and max(piece) + delta > self.geometry.refcount_max:
            raise BlockError.of(errno.EINVAL)
        if delta < 0 and not min(piece):
            at = first + piece.index(0) << self.geometry.cluster_bits
            raise self.store.mark_corrupt(f"the cluster at {at:#x} is in use although its refcount is 0")
        changed = array(piece.typecode, [value + delta for value in piece])
        block.counts[low:high] = changed
        block.touch(low, high)
        if delta > 0 or min(changed):
            return []
        freed: list[tuple[int, int]] = []
        for position, value in enumerate(changed):
            if not value:
                if freed and sum(freed[-1]) == first + position:
                    freed[-1] = (freed[-1][0], freed[-1][1] + 1)
                else:
                    freed.append((first + position, 1))
        return freed

    # The bits that go with the counts

    def mark(self, *, passing: set[int] | None = None, shared: bool = False) -> bool:
        """Set the COPIED bits by the refcounts; returns whether the L1 table was changed.

        Changes of active L2 tables are left in the cache, those of others are written (not flushed). Tables that are
        free by now are passed over, and those at the offsets *passing* are left as they are. *shared*: take all bits
        away, since each count is about to go up.
        """
        bits = self.geometry.cluster_bits
        changed_l1 = False
        for index, offset in self._tables():
            count = self.refcounts.get(offset >> bits)
            if not count:
                continue
            entry = self.l1[index] & ~COPIED | (COPIED if count == 1 and not shared else 0)
            if entry != self.l1[index]:
                self.l1[index] = entry
                changed_l1 = True
                if self.active:
                    self.image.tables.changed.add(index)
            if passing is None or offset not in passing:
                self._mark_table(index, offset, shared)
            if self.active:
                self.image.order.relieve()
        return changed_l1

    def _mark_table(self, index: int, offset: int, shared: bool) -> None:
        table = self._table(index, offset)
        entries = table.entries
        low, high = len(entries), 0
        for run in list(self._runs(table, 0, len(entries))):
            if run.state is State.COMPRESSED:
                continue
            alike: Iterable[tuple[int, int, bool]] = ((0, run.clusters, False),)
            if not shared:
                alike = self._equal(run.host >> self.geometry.cluster_bits, run.clusters)
            for at, count, one in alike:
                if one == run.copied:
                    continue
                start, stop = run.at + at, run.at + at + count
                flip = [value ^ COPIED for value in entries[start:stop]]
                entries[start:stop] = array("Q", flip)
                low, high = min(low, start), max(high, stop)
        if low >= high:
            return
        if self.active:
            table.touch(low, high)
        else:
            width = self.geometry.cluster_size // len(entries)
            self.store.write_words(offset + low * width, table.words(low, high))

    def _equal(self, first: int, count: int) -> Iterator[tuple[int, int, bool]]:
        """Runs of clusters, from the first on, that are alike in whether their refcount is one."""
        mask = self.geometry.refblock_entries - 1
        at = 0
        while at < count:
            block = self.refcounts.block(first + at >> self.geometry.refblock_bits)
            low = first + at & mask
            step = min(count - at, mask + 1 - low)
            if block is None:
                yield at, step, False
            else:
                piece = block.counts[low : low + step]
                ones = piece.count(1)
                if ones in (0, step):
                    yield at, step, bool(ones)
                else:
                    start = 0
                    for position in range(1, step + 1):
                        if position == step or (piece[position] == 1) != (piece[start] == 1):
                            yield at + start, position - start, piece[start] == 1
                            start = position
            at += step
