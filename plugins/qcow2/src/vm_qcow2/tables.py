"""The L1 table, and a cache of L2 tables.

Rules of this module: a table is changed only in memory and marked; ``order.py`` decides when it is written. A table
that a snapshot shares (its L1 entry lacks the bit COPIED) is never changed: :meth:`Tables.writable` copies it first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from time import monotonic

from vm_core.block.tables import load
from vm_core.errors import BlockError

from .allocator import Allocator
from .geometry import COPIED, MAX_L1_BYTES, OFFSET_MASK
from .header import check_table
from .overlap import ACTIVE_L2
from .store import Store, alternate

MAX_INT = (1 << 31) - 1


class L2Table:
    """One L2 table. Entries from *low* to below *high* differ from the disk (none if low >= high).

    *linked*: the L1 table on disk points at it. *bitmaps* are the second halves of extended entries, else None.
    """

    __slots__ = ("bitmaps", "entries", "high", "linked", "low", "offset")

    def __init__(self, offset: int, entries: array[int], linked: bool, bitmaps: array[int] | None = None) -> None:
        self.offset = offset
        self.entries = entries
        self.bitmaps = bitmaps
        self.linked = linked
        self.low, self.high = len(entries), 0

    @property
    def dirty(self) -> bool:
        return self.low < self.high or not self.linked

    def touch(self, low: int, high: int) -> None:
        """Entries from *low* to *high* were changed."""
        if low < self.low:
            self.low = low
        if high > self.high:
            self.high = high

    def clean(self) -> None:
        self.low, self.high = len(self.entries), 0

    def words(self, low: int = 0, high: int | None = None) -> array[int]:
        """The entries from *low* to *high* as they are on disk."""
        piece = self.entries[low:high]
        if self.bitmaps is None:
            return piece
        both = array("Q", bytes(16 * len(piece)))
        both[0::2] = piece
        both[1::2] = self.bitmaps[low:high]
        return both

    @classmethod
    def of_words(cls, offset: int, words: array[int], *, linked: bool, extended: bool) -> L2Table:
        """The table at *offset* whose contents are *words*."""
        if extended:
            return cls(offset, words[0::2], linked, words[1::2])
        return cls(offset, words, linked)


class Tables:
    """The active L1 table and what is cached of the L2 tables under it, by the number of their L1 entry."""

    def __init__(self, store: Store, allocator: Allocator | None) -> None:
        self.store = store
        self.geometry = store.geometry
        self.allocator = allocator
        header = store.header
        check_table(store.name, header, header.l1_table_offset, header.l1_size, 8, MAX_L1_BYTES, "Active L1 table")
        if self.geometry.l1_entries_for(header.size) > MAX_INT:
            raise store.error("Image is too big")
        if header.l1_size < self.geometry.l1_entries_for(header.size):
            raise store.error("L1 table is too small")
        self.l1: array[int] = array("Q")
        if header.l1_size:
            self.l1 = store.read_words(header.l1_table_offset, header.l1_size, "L1 table")
        #: L1 entries that differ from the disk.
        self.changed: set[int] = set()
        self._cache: OrderedDict[int, L2Table] = OrderedDict()
        self._limit = 2
        #: Seconds after which tables that nobody used are dropped; 0: never.
        self.clean_interval = 0
        self._clean_at = float("inf")
        self._recent: set[int] = set()
        #: With lazy refcounts, those of tables are not: they are stable before anything points at a table.
        self.settle_new = False

    def limit(self, cache_bytes: int) -> None:
        """Keep tables of about so many bytes in memory."""
        self._limit = max(2, cache_bytes >> self.geometry.cluster_bits)

    def clean_after(self, seconds: int) -> None:
        """Drop tables that nobody used for so long, now and then; 0: keep them."""
        self.clean_interval = seconds
        self._clean_at = monotonic() + seconds if seconds else float("inf")

    def _drop_unused(self) -> None:
        """Drop tables that were not used since this was done last."""
        for index in [index for index, table in self._cache.items() if index not in self._recent and not table.dirty]:
            del self._cache[index]
        self._recent.clear()
        self._clean_at = monotonic() + self.clean_interval

    def cached(self, index: int) -> L2Table | None:
        """The table, if it is in memory."""
        return self._cache.get(index)

    def unaligned(self, index: int, offset: int) -> BlockError:
        """L1 entry *index* points between clusters: mark the image as corrupt; returns the error to raise."""
        return self.store.mark_corrupt(f"L2 table offset {alternate(offset)} unaligned (L1 index: {alternate(index)})")

    def get(self, index: int) -> L2Table | None:
        """The L2 table of L1 entry *index*, to be read; None where there is none. Raises ImageError."""
        table = self._cache.get(index)
        if self.clean_interval:
            if monotonic() >= self._clean_at:
                self._drop_unused()
            self._recent.add(index)
        if table is not None:
            self._cache.move_to_end(index)
            return table
        entry = self.l1[index] if index < len(self.l1) else 0
        if not entry:
            return None
        offset = entry & OFFSET_MASK
        if not offset:
            return None
        if offset & self.geometry.cluster_size - 1:
            raise self.unaligned(index, offset)
        self.store.file.event("l2_load")
        return self._insert(index, self.read(offset, f"L2 table {index}"))

    def read(self, offset: int, what: str) -> L2Table:
        """The L2 table at *offset*, whichever L1 table points at it. Raises ImageError."""
        file, size = self.store.file, self.geometry.cluster_size
        # The file may end in the middle of its last cluster.
        self.store.check_range(offset, 1, what)
        words = load("Q", file.pread(offset, size), "big")
        return L2Table.of_words(offset, words, linked=True, extended=self.geometry.extended)

    def _insert(self, index: int, table: L2Table) -> L2Table:
        self._cache[index] = table
        if len(self._cache) > self._limit:
            for old, candidate in self._cache.items():
                if not candidate.dirty and candidate is not table:
                    del self._cache[old]
                    break
        return table

    def owned(self, index: int) -> bool:
        """Whether L1 entry *index* has an L2 table that can be changed where it is."""
        return bool(self.l1[index] & COPIED)

    def writable(self, index: int) -> L2Table:
        """The L2 table of L1 entry *index*, to be changed: made where there is none, copied where it is shared."""
        table = self.get(index)
        if table is not None and self.l1[index] & COPIED:
            return table
        allocator = self.allocator
        assert allocator is not None
        cluster = allocator.allocate_metadata(1, ACTIVE_L2)
        if self.settle_new:
            allocator.refcounts.settle()
        self.store.file.event("l2_alloc_write")
        offset = cluster << self.geometry.cluster_bits
        if table is None:
            empty = array("Q", bytes(self.geometry.cluster_size))
            fresh = L2Table.of_words(offset, empty, linked=False, extended=self.geometry.extended)
        else:
            fresh = L2Table(offset, table.entries, linked=False, bitmaps=table.bitmaps)
            allocator.free(table.offset >> self.geometry.cluster_bits, 1)
        self.l1[index] = offset | COPIED
        self.changed.add(index)
        return self._insert(index, fresh)

    # To disk

    @property
    def dirty(self) -> bool:
        """Whether any table differs from the disk."""
        return bool(self.changed) or any(table.low < table.high for table in self._cache.values())

    @property
    def pressure(self) -> bool:
        """Whether more changed tables are kept than the cache should hold."""
        return len(self._cache) > self._limit

    def write_unlinked(self) -> list[L2Table]:
        """Write the tables at which nothing on disk points yet, whole."""
        tables = [table for table in self._cache.values() if not table.linked]
        for table in tables:
            self.store.write_words(table.offset, table.words())
        return tables

    def write_linked(self) -> list[L2Table]:
        """Write changes of the tables at which the disk points."""
        grain = min(512, self.geometry.l2_entries)
        width = 16 if self.geometry.extended else 8
        tables = [table for table in self._cache.values() if table.linked and table.low < table.high]
        for table in tables:
            low = table.low - table.low % grain
            self.store.file.event("l2_update")
            self.store.write_words(table.offset + low * width, table.words(low, -(-table.high // grain) * grain))
        return tables

    def write_l1(self) -> None:
        """Write changes of the L1 table, in runs that lie close together."""
        indices = sorted(self.changed)
        position = 0
        while position < len(indices):
            first = last = indices[position]
            while position < len(indices) and indices[position] <= last + 64:
                last = indices[position]
                position += 1
            self.store.file.event("l1_update")
            self.store.write_words(self.store.header.l1_table_offset, self.l1, first, last + 1)

    def replace(self, l1: array[int]) -> None:
        """Use another L1 table, which is on disk as it is here. No table differs from the disk."""
        self.l1 = l1
        self.changed.clear()
        self._cache.clear()

    def drop_clean(self) -> None:
        """Forget tables that do not differ from the disk: something else may have changed it."""
        for index in [index for index, table in self._cache.items() if not table.dirty]:
            del self._cache[index]

    def forget_empty(self) -> bool:
        """Do without tables in which nothing is and at which nothing on disk points; returns whether there were any."""
        assert self.allocator is not None
        found = [
            index
            for index, table in self._cache.items()
            if not table.linked and not any(table.entries) and not (table.bitmaps and any(table.bitmaps))
        ]
        for index in found:
            offset = self._cache.pop(index).offset
            # The disk may have an entry for a table that was given up.
            self.l1[index] = 0
            self.allocator.metadata.remove(offset >> self.geometry.cluster_bits, 1)
            self.allocator.cancel(offset >> self.geometry.cluster_bits, 1)
        return bool(found)

    def trim(self) -> None:
        """Bring the cache back to its size. Everything is clean."""
        while len(self._cache) > self._limit:
            for old, table in self._cache.items():
                if not table.dirty:
                    del self._cache[old]
                    break
            else:
                return

    def remove(self, index: int, *, requested: bool = False) -> None:
        """Take away the L2 table of L1 entry *index*, which holds nothing any more.

        *requested*: the host may have its space.
        """
        assert self.allocator is not None
        offset = self.l1[index] & OFFSET_MASK
        self.l1[index] = 0
        self.changed.add(index)
        self._cache.pop(index, None)
        self.allocator.free(offset >> self.geometry.cluster_bits, 1, requested=requested)
