"""Changing what guest bytes are: allocating, committing, zeroing, discarding – all of it in memory.

Units are what is mapped on its own: clusters, or subclusters where L2 entries are extended. Host space is always taken
in whole clusters, so with subclusters there are three cases for a write (*Extended L2 Entries*):

* the cluster has host space of its own: subclusters in use are overwritten where they are, others are filled at their
  place in it and then marked as allocated;
* it has none: a cluster is taken, and only the subclusters that the write touches are filled;
* it has some that is shared or compressed: a cluster is taken, and all that is in use is copied, from the first
  subcluster in use or written to the last one.

With an external data file guest clusters lie there at their own offset, so nothing is taken or given back.
"""

from __future__ import annotations

import errno
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vm_core.block.mapping import Allocation
from vm_core.errors import BlockError

from . import geometry
from .entries import ALL_ALLOCATED, ALL_ZERO, Run, State, all_runs, bitmap_range, damage, make_run, run_length
from .geometry import COMPRESSED, COPIED, OFFSET_MASK
from .store import alternate
from .tables import L2Table

if TYPE_CHECKING:
    from .image import Qcow2

#: L2 tables and parts of a write after which QEMU has entered a part of it.
PASSED_TABLES = 2
PASSED_PARTS = 10


class _Given:
    """The compressed clusters that a write gives up, in order.

    QEMU enters the parts of a long write into L2 tables side by side, each once its data is written: while it waits for
    later parts' L2 tables, or when there are too many. What earlier parts gave back may be free by then, and is passed
    over where more than one cluster is wanted. Which parts these are depends on how fast they are; here, it is those
    that are so far back that they are as good as always.
    """

    def __init__(self) -> None:
        #: Guest cluster, entry, parts before.
        self._clusters: deque[tuple[int, int, int]] = deque()
        self._parts = self._counted = 0

    def add(self, cluster: int, entry: int, found: Sequence[Allocation]) -> None:
        """*found* is what was allocated before."""
        self._clusters.append((cluster, entry, self._count(found)))

    def passed(self, cluster: int, found: Sequence[Allocation], l2_bits: int) -> Iterator[int]:
        """The entries of those that are passed over by an allocation for guest clusters from *cluster* on, once."""
        waiting = self._clusters
        if not waiting:
            return
        table, parts = cluster >> l2_bits, self._count(found)
        while waiting and (
            table - (waiting[0][0] >> l2_bits) >= PASSED_TABLES or parts - waiting[0][2] >= PASSED_PARTS
        ):
            yield waiting.popleft()[1]

    def _count(self, found: Sequence[Allocation]) -> int:
        """The parts of a write: what adjoins on the host is one."""
        for number in range(self._counted, len(found)):
            if not number or found[number - 1].host + found[number - 1].length != found[number].host:
                self._parts += 1
        self._counted = len(found)
        return self._parts


