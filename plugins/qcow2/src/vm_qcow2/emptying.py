"""Forgetting all guest data of an image; giving back to the host what no reference count holds."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .features import DIRTY
from .refcounts import decode, encode

if TYPE_CHECKING:
    from .image import Qcow2


def empty(image: Qcow2) -> None:
    """Every cluster is unallocated again, with no L2 table left; the file ends where the metadata does."""
    if _simple(image):
        _start_anew(image)
        return
    image.writer.drop(0, image.size, zero=False, unallocated_too=False, requested=False)
    image.order.write_back()
    for index, entry in enumerate(image.tables.l1):
        if entry:
            image.tables.remove(index)
    image.order.write_back()
    trim(image)


def _l1_clusters(image: Qcow2) -> int:
    return -(-len(image.tables.l1) * 8 // image.cluster_size)


def _simple(image: Qcow2) -> bool:
    """Whether nothing but guest data and its tables is in the image, so that these can be laid out anew at its start.

    A mark in the header (version 3) tells everybody that reference counts are not right meanwhile.
    """
    header = image.header
    return (
        header.version >= 3
        and not header.nb_snapshots
        and not header.crypt_method
        and not image.has_data_file
        and not header.autoclear_features
        and 3 + _l1_clusters(image) <= image.geometry.refblock_entries
    )


def _start_anew(image: Qcow2) -> None:
    """Lay the image out as if it had just been made: header, refcount table, one block, L1 table.

    At every moment the image on disk is whole, or marked as one whose reference counts have to be counted again.
    """
    store = image.store
    image.order.write_back()
    was_dirty = bool(store.header.incompatible_features & DIRTY)
    store.set_dirty(True)
    store.barrier()
    try:
        _write_anew(image, 3 + _l1_clusters(image), keep_mark=was_dirty)
    except BaseException:
        # The tables in memory are not those on disk any more: whoever opens the image next counts again.
        store.corrupt = True
        raise
    image.start_anew()


def _write_anew(image: Qcow2, used: int, *, keep_mark: bool) -> None:
    """Write the *used* clusters of an empty image, and cut off the rest of the file. The mark is in the header."""
    store, header, file, cluster_size = image.store, image.header, image.file, image.cluster_size
    # No guest data from here on. What the old tables took is leaked.
    file.event("l1_update")
    store.write(header.l1_table_offset, bytes(len(image.tables.l1) * 8))
    store.barrier()
    # The new structures' place holds zeroes before anything points there; no reference count is believed any more.
    file.event("empty_image_prepare")
    file.zero(cluster_size, (used - 1) * cluster_size)
    store.barrier()
    file.event("reftable_update")
    header.l1_table_offset = 3 * cluster_size
    header.refcount_table_offset = cluster_size
    header.refcount_table_clusters = 1
    # These three lie beside each other, in one sector.
    store.write_header("l1_table_offset", "refcount_table_clusters")
    store.barrier()
    file.event("refblock_alloc")
    counts = decode(bytes(cluster_size), image.geometry.refcount_bits)
    for cluster in range(used):
        counts[cluster] = 1
    store.write(2 * cluster_size, encode(counts, image.geometry.refcount_bits))
    store.write_words(cluster_size, array("Q", (2 * cluster_size,)))
    store.barrier()
    file.truncate(used * cluster_size)
    if not keep_mark:
        store.set_dirty(False)
    store.barrier()


def trim(image: Qcow2) -> int:
    """Cut off the end of the file, where every cluster is free; returns the bytes gained. Everything is stable."""
    end = last_used(image) + 1 << image.geometry.cluster_bits
    size = image.file.size
    if end >= size:
        return 0
    image.file.truncate(end)
    image.allocator.fresh_from = end >> image.geometry.cluster_bits
    return size - end


def reclaim(image: Qcow2) -> int:
    """Punch holes where clusters are free, and cut off the end of the file; returns the bytes. Everything is stable."""
    bits = image.geometry.cluster_bits
    stop = last_used(image) + 1
    given = 0
    for first, count in free_runs(image, stop):
        image.file.discard(first << bits, count << bits)
        given += count << bits
    return given + trim(image)


def free_runs(image: Qcow2, stop: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the free clusters below *stop*."""
    refcounts, per_block = image.refcounts, image.geometry.refblock_entries
    start = -1
    cluster = 0
    while cluster < stop:
        block = refcounts.block(cluster >> image.geometry.refblock_bits)
        end = min(cluster - cluster % per_block + per_block, stop)
        if block is None:
            start = cluster if start < 0 else start
        else:
            counts = block.counts
            for at in range(cluster % per_block, cluster % per_block + end - cluster):
                if not counts[at]:
                    if start < 0:
                        start = cluster - cluster % per_block + at
                elif start >= 0:
                    yield start, cluster - cluster % per_block + at - start
                    start = -1
        cluster = end
    if start >= 0:
        yield start, stop - start


def last_used(image: Qcow2) -> int:
    """The number of the last cluster with a reference."""
    refcounts = image.refcounts
    for index in range(len(refcounts.table) - 1, -1, -1):
        block = refcounts.block(index)
        if block is None:
            continue
        counts = block.counts
        empty_ = bytes(len(counts) * counts.itemsize)
        if counts.tobytes() == empty_:
            continue
        for at in range(len(counts) - 1, -1, -1):
            if counts[at]:
                return (index << image.geometry.refblock_bits) + at
    return 0
