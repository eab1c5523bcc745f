"""Making the refcount structures of an image anew, where the old ones cannot be used.

New blocks and a new table go to clusters to which nothing points; only when they are stable the header says so. The old
structures stay as they were, so a power cut leaves one or the other; after that they are leaked, and given back.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING

from vm_core.errors import BlockError

from .geometry import MAX_REFTABLE_BYTES
from .overlap import REFCOUNT_BLOCK, REFCOUNT_TABLE
from .refcounts import encode
from .references import PIECE, References

if TYPE_CHECKING:
    from .image import Qcow2


def rebuild(image: Qcow2, references: References) -> None:
    """Write refcounts that say what *references* counted, themselves included. Raises BlockError."""
    store, geometry = image.store, image.geometry
    words = geometry.cluster_size // 8
    for entry in image.refcounts.table:
        # The old blocks stay as they are until the header has left them, also those that could not be counted.
        cluster = (entry & ~511) >> geometry.cluster_bits
        if 0 < cluster < references.clusters and not references.get(cluster):
            references.add(cluster, 1)
    table: array[int] = array("Q")
    blocks = _Blocks(image, references, table)
    blocks.write(0, references.clusters)
    clusters, start = 0, 0
    while True:
        # The table is counted, too; that may need another block, and with it a larger table.
        needed = -(-len(table) // words)
        if needed == clusters:
            break
        if needed * geometry.cluster_size > MAX_REFTABLE_BYTES:
            raise BlockError.of(errno.EFBIG)
        clusters = needed
        start = references.take(clusters, 0)
        blocks.free = 0
        blocks.write(start, start + clusters)
    table.extend(array("Q", bytes(8 * (clusters * words - len(table)))))
    store.write_words(start << geometry.cluster_bits, table)
    store.barrier()
    header = store.header
    # Nothing protects the places of the former structures from now on.
    bits = geometry.cluster_bits
    image.metadata.remove(header.refcount_table_offset >> bits, header.refcount_table_clusters)
    for entry in image.refcounts.table:
        image.metadata.remove(entry >> bits, 1)
    header.refcount_table_offset = start << geometry.cluster_bits
    header.refcount_table_clusters = clusters
    store.write_header("refcount_table_offset", "refcount_table_clusters")
    store.barrier()
    image.refcounts.replace(table)
    image.metadata.register(header.refcount_table_offset, len(table) * 8, REFCOUNT_TABLE)
    image.metadata.register_tables(table, REFCOUNT_BLOCK)
    image.allocator.start_at(0)
    image.allocator.fresh_from = -(-store.file.size >> geometry.cluster_bits)


class _Blocks:
    """New refcount blocks, entered into *table*."""

    def __init__(self, image: Qcow2, references: References, table: array[int]) -> None:
        self.store = image.store
        self.geometry = image.geometry
        self.references = references
        self.table = table
        #: Where the search for free clusters goes on.
        self.free = 0

    def write(self, first: int, end: int) -> None:
        """Write the block of each cluster from *first* to *end* to which something points."""
        per_block = self.geometry.refblock_entries
        cluster = self._next_used(first, end)
        while cluster < end:
            index = cluster // per_block
            start = index * per_block
            # Blocks before this one are written already: they must not change any more.
            self.free = max(self.free, start)
            if index >= len(self.table):
                self.table.extend(array("Q", bytes(8 * (index + 1 - len(self.table)))))
            if not self.table[index]:
                place = self.references.take(1, self.free)
                self.free = place
                # It has to be counted as well, wherever it lies.
                end = max(end, place + 1)
                self.table[index] = place << self.geometry.cluster_bits
            counts = self.references.slice(start, per_block)
            self.store.write(self.table[index], encode(counts, self.geometry.refcount_bits))
            cluster = self._next_used(start + per_block, end)

    def _next_used(self, cluster: int, end: int) -> int:
        """The first cluster from *cluster* on to which something points; *end* where there is none before it."""
        while cluster < end:
            number, low = divmod(cluster, PIECE)
            if number not in self.references:
                cluster = (number + 1) * PIECE
                continue
            piece = self.references.piece(number)
            for position in range(low, PIECE):
                if piece[position]:
                    return min(number * PIECE + position, end)
            cluster = (number + 1) * PIECE
        return end