class Writer:
    """The changes of one image."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.store = image.store
        self.tables = image.tables
        self.allocator = image.allocator
        self.metadata = image.metadata
        self.geometry = image.geometry
        self._cluster_bits = self.geometry.cluster_bits
        self._unit_bits = self.geometry.unit_bits
        self._l2_bits = self.geometry.l2_bits
        self._l2_mask = self.geometry.l2_entries - 1
        self._units = self.geometry.units
        self._external = self.geometry.external
        #: Clusters whose entries QEMU has in memory at once.
        self._slice = self.image.runtime.l2_slice // (16 if self.geometry.extended else 8)

    def _runs(self, table: L2Table, start: int, stop: int) -> list[Run]:
        """The runs of clusters, damage among them."""
        return all_runs(table.entries, None, start, stop, self.geometry)

    # Writing

    def allocate(self, offset: int, length: int) -> list[Allocation]:
        """See :meth:`vm_core.block.format.Format.allocate`."""
        self.store.check_writable()
        self._reclaim()
        bits = self._cluster_bits
        end = offset + length
        found: list[Allocation] = []
        cluster = offset >> bits
        stop = (end - 1 >> bits) + 1
        given = _Given()
        try:
            while cluster < stop:
                self.image.order.relieve()
                l1_index = cluster >> self._l2_bits
                base = l1_index << self._l2_bits
                last = min(stop - base, self._l2_mask + 1)
                table = self.tables.writable(l1_index)
                missing = 0
                for run in self._runs(table, cluster - base, last):
                    first = base + run.at
                    if run.state is State.BAD and run.entry & COPIED:
                        raise self._damaged(table, run.at, first << bits)
                    if table.bitmaps is not None and not (run.copied and run.placed):
                        self._check_bitmaps(table, run, first)
                    if run.copied and run.placed:
                        if missing:
                            self._take(found, table, first - missing, missing, offset, end, given)
                            missing = 0
                        if not self._external:
                            self.metadata.check(run.host >> bits, run.clusters)
                        self._reuse(found, table, run, base, offset, end)
                    else:
                        missing += run.clusters
                        if run.state is State.COMPRESSED:
                            given.add(first, run.entry, found)
                if missing:
                    self._take(found, table, base + last - missing, missing, offset, end, given)
                cluster = base + last
        except BaseException:
            self.abort([one for one in found if one.fresh])
            raise
        return found

    def _reclaim(self) -> None:
        """Clusters that were given back are the first to be taken again; before that, nothing on disk may use them."""
        if self.allocator.reusable:
            self.image.order.write_back()

    def _reuse(self, found: list[Allocation], table: L2Table, run: Run, base: int, offset: int, end: int) -> None:
        """The units of a run of clusters that are the guest's already, cut to the write."""
        unit_bits, per_cluster = self._unit_bits, self._units
        low = max(run.at * per_cluster, (offset >> unit_bits) - base * per_cluster)
        high = min((run.at + run.clusters) * per_cluster, (end - 1 >> unit_bits) + 1 - base * per_cluster)
        parts = [run] if per_cluster == 1 else all_runs(table.entries, table.bitmaps, low, high, self.geometry)
        for part in parts:
            start = base * per_cluster + part.at << unit_bits
            stop = start + (part.clusters << unit_bits)
            if part.state is State.BAD:
                raise self._damaged(table, part.at // per_cluster, start)
            if part.state is State.DATA:
                begin = max(start, offset)
                data = self.image.storage(start, part.host)
                found.append(Allocation(begin, min(stop, end) - begin, data, part.host + begin - start, False))
            else:
                data = self.image.storage(start, part.host)
                found.append(Allocation(start, stop - start, data, part.host, True))

    def _take(
        self,
        found: list[Allocation],
        table: L2Table,
        first: int,
        count: int,
        offset: int,
        end: int,
        given: _Given,
    ) -> None:
        """Host clusters for *count* guest clusters: after those of the last allocation if they are free, else in a row
        wherever there are so many. QEMU looks at a part of a large L2 table at a time.

        *given*: the compressed clusters that this write gives up.
        """
        bits = self._cluster_bits
        while count:
            part = min(count, self._slice - (first & self._slice - 1))
            fresh_from = self.allocator.fresh_from
            taken = part
            if self._external:
                host, zeroed = first << bits, False
            else:
                cluster, taken = 0, 0
                if found and not (found[-1].host + found[-1].length) & self.geometry.cluster_size - 1:
                    cluster = found[-1].host + found[-1].length >> bits
                    taken = self.allocator.allocate_at(cluster, part)
                if not taken:
                    cluster, taken = self.allocator.allocate(part), part
                    if part > 1:
                        for entry in given.passed(first, found, self._l2_bits):
                            at, length = self.geometry.compressed_extent(entry)
                            self.allocator.passed.update(range(at >> bits, (at + length - 1 >> bits) + 1))
                # Of an encrypted image nothing reads as zeroes by itself.
                host, zeroed = cluster << bits, cluster >= fresh_from and self.image.encryption is None
            found.append(self._cut(table, first, taken, host, zeroed, offset, end))
            first += taken
            count -= taken

    def _cut(
        self, table: L2Table, first: int, count: int, host: int, zeroed: bool, offset: int, end: int
    ) -> Allocation:
        """The part of newly taken clusters that has to be filled: all of them, without subclusters."""
        low, high = first << self._cluster_bits, first + count << self._cluster_bits
        start = low
        if table.bitmaps is not None:
            if offset > low:
                low += self._first_needed(table, first, offset) << self._unit_bits
            if end < high:
                high -= self._last_unneeded(table, first + count - 1, end) << self._unit_bits
        host += low - start
        return Allocation(low, high - low, self.image.storage(low, host), host, True, zeroed)

    def _check_bitmaps(self, table: L2Table, run: Run, first: int) -> None:
        """Raise EIO where the allocation bitmaps of clusters that get a new place mean nothing."""
        assert table.bitmaps is not None
        if run.state is State.COMPRESSED:
            return
        for position, bitmap in enumerate(table.bitmaps[run.at : run.at + run.clusters]):
            if bitmap & bitmap >> 32 or (bitmap & ALL_ALLOCATED and not run.placed):
                raise self._damaged(table, run.at + position, first + position << self._cluster_bits)

    def _damaged(self, table: L2Table, index: int, guest: int) -> OSError:
        """A write would go to a place that means nothing."""
        entry = table.entries[index]
        if not entry & OFFSET_MASK & self.geometry.cluster_size - 1:
            bitmap = table.bitmaps[index] if table.bitmaps is not None else 0
            return self.store.mark_corrupt(
                f"{damage(entry, bitmap, self.geometry)} "
                f"(L2 offset: {alternate(table.offset)}, L2 index: {alternate(index)})"
            )
        what = "Preallocated zero" if entry & geometry.ZERO and not self.geometry.extended else "Data"
        return self.store.mark_corrupt(
            f"{what} cluster offset {alternate(entry & OFFSET_MASK)} unaligned (guest offset: {alternate(guest)})"
        )

    def _first_needed(self, table: L2Table, cluster: int, offset: int) -> int:
        """The first subcluster of *cluster* to fill for a write that begins at *offset* in it."""
        number = (offset >> self._unit_bits) & 31
        index = cluster & self._l2_mask
        entry = table.entries[index]
        assert table.bitmaps is not None
        if entry & COMPRESSED:
            return 0
        used = table.bitmaps[index] & ALL_ALLOCATED if entry & OFFSET_MASK else 0
        return min(number, (used & -used).bit_length() - 1) if used else number

    def _last_unneeded(self, table: L2Table, cluster: int, end: int) -> int:
        """How many subclusters at the end of *cluster* need not be filled for a write that ends at *end* in it."""
        number = (end - 1 >> self._unit_bits) & 31
        index = cluster & self._l2_mask
        entry = table.entries[index]
        assert table.bitmaps is not None
        if entry & COMPRESSED:
            return 0
        used = table.bitmaps[index] & ALL_ALLOCATED if entry & OFFSET_MASK else 0
        return 31 - max(number, used.bit_length() - 1)

    def commit(self, allocations: Sequence[Allocation]) -> None:
        """See :meth:`vm_core.block.format.Format.commit`."""
        bits, mask = self._cluster_bits, self.geometry.cluster_size - 1
        for one in allocations:
            # An allocation lies under one L2 table.
            first = one.offset >> bits
            count = (one.offset + one.length - 1 >> bits) - first + 1
            l1_index, index = first >> self._l2_bits, first & self._l2_mask
            table = self.tables.writable(l1_index)
            if one.token is not None:
                self._commit_encoded(table, l1_index, index, one.token)
                continue
            base = one.host - (one.offset & mask)
            if table.bitmaps is not None:
                self._commit_bitmaps(table, index, count, one, base)
            for run in self._runs(table, index, index + count):
                host = base + (run.at - index << bits)
                if not run.placed or run.host != host:
                    self._free(run)
            table.entries[index : index + count] = make_run(base, count, self.geometry.cluster_size)
            table.touch(index, index + count)

    def _commit_bitmaps(self, table: L2Table, index: int, count: int, one: Allocation, base: int) -> None:
        """Mark the subclusters of an allocation as in use; the entries are as they were before."""
        assert table.bitmaps is not None
        first = (one.offset >> self._unit_bits) & 31
        after = (one.offset + one.length - 1 >> self._unit_bits) + 1 - (one.offset >> self._cluster_bits << 5)
        edges = []
        for position in {0, count - 1}:
            low = first if position == 0 else 0
            high = min(after - (position << 5), 32)
            used = bitmap_range(low, high - low)
            entry, bitmap = table.entries[index + position], table.bitmaps[index + position]
            if entry & COMPRESSED:
                bitmap = 0
            elif entry & OFFSET_MASK != base + (position << self._cluster_bits):
                # What was in use of another cluster has been copied to where this one has it.
                bitmap &= ALL_ZERO
            edges.append((index + position, bitmap & ~(used << 32) | used))
        table.bitmaps[index : index + count] = array("Q", (ALL_ALLOCATED,)) * count
        for position, bitmap in edges:
            table.bitmaps[position] = bitmap

    def _commit_encoded(self, table: L2Table, l1_index: int, index: int, entry: int) -> None:
        for run in self._runs(table, index, index + 1):
            self._free(run)
        table.entries[index] = entry
        if table.bitmaps is not None:
            table.bitmaps[index] = 0
        table.touch(index, index + 1)

    def abort(self, allocations: Sequence[Allocation]) -> None:
        """See :meth:`vm_core.block.format.Format.abort`."""
        if self._external:
            return
        self.store.aborted = True
        bits, mask = self._cluster_bits, self.geometry.cluster_size - 1
        for one in allocations:
            first = one.offset >> bits
            if one.token is not None:
                self.allocator.cancel_extent(*self.geometry.compressed_extent(one.token))
                continue
            count = (one.offset + one.length - 1 >> bits) - first + 1
            base = one.host - (one.offset & mask)
            table = self.tables.get(first >> self._l2_bits)
            entry = table.entries[first & self._l2_mask] if table is not None else 0
            if entry & COMPRESSED or entry & OFFSET_MASK != base:
                self.allocator.cancel(base >> bits, count)

    def allocate_encoded(self, offset: int, length: int) -> Allocation:
        """See :meth:`vm_core.block.format.Format.allocate_encoded`."""
        self.store.check_writable()
        if self._external:
            raise BlockError.of(errno.ENOTSUP)
        self.image.order.relieve()
        self._reclaim()
        cluster = offset >> self._cluster_bits
        l1_index, index = cluster >> self._l2_bits, cluster & self._l2_mask
        table = self.tables.writable(l1_index)
        if table.entries[index] & (COMPRESSED | OFFSET_MASK):
            # Compression cannot overwrite anything.
            raise BlockError.of(errno.EIO)
        fresh_from = self.allocator.fresh_from
        host = self.allocator.allocate_bytes(length)
        sectors = (host + length - 1 >> 9) - (host >> 9)
        entry = COMPRESSED | sectors << self.geometry.compressed_sectors_shift | host
        zeroed = host >> self._cluster_bits >= fresh_from
        return Allocation(offset, self.geometry.cluster_size, self.image.file, host, True, zeroed, entry)

    def _free(self, run: Run, *, requested: bool = False) -> None:
        """The entries of *run*, of clusters, are about to be overwritten: give back what they point at.

        *requested*: the guest said so.
        """
        order = self.image.order
        pass_on = order.pass_discard if requested else order.pass_discard_other
        if run.state is State.COMPRESSED:
            self.allocator.free_extent(*self.geometry.compressed_extent(run.entry), requested=pass_on)
        elif run.state is State.BAD:
            offset = run.entry & OFFSET_MASK
            self.store.mark_corrupt(f"Cannot free unaligned cluster {alternate(offset)}", fatal=False)
        elif not run.placed:
            return
        elif self._external:
            if pass_on:
                with suppress(OSError):  # the space is kept then
                    self.image.data.discard(run.host, run.clusters << self._cluster_bits)
        else:
            self.allocator.free(run.host >> self._cluster_bits, run.clusters, requested=pass_on)

    # Zeroing and discarding

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        """See :meth:`vm_core.block.format.Format.zero`."""
        if self.geometry.version < 3:
            # Version 2 knows no zeroes, but without a backing image what is not there reads as such.
            if self.image.backing_reference is not None:
                return False
            self.discard(offset, length)
            return True
        self.store.check_writable()
        mask = self.geometry.cluster_size - 1
        if self.geometry.extended:
            # Parts of clusters come alone, at either end. The last cluster is none if it ends between subclusters.
            end = offset + length
            if offset & mask or (end & mask and (end != self.image.size or end & (1 << self._unit_bits) - 1)):
                if offset >> self._cluster_bits != end - 1 >> self._cluster_bits:
                    raise ValueError("subclusters of more than one cluster")
                return self._zero_subclusters(offset, length)
        if self.image.raw_data:
            # The data file alone has to be right, too.
            self.image.data.zero(offset, length, unmap=unmap)
        for table, _, start, stop in self.whole_clusters(offset, length, create=True):
            assert table is not None
            for run in self._runs(table, start, stop):
                low, high = run.at, run.at + run.clusters
                free = run.state is State.COMPRESSED or (unmap and (run.placed or run.state is State.BAD))
                if table.bitmaps is not None:
                    zeroes = array("Q", (ALL_ZERO,)) * run.clusters
                    if not free and table.bitmaps[low:high] == zeroes:
                        continue
                    if free:
                        self._free(run, requested=True)
                        table.entries[low:high] = array("Q", bytes(8 * run.clusters))
                    table.bitmaps[low:high] = zeroes
                else:
                    if run.state is State.ZERO or (run.state is State.ZERO_ALLOCATED and not unmap):
                        continue
                    if free:
                        self._free(run, requested=True)
                        values = array("Q", (geometry.ZERO,)) * run.clusters
                    else:
                        values = array("Q", [entry | geometry.ZERO for entry in table.entries[low:high]])
                    table.entries[low:high] = values
                table.touch(low, high)
        return True

    def _zero_subclusters(self, offset: int, length: int) -> bool:
        cluster = offset >> self._cluster_bits
        l1_index, index = cluster >> self._l2_bits, cluster & self._l2_mask
        table = self.tables.get(l1_index)
        if table is not None and table.entries[index] & COMPRESSED:
            return False
        if self.image.raw_data:
            self.image.data.zero(offset, length)
        table = self.tables.writable(l1_index)
        assert table.bitmaps is not None
        first = (offset >> self._unit_bits) & 31
        some = bitmap_range(first, (offset + length - 1 >> self._unit_bits) % 32 + 1 - first)
        bitmap = table.bitmaps[index] & ~some | some << 32
        if bitmap != table.bitmaps[index]:
            table.bitmaps[index] = bitmap
            table.touch(index, index + 1)
        return True

    def discard(self, offset: int, length: int) -> None:
        """See :meth:`vm_core.block.format.Format.discard`."""
        self.store.check_writable()
        has_backing = self.image.backing_reference is not None
        if has_backing and self.geometry.version < 3:
            # Version 2 cannot hide the backing image's bytes.
            return
        # QEMU makes L2 tables even where there is nothing to discard, and what comes later lies behind them.
        self.drop(offset, length, zero=self.geometry.version >= 3, unallocated_too=has_backing, create=True)

    def drop(
        self,
        offset: int,
        length: int,
        *,
        zero: bool,
        unallocated_too: bool,
        requested: bool = True,
        create: bool = False,
    ) -> None:
        """Give back the clusters of a range and make their entries empty, or such that they read as zeroes.

        *create* L2 tables that are missing.
        """
        value = geometry.ZERO if zero and not self.geometry.extended else 0
        bitmap = ALL_ZERO if zero else 0
        for table, l1_index, start, stop in self.whole_clusters(offset, length, create=create):
            if table is None:
                continue
            for run in self._runs(table, start, stop):
                low, high = run.at, run.at + run.clusters
                if table.bitmaps is not None:
                    if run.state is State.UNALLOCATED:
                        new = array("Q", (bitmap,)) * run.clusters
                        if not unallocated_too and zero:
                            # Zeroes stay zeroes; what was never written stays so.
                            continue
                        if table.bitmaps[low:high] == new:
                            continue
                else:
                    if run.state is State.UNALLOCATED and not unallocated_too:
                        continue
                    if run.state is State.ZERO and value:
                        continue
                target = self.tables.writable(l1_index)
                self._free(run, requested=requested)
                target.entries[low:high] = array("Q", (value,)) * run.clusters
                if target.bitmaps is not None:
                    target.bitmaps[low:high] = array("Q", (bitmap,)) * run.clusters
                target.touch(low, high)

    def whole_clusters(
        self, offset: int, length: int, *, create: bool
    ) -> Iterator[tuple[L2Table | None, int, int, int]]:
        """L2 tables of a range: table, its number, and the part of its entries.

        With *create* the tables may be changed; else they are as they are, None where there is none.
        """
        cluster = offset >> self._cluster_bits
        stop = -(-(offset + length) >> self._cluster_bits)
        while cluster < stop:
            self.image.order.relieve()
            l1_index = cluster >> self._l2_bits
            base = l1_index << self._l2_bits
            last = min(stop - base, self._l2_mask + 1)
            if create and not self.tables.owned(l1_index):
                # The clusters that this very request gave back are taken by its next L2 tables.
                self._reclaim()
            table = self.tables.writable(l1_index) if create else self.tables.get(l1_index)
            if table is None:
                # Pass over all that is empty.
                l1_stop = (stop - 1 >> self._l2_bits) + 1
                empty = run_length(self.tables.l1, l1_index, l1_stop, 0)
                cluster = min(l1_index + empty << self._l2_bits, stop)
                continue
            yield table, l1_index, cluster - base, last
            cluster = base + last
