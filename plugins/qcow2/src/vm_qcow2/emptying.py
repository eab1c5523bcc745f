"""Forgetting all guest data of an image; giving back to the host what no reference count holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .image import Qcow2


def empty(image: Qcow2) -> None:
    """Every cluster is unallocated again, with no L2 table left; the file ends where the metadata does."""
    image.writer.drop(0, image.size, zero=False, unallocated_too=False, requested=False)
    image.order.write_back()
    for index, entry in enumerate(image.tables.l1):
        if entry:
            image.tables.remove(index)
    image.order.write_back()
    trim(image)


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
    for first, count in _free_runs(image, stop):
        image.file.discard(first << bits, count << bits)
        given += count << bits
    return given + trim(image)


def _free_runs(image: Qcow2, stop: int) -> Iterator[tuple[int, int]]:
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
