"""The refcount table and refcount blocks (*Host cluster management*).

A block's entries are kept as an array of numbers in the host's order; widths below a byte are spread to a byte each
while in memory. Only the cache is here: who changes counts in which order is decided in ``allocator.py`` and
``order.py``.

Rules of this module: a block reaches the disk before the table entry that points at it (:meth:`Refcounts.settle`); and
a table entry on disk is never changed from one block to another.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict

from vm_core.block.notices import notice
from vm_core.block.tables import dump, load

from .geometry import MAX_REFTABLE_BYTES, Geometry
from .header import check_table
from .store import Store, alternate

_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


def decode(data: bytes, bits: int) -> array[int]:
    """The counts in a refcount block's bytes."""
    if bits >= 8:
        return load(_CODES[bits], data, "big")
    # Bit 0 of the field is the least significant: entry 0 is in a byte's low bits. All bytes at once, as one number.
    spread = bytearray(len(data) * 8 // bits)
    number = int.from_bytes(data, "little")
    mask = int.from_bytes(bytes([(1 << bits) - 1]) * len(data), "little")
    per_byte = 8 // bits
    for lane in range(per_byte):
        spread[lane::per_byte] = (number >> lane * bits & mask).to_bytes(len(data), "little")
    return array("B", bytes(spread))


def encode(counts: array[int], bits: int) -> bytes:
    """The bytes for whole bytes' worth of counts."""
    if bits >= 8:
        return dump(counts, "big")
    raw = counts.tobytes()
    per_byte = 8 // bits
    number = 0
    for lane in range(per_byte):
        number |= int.from_bytes(raw[lane::per_byte], "little") << lane * bits
    return number.to_bytes(len(raw) // per_byte, "little")


class RefcountBlock:
    """One block in memory. Entries from *low* to below *high* differ from the disk (none if low >= high)."""

    __slots__ = ("counts", "high", "low", "offset")

    def __init__(self, offset: int, counts: array[int]) -> None:
        self.offset = offset
        self.counts = counts
        self.low, self.high = len(counts), 0

    @property
    def dirty(self) -> bool:
        return self.low < self.high

    def touch(self, low: int, high: int) -> None:
        self.low = min(self.low, low)
        self.high = max(self.high, high)

    def clean(self) -> None:
        self.low, self.high = len(self.counts), 0


class Refcounts:
    """Refcounts of all host clusters. Cluster numbers are host offsets divided by the cluster size."""

    def __init__(self, store: Store, *, check: bool = False) -> None:
        self.store = store
        geometry = store.geometry
        self.geometry: Geometry = geometry
        header = store.header
        words = geometry.cluster_size // 8
        count = header.refcount_table_clusters * words
        check_table(
            store.name, header, header.refcount_table_offset, count, 8, MAX_REFTABLE_BYTES, "Reference count table"
        )
        if not count and not check:
            raise store.error("Image does not contain a reference count table")
        length = store.file.size
        if header.refcount_table_offset >= length and not check and not store.readonly:
            # It would count nothing, and the first allocation would find the header's cluster free.
            from vm_core.sizes import human

            raise store.error(
                f"refcount table at {header.refcount_table_offset:#x} lies outside the file ({human(length)}); "
                "check -r all makes a new one"
            )
        # As everywhere, what lies past the end of the file is zero.
        self.table = load("Q", store.file.pread(header.refcount_table_offset, count * 8), "big")
        #: Table entries that are not on disk yet.
        self.unlinked: set[int] = set()
        #: An attempt was made to write those.
        self.linking = False
        self._blocks: OrderedDict[int, RefcountBlock] = OrderedDict()
        self._cache_limit = 4
        self._shift = geometry.refblock_bits
        self._index_mask = geometry.refblock_entries - 1
        self._watched = store.file.watched

    def _tell_change(self, index: int) -> None:
        """Tell who watches that a count in block *index* is about to change."""
        self.store.file.event("refblock_alloc")
        if self.table[index]:
            self.store.file.event("refblock_load")

    def limit(self, cache_bytes: int) -> None:
        """Keep blocks of about so many bytes in memory."""
        entry_bytes = max(self.geometry.refcount_bits, 8) // 8
        self._cache_limit = max(4, cache_bytes // (self.geometry.refblock_entries * entry_bytes))

    def block(self, index: int) -> RefcountBlock | None:
        """The block number *index*; None where the table has none."""
        found = self._blocks.get(index)
        if found is not None:
            self._blocks.move_to_end(index)
            return found
        # The reserved bits are for checks to tell of.
        offset = self.table[index] & ~511 if index < len(self.table) else 0
        if not offset:
            return None
        if offset & self.geometry.cluster_size - 1:
            raise self.store.mark_corrupt(
                f"Refblock offset {alternate(offset)} unaligned (reftable index: {alternate(index)})"
            )
        size = self.geometry.cluster_size
        data = self.store.file.pread(offset, size) if offset + size < 1 << 63 else bytes(size)
        return self.insert(index, RefcountBlock(offset, decode(data, self.geometry.refcount_bits)))

    def insert(self, index: int, block: RefcountBlock) -> RefcountBlock:
        """Keep *block* as number *index*; clean blocks that were not used for long make room."""
        self._blocks[index] = block
        if len(self._blocks) > self._cache_limit:
            for old, candidate in self._blocks.items():
                if not candidate.dirty and candidate is not block:
                    del self._blocks[old]
                    break
        return block

    def add_block(self, index: int, offset: int) -> RefcountBlock:
        """A new, empty block at host *offset*, not linked on disk before it is written."""
        block = RefcountBlock(offset, decode(bytes(self.geometry.cluster_size), self.geometry.refcount_bits))
        block.touch(0, len(block.counts))
        self.table[index] = offset
        self.unlinked.add(index)
        return self.insert(index, block)

    def get(self, cluster: int) -> int:
        """The count of one cluster."""
        block = self.block(cluster >> self._shift)
        return 0 if block is None else block.counts[cluster & self._index_mask]

    def all_one(self, first: int, count: int) -> bool:
        """Whether each of *count* clusters has refcount one."""
        while count:
            block = self.block(first >> self._shift)
            if block is None:
                return False
            low = first & self._index_mask
            piece = block.counts[low : low + count]
            if piece != array(piece.typecode, (1,)) * len(piece):
                return False
            first += len(piece)
            count -= len(piece)
        return True

    def any_one(self, first: int, count: int) -> bool:
        """Whether any of *count* clusters has refcount one. All their blocks are looked at."""
        found = False
        while count:
            if self._watched:
                self._tell_change(first >> self._shift)
            block = self.block(first >> self._shift)
            low = first & self._index_mask
            step = min(count, self._index_mask + 1 - low)
            found = found or (block is not None and 1 in block.counts[low : low + step])
            first += step
            count -= step
        return found

    def set_run(self, first: int, count: int, value: int) -> None:
        """Set the counts of *count* clusters. Their blocks exist."""
        while count:
            if self._watched:
                self._tell_change(first >> self._shift)
            block = self.block(first >> self._shift)
            assert block is not None
            low = first & self._index_mask
            high = min(low + count, len(block.counts))
            block.counts[low:high] = array(block.counts.typecode, (value,)) * (high - low)
            block.touch(low, high)
            first += high - low
            count -= high - low

    def decrement(self, first: int, count: int) -> list[int]:
        """One reference less to each of *count* clusters; returns those that are free now.

        A count that is zero already cannot go down; that is told and passed over, as by QEMU.
        """
        freed: list[int] = []
        wrong = False
        for cluster in range(first, first + count):
            block = self.block(cluster >> self._shift)
            index = cluster & self._index_mask
            value = 0 if block is None else block.counts[index]
            if block is None or not value:
                wrong = True
                continue
            block.counts[index] = value - 1
            block.touch(index, index + 1)
            if value == 1:
                freed.append(cluster)
        if wrong:
            notice("qcow2_free_clusters failed: Invalid argument")
        return freed

    # To disk

    @property
    def dirty(self) -> bool:
        """Whether anything differs from the disk."""
        return bool(self.unlinked) or any(block.dirty for block in self._blocks.values())

    @property
    def pressure(self) -> bool:
        """Whether more changed blocks are kept than the cache should hold."""
        return len(self._blocks) > self._cache_limit

    def write_blocks(self) -> list[RefcountBlock]:
        """Write what differs of the blocks; returns them, to be marked clean once that is stable."""
        bits = self.geometry.refcount_bits
        # Whole 64-byte pieces are whole bytes at any width, and sectors are better written at once.
        grain = min(max(512 * 8 // bits, 1), self.geometry.refblock_entries)
        written = []
        for index, block in self._blocks.items():
            if block.dirty:
                low = block.low - block.low % grain
                high = min(-(-block.high // grain) * grain, len(block.counts))
                self.store.file.event("refblock_alloc_write" if index in self.unlinked else "refblock_update_part")
                self.store.write(block.offset + low * bits // 8, encode(block.counts[low:high], bits))
                written.append(block)
        return written

    def write_links(self) -> None:
        """Write the table entries of new blocks, which are stable by now."""
        entries = sorted(self.unlinked)
        if entries:
            self.linking = True
            self.store.file.event("refblock_alloc_hookup")
            self.store.file.event("reftable_update")
            self.store.write_words(self.store.header.refcount_table_offset, self.table, entries[0], entries[-1] + 1)

    def linked(self) -> None:
        """The table on disk is the one here."""
        self.unlinked.clear()
        self.linking = False

    def settle(self) -> None:
        """Bring every count to stable storage. Increments of what nothing points at yet: safe at any time."""
        written = self.write_blocks()
        if written:
            self.store.barrier()
        for block in written:
            block.clean()
        if self.unlinked:
            self.write_links()
            self.store.barrier()
            self.linked()

    def forget(self) -> None:
        """Drop clean blocks, after something else changed the disk."""
        for index in [index for index, block in self._blocks.items() if not block.dirty]:
            del self._blocks[index]

    def replace(self, table: array[int]) -> None:
        """*table* is the refcount table on disk from now on; nothing of the former one is kept."""
        self.table = table
        self.linked()
        self._blocks.clear()

    def forget_changes(self) -> None:
        """Drop all blocks that differ from the disk: what was changed in them is given up."""
        for index in [index for index, block in self._blocks.items() if block.dirty]:
            del self._blocks[index]

    def drop(self, index: int) -> None:
        """Undo :meth:`add_block`."""
        self._blocks.pop(index, None)
        self.unlinked.discard(index)
        if index < len(self.table):
            self.table[index] = 0

    def trim(self) -> None:
        """Bring the cache back to its size."""
        for index in list(self._blocks):
            if len(self._blocks) <= self._cache_limit:
                return
            if not self._blocks[index].dirty:
                del self._blocks[index]
