"""Free clusters, first fit, and the growth of the refcount structures.

Clusters are taken where QEMU takes them: a hint moves up with each allocation and back down when a cluster is freed;
holes too small for what is wanted are passed over. A refcount block that is missing is placed at the next free cluster
after the allocation that needed it, which is then placed anew.

Rules of this module:

* A cluster that was given back can still be pointed at by the tables on disk. So :meth:`Allocator.free` only notes it;
  it becomes free in :meth:`Allocator.release`, which ``order.py`` calls once those tables are stable.
* Clusters that were allocated and never became part of any table (:meth:`Allocator.cancel`) are free at once.
* The refcount table moves when it is full: everything it counts is made stable first, then the new table with its
  blocks, then the header that points at it, each before the next.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Sequence

from vm_core.block.notices import notice
from vm_core.errors import BlockError

from .geometry import MAX_HOST_OFFSET, MAX_REFTABLE_BYTES
from .overlap import ACTIVE_L2, REFCOUNT_BLOCK, REFCOUNT_TABLE, MetadataMap
from .refcounts import Refcounts
from .store import Store

#: Runs of freed clusters that are kept before everything is written back to release them.
MAX_PENDING = 4096


class Allocator:
    """Takes and gives back host clusters. Clusters are given by number."""

    def __init__(self, store: Store, refcounts: Refcounts, metadata: MetadataMap) -> None:
        self.store = store
        self.refcounts = refcounts
        self.metadata = metadata
        self._shift = store.geometry.refblock_bits
        self._per_block = store.geometry.refblock_entries
        #: No cluster below is free (some are, where an allocation found them too few in a row).
        self._hint = 0
        #: (first, count, whether the guest asked for it) of clusters to give back.
        self.pending: list[tuple[int, int, bool]] = []
        #: Among those are some that nothing else points at.
        self.reusable = False
        #: Clusters among those that lie below the hint and stay there.
        self.passed: set[int] = set()
        #: How often each cluster with compressed data is among them: several extents lie in one.
        self._given: dict[int, int] = {}
        #: Where the last compressed cluster ended; 0: at the end of a cluster, or there was none.
        self._bytes_at = 0
        #: From here on the file was never written: reads as zeroes.
        self.fresh_from = -(-store.file.size >> store.geometry.cluster_bits)

    @property
    def pressure(self) -> bool:
        """Whether many clusters wait to be released."""
        return len(self.pending) > MAX_PENDING

    # Taking

    def allocate(self, count: int, what: str = "") -> int:
        """Take *count* clusters in a row, each with refcount one; returns the first. Raises BlockError.

        *what* they are for, where that can never be at offset 0.
        """
        self.store.check_writable()
        self.store.file.event("cluster_alloc")
        while True:
            first = self._find(count)
            if first + count << self.store.geometry.cluster_bits > MAX_HOST_OFFSET:
                self._hint = min(self._hint, first)
                raise BlockError.of(errno.EFBIG)
            missing = self._missing_block(first, count)
            if missing is None:
                break
            try:
                self._create_block(missing)
            finally:
                # The new block may have been put where this allocation was planned.
                self._hint = min(self._hint, first)
        if not first and what:
            raise self.store.mark_corrupt(f"Preventing invalid allocation of {what} at offset 0")
        self._count(first, count)
        return first

    def allocate_at(self, first: int, count: int) -> int:
        """Take as many of *count* clusters from *first* on as are free; returns how many. Raises BlockError."""
        self.store.check_writable()
        while True:
            free = self._free_at(first, count)
            if not free or first + free << self.store.geometry.cluster_bits > MAX_HOST_OFFSET:
                return 0
            missing = self._missing_block(first, free)
            if missing is None:
                break
            # The new block may be put where this allocation was planned, but not before the clusters that it counts:
            # those were planned first.
            planned = max(0, (missing << self._shift) - first)
            self.refcounts.set_run(first, planned, 1)
            try:
                self._create_block(missing)
            finally:
                self.refcounts.set_run(first, planned, 0)
                if planned:
                    self._hint = min(self._hint, first)
        self._count(first, free)
        return free

    def _count(self, first: int, count: int) -> None:
        """Count free clusters as taken. Raises BlockError, with nothing counted, where metadata is found there."""
        self.refcounts.set_run(first, count, 1)
        try:
            self.metadata.check(first, count)
        except BaseException:
            self.cancel(first, count)
            raise
        self._taken(first, count)

    def _taken(self, first: int, count: int) -> None:
        """These clusters were free, and are something now."""
        self.fresh_from = max(self.fresh_from, first + count)
        if first <= self._bytes_at >> self.store.geometry.cluster_bits < first + count:
            # The compressed data that ended there was given up.
            self._bytes_at = 0

    def _free_at(self, first: int, count: int) -> int:
        """How many of *count* clusters from *first* on are free, up to the first that is not."""
        found = 0
        while found < count:
            position = first + found
            index, low = position >> self._shift, position & self._per_block - 1
            step = min(count - found, self._per_block - low)
            block = self.refcounts.block(index)
            if block is not None:
                piece = block.counts[low : low + step]
                if piece != array(piece.typecode, bytes(step * piece.itemsize)):
                    return found + next(i for i, value in enumerate(piece) if value)
            found += step
        return found

    def allocate_metadata(self, count: int, kind: str) -> int:
        """Like :meth:`allocate`, for a table that will never be written as data."""
        first = self.allocate(count, "L2 table" if kind == ACTIVE_L2 else "")
        self.metadata.add(first, count, kind)
        return first

    def allocate_bytes(self, length: int) -> int:
        """Take *length* bytes, at most a cluster; returns their host offset, which need not be aligned.

        They follow what was taken so before where there is room, also across clusters where the next one is free; each
        cluster that they touch is counted once more. Raises BlockError.
        """
        self.store.check_writable()
        self.store.file.event("cluster_alloc_bytes")
        geometry = self.store.geometry
        bits, size = geometry.cluster_bits, geometry.cluster_size
        tail = self._bytes_at
        if tail and self.refcounts.get(tail >> bits) == geometry.refcount_max:
            # It cannot be counted once more. It may have been given back, and goes on all the same as long as nobody
            # else takes it.
            tail = 0
        room = -tail & size - 1 if tail else 0
        if not tail or room < length:
            fresh = self.allocate(1, "compressed cluster") << bits
            if tail and tail + room == fresh:
                self._count_again(tail >> bits)
            else:
                tail = fresh
        else:
            self._count_again(tail >> bits)
        if tail + length - 1 > geometry.compressed_offset_mask & MAX_HOST_OFFSET - 1:
            self._drop_extent(tail, length)
            raise BlockError.of(errno.EFBIG)
        end = tail + length
        self._bytes_at = end if end & size - 1 else 0
        return tail

    def _count_again(self, cluster: int) -> None:
        count = self.refcounts.get(cluster)
        if count:
            self.refcounts.set_run(cluster, 1, count + 1)
        else:
            self._count(cluster, 1)

    def _drop_extent(self, offset: int, length: int) -> None:
        bits = self.store.geometry.cluster_bits
        first = offset >> bits
        self.cancel(first, (offset + length - 1 >> bits) - first + 1)

    def cancel_extent(self, offset: int, length: int) -> None:
        """Bytes that were taken by :meth:`allocate_bytes` and that nothing ever pointed at."""
        self._drop_extent(offset, length)

    def is_fresh(self, first: int) -> bool:
        """Whether the file was never written from cluster *first* on, so that it reads as zeroes. Ask before taking."""
        return first >= self.fresh_from

    def _find(self, count: int) -> int:
        """*count* free clusters in a row, from the hint on; moves the hint past them."""
        position = self._hint
        found = 0
        while found < count:
            index, low = position >> self._shift, position & self._per_block - 1
            block = self.refcounts.block(index)
            if block is None:
                step = min(count - found, self._per_block - low)
                found += step
                position += step
                continue
            counts = block.counts
            if not found:
                try:
                    start = counts.index(0, low)
                except ValueError:
                    position += self._per_block - low
                    continue
                position += start - low
                low = start
            step = min(count - found, self._per_block - low)
            piece = counts[low : low + step]
            if step == 1 or piece == array(counts.typecode, bytes(step * counts.itemsize)):
                if piece[0]:
                    found = 0
                    position += 1
                    continue
                found += step
                position += step
            else:
                used = next(i for i, value in enumerate(piece) if value)
                found = 0
                position += used + 1
        self._hint = position
        return position - count

    def _missing_block(self, first: int, count: int) -> int | None:
        """The first refcount block needed for a range of clusters that does not exist."""
        table = self.refcounts.table
        for index in range(first >> self._shift, (first + count - 1 >> self._shift) + 1):
            if index >= len(table) or not table[index]:
                return index
        return None

    def _create_block(self, index: int) -> None:
        """Make refcount block *index*, or one that it needs first: then the caller finds it missing and asks again."""
        cluster = self._find(1)
        own = cluster >> self._shift
        if own != index and self._missing_block(cluster, 1) is not None:
            try:
                self._create_block(own)
            finally:
                self._hint = min(self._hint, cluster)
            return
        if not cluster:
            raise self.store.mark_corrupt("Preventing invalid allocation of refcount block at offset 0")
        self.metadata.check(cluster, 1)
        self.store.file.event("refblock_alloc")
        if own != index:
            self.refcounts.set_run(cluster, 1, 1)
        if index >= len(self.refcounts.table):
            self._grow_table(index, cluster)
        else:
            self.refcounts.add_block(index, cluster << self.store.geometry.cluster_bits)
        if own == index:
            # It counts itself.
            self.refcounts.set_run(cluster, 1, 1)
        self.metadata.add(cluster, 1, REFCOUNT_BLOCK)
        self._taken(cluster, 1)

    def _grow_table(self, index: int, cluster: int) -> None:
        """Move the refcount table to a larger one that has room for block *index*, which will be at *cluster*.

        The new table and the blocks that count it go to the start of the first area that no block counts yet, where all
        clusters are free. Half as much again is added, so that this happens rarely.
        """
        geometry = self.store.geometry
        words = geometry.cluster_size // 8
        area = (index + 1) * self._per_block
        blocks = self._blocks_for(area)
        entries = -(-(blocks + -(-blocks // 2)) // words) * words
        numbers = range(index + 1, blocks)
        self._move_table(area, numbers, entries, (index, cluster))

    def cover(self, start: int, count: int) -> int:
        """See to it that *count* free clusters behind *start* are covered by refcount blocks.

        Nothing at *start* or behind it is in use. The blocks that are missing, and a new refcount table, go there; the
        cluster after them is returned. Everything is stable. Raises BlockError.
        """
        words = self.store.geometry.cluster_size // 8
        table = self.refcounts.table
        missing: list[int] = []
        clusters = 1
        while True:
            total = -(-(start + len(missing) + clusters + count) // self._per_block)
            found = [index for index in range(total) if index >= len(table) or not table[index]]
            needed = -(-max(total, 1) // words)
            if len(found) == len(missing) and needed == clusters:
                break
            missing, clusters = found, needed
        clusters = max(clusters, -(-self._last_block() // words))
        self._move_table(start, missing, clusters * words, None)
        return start + len(missing) + clusters

    def move_table(self, area: int) -> None:
        """Move the refcount table as it is to free clusters from *area* on; what was allocated before is stable."""
        self._move_table(area, (), len(self.refcounts.table), None)

    def _last_block(self) -> int:
        """One more than the number of the last refcount block."""
        table = self.refcounts.table
        return next((index + 1 for index in range(len(table) - 1, -1, -1) if table[index]), 0)

    def take(self, first: int, count: int) -> None:
        """Take these clusters, which are free and covered by refcount blocks."""
        self.metadata.check(first, count)
        self.refcounts.set_run(first, count, 1)
        self._taken(first, count)

    def _move_table(self, area: int, numbers: Sequence[int], entries: int, other: tuple[int, int] | None) -> None:
        """Put new blocks *numbers* and after them a new table of *entries* entries to the free clusters from *area* on.

        *other* is one more block, and the cluster at which it will be.
        """
        store, refcounts, geometry = self.store, self.refcounts, self.store.geometry
        words = geometry.cluster_size // 8
        if entries * 8 > MAX_REFTABLE_BYTES:
            raise BlockError.of(errno.EFBIG, f"{store.name}: the refcount table cannot grow any more")
        table_clusters = entries // words
        new_blocks = len(numbers)
        used = new_blocks + table_clusters
        # Everything the old table counts becomes stable under the old table.
        refcounts.settle()
        old_first = store.header.refcount_table_offset >> geometry.cluster_bits
        old_count = store.header.refcount_table_clusters
        self.metadata.check(area, used)
        former = refcounts.table[:]
        refcounts.table.extend(array("Q", bytes(8 * max(entries - len(former), 0))))
        try:
            if other is not None:
                index, cluster = other
                refcounts.add_block(index, cluster << geometry.cluster_bits)
                if cluster >> self._shift == index:
                    refcounts.set_run(cluster, 1, 1)
            for position, number in enumerate(numbers):
                refcounts.add_block(number, area + position << geometry.cluster_bits)
            refcounts.set_run(area, used, 1)
            store.file.event("refblock_alloc_write_blocks")
            written = refcounts.write_blocks()
            store.file.event("refblock_alloc_write_table")
            del refcounts.table[entries:]
            table_offset = area + new_blocks << geometry.cluster_bits
            store.write_words(table_offset, refcounts.table)
            store.barrier()
        except BaseException:
            for number in (*numbers, *(() if other is None else (other[0],))):
                refcounts.drop(number)
            refcounts.forget_changes()
            refcounts.table[:] = former
            raise
        for block in written:
            block.clean()
        refcounts.linked()
        for position in range(new_blocks):
            self.metadata.add(area + position, 1, REFCOUNT_BLOCK)
        self.metadata.add(area + new_blocks, table_clusters, REFCOUNT_TABLE)
        self._taken(area, used)
        store.header.refcount_table_offset = table_offset
        store.header.refcount_table_clusters = table_clusters
        store.file.event("refblock_alloc_switch_table")
        store.write_header("refcount_table_offset", "refcount_table_clusters")
        store.barrier()
        # Nothing on disk points at the old table any more.
        self.metadata.remove(old_first, old_count)
        for freed in refcounts.decrement(old_first, old_count):
            self._hint = min(self._hint, freed)

    def _blocks_for(self, clusters: int) -> int:
        """Refcount blocks that count *clusters* clusters, themselves, and a table of them that may grow by half."""
        words = self.store.geometry.cluster_size // 8
        table = blocks = 0
        generous = True
        while True:
            total = clusters + table + blocks
            blocks = -(-total // self._per_block)
            table = -(-blocks // words)
            if clusters + table + blocks == total:
                if not generous:
                    return blocks
                generous = False
                clusters += -(-table // 2)

    # Giving back

    def free(self, first: int, count: int, *, requested: bool = False) -> bool:
        """Tables point at these clusters once less. *requested*: the guest said so, and the host may have the space.

        False, told and with nothing noted, where that cannot be.
        """
        try:
            # Damage is told now; the count itself goes down later.
            self.reusable = self.refcounts.any_one(first, count) or self.reusable
        except BlockError as error:
            notice(f"qcow2_free_clusters failed: {os.strerror(error.code)}")
            return False
        if self.pending and self.pending[-1][2] == requested and self.pending[-1][0] + self.pending[-1][1] == first:
            last = self.pending[-1]
            self.pending[-1] = (last[0], last[1] + count, requested)
        else:
            self.pending.append((first, count, requested))
        return True

    def free_extent(self, offset: int, length: int, *, requested: bool = False) -> None:
        """The same for all clusters that a compressed extent touches."""
        bits = self.store.geometry.cluster_bits
        first = offset >> bits
        count = (offset + length - 1 >> bits) - first + 1
        if self.free(first, count, requested=requested):
            for cluster in range(first, first + count):
                given = self._given[cluster] = self._given.get(cluster, 0) + 1
                self.reusable = self.reusable or self.refcounts.get(cluster) == given

    def cancel(self, first: int, count: int) -> None:
        """Clusters that were taken and that nothing ever pointed at."""
        for cluster in self.refcounts.decrement(first, count):
            self._hint = min(self._hint, cluster)

    def release(self) -> list[tuple[int, int]]:
        """Give back what is pending: the tables on disk do not point at it any more.

        Returns the (first, count) of clusters that are free and that the guest wanted to be.
        """
        released: list[tuple[int, int]] = []
        passed: set[int] = set()
        if self.pending:
            self.store.file.event("cluster_free")
        self.reusable = False
        self._given.clear()
        while self.pending:
            first, count, requested = self.pending[-1]
            freed = self.refcounts.decrement(first, count)
            self.pending.pop()
            for cluster in freed:
                if cluster not in self.passed:
                    self._hint = min(self._hint, cluster)
                self.metadata.remove(cluster, 1)
                if requested:
                    if released and sum(released[-1]) == cluster:
                        released[-1] = (released[-1][0], released[-1][1] + 1)
                    else:
                        released.append((cluster, 1))
            if self.passed:
                passed.update(self.passed.intersection(range(first, first + count)))
        self.passed -= passed
        return released

    def free_now(self, first: int, count: int) -> list[int]:
        """Free clusters that nothing on disk points at, without waiting; returns those that nobody else uses."""
        freed = self.refcounts.decrement(first, count)
        self.metadata.remove(first, count)
        for cluster in freed:
            self.lower(cluster)
        return freed

    def lower(self, cluster: int) -> None:
        """Cluster number *cluster* is free now."""
        self._hint = min(self._hint, cluster)

    def forget_unused(self) -> bool:
        """Do without new refcount blocks that count nothing but themselves; returns whether there were any.

        Only before anybody tried to let the table on disk point at them.
        """
        refcounts, bits = self.refcounts, self.store.geometry.cluster_bits
        found = False
        for index in () if refcounts.linking else sorted(refcounts.unlinked, reverse=True):
            block = refcounts.block(index)
            if block is None:
                continue
            cluster = block.offset >> bits
            own = cluster >> self._shift == index
            if len(block.counts) - block.counts.count(0) == own:
                refcounts.drop(index)
                self.metadata.remove(cluster, 1)
                if not own:
                    refcounts.decrement(cluster, 1)
                self.lower(cluster)
                found = True
        return found

    # For repair

    def start_at(self, cluster: int) -> None:
        """Look for free clusters from *cluster* on, and go on with nothing that is begun."""
        self._hint = cluster
        self._bytes_at = 0
