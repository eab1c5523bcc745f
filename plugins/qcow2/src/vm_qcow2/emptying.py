"""Forgetting all guest data of an image, and giving the end of the file back."""

from __future__ import annotations

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
