"""Changing the virtual size.

The order on disk. Growing: a larger L1 table is stable, then the header points at it, then the old one is given back;
what earlier, interrupted shrinking left beyond the old end is dropped; last the header says the new size. Shrinking:
the header says the new size first, then what lies beyond is dropped.
"""

from __future__ import annotations

import errno
from array import array
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from vm_core.block.mapping import Kind
from vm_core.errors import BlockError, UsageError

from .emptying import trim
from .geometry import MAX_L1_BYTES
from .overlap import ACTIVE_L1
from .preallocation import Read, preallocate
from .recovery import give_back
from .told import told

if TYPE_CHECKING:
    from .image import Qcow2


def resize(
    image: Qcow2, size: int, *, preallocation: str = "off", hide: bool = False, read: Read | None = None
) -> None:
    """Make *image* *size* bytes long; *preallocation* of what it gains. Raises UsageError where the format cannot.

    *hide*: a backing image would show through what is gained. *read*: what the guest reads, needed to preallocate.
    """
    header = image.header
    image.store.check_writable()
    if not check_size(image, size, preallocation):
        return
    with image.bitmap_set.resizing() if image.bitmaps() else nullcontext():
        if size < header.size:
            _shrink(image, size)
        else:
            _grow(image, size, preallocation, hide, read)


def check_size(image: Qcow2, size: int, preallocation: str = "off") -> bool:
    """Raise UsageError where *image* cannot be made *size* bytes long; returns whether it is not so long yet."""
    if size % 512:
        raise UsageError("The new size must be a multiple of 512")
    if size == image.size:
        return False
    if size < image.size and preallocation != "off":
        raise UsageError("Preallocation can't be used for shrinking an image")
    if image.snapshot_table.entries and image.geometry.version < 3:
        raise UsageError("Can't resize a v2 image which has snapshots")
    return True


def _grow(image: Qcow2, size: int, preallocation: str, hide: bool, read: Read | None) -> None:
    store = image.store
    header = store.header
    former, former_data = header.size, image.data.size
    if image.raw_data and preallocation == "off":
        # Whatever the data file holds there is what the guest reads.
        preallocation = "metadata"
    try:
        with told("Failed to grow the L1 table"):
            prepare_growth(image, size)
        if store.geometry.external and (preallocation == "off" or image.data.size < size):
            with told("Failed to resize data file"):
                image.data.truncate(size)
        if preallocation != "off":
            # The size follows: what is interrupted half way is dropped when the image grows the next time.
            header.size = size
            try:
                preallocate(image, former, size, preallocation, used=hide, read=read)
            finally:
                header.size = former
        with told("Failed to update the image size"):
            store.update_header("size", size=size)
        image.unseen = 0
    except UsageError:
        raise  # nothing was begun
    except BaseException:
        if store.geometry.external and image.data.size > former_data:
            with suppress(OSError):
                image.data.truncate(former_data)
        give_back(image, former)
        raise


def prepare_growth(image: Qcow2, size: int) -> None:
    """See to it that nothing but the header has to say that *image* has *size* bytes, all that it gains unallocated."""
    store = image.store
    entries = store.geometry.l1_entries_for(size)
    if entries * 8 > MAX_L1_BYTES:
        limit = (MAX_L1_BYTES // 8) << store.geometry.guest_bits
        raise UsageError(f"with clusters of {image.cluster_size} bytes a qcow2 image has at most {limit} bytes")
    if entries > len(image.tables.l1):
        grow_l1(image, entries)
    drop_from(image, image.size)
    image.order.write_back()


def _shrink(image: Qcow2, size: int) -> None:
    store = image.store
    unused_blocks(image)
    former = store.header.size
    image.order.write_back()
    with told("Failed to update the image size"):
        store.update_header("size", size=size)
    image.unseen = 0
    try:
        with told("Failed to discard cropped clusters"):
            _clear_tail(image, size)
            drop_from(image, size, former)
            image.order.write_back()
        if store.geometry.external:
            image.data.truncate(size)
        drop_blocks(image, unused_blocks(image))
        trim(image)
    except BaseException:
        give_back(image, size)
        raise


def unused_blocks(image: Qcow2) -> list[int]:
    """Numbers of the refcount blocks that count nothing but themselves. Raises BlockError where one makes no sense."""
    refcounts, store, geometry = image.refcounts, image.store, image.geometry
    failed = BlockError.of(errno.EIO, "Failed to discard unused refblocks: Input/output error")
    unused: list[int] = []
    uncovered = 0
    for index, entry in enumerate(refcounts.table):
        offset = entry & ~511
        if not offset:
            continue
        if offset & geometry.cluster_size - 1:
            store.mark_corrupt(f"Cannot get entry from refcount block cache: Offset {offset:#x} is unaligned")
            raise failed
        cluster = offset >> geometry.cluster_bits
        own = cluster >> geometry.refblock_bits
        block = refcounts.block(index)
        assert block is not None
        used = len(block.counts) - block.counts.count(0)
        if used > (own == index):
            continue
        if own != index and (own >= len(refcounts.table) or not refcounts.table[own]):
            uncovered = offset
        unused.append(index)
    if uncovered:
        # The table is rid of them all the same.
        for index in unused:
            refcounts.drop(index)
            refcounts.unlinked.add(index)
        refcounts.settle()
        store.mark_corrupt(f"Refblock at {uncovered:#x} is not covered by the refcount structures")
        raise failed
    return unused


def drop_blocks(image: Qcow2, numbers: list[int]) -> None:
    """Give back refcount blocks that count nothing but themselves, after the table on disk does not name them."""
    refcounts, store, bits = image.refcounts, image.store, image.geometry.cluster_bits
    if not numbers:
        return
    clusters = [refcounts.table[number] >> bits for number in numbers]
    for number in numbers:
        refcounts.drop(number)
        refcounts.unlinked.add(number)
    refcounts.settle()
    for number, cluster in zip(numbers, clusters, strict=True):
        image.metadata.remove(cluster, 1)
        if cluster >> image.geometry.refblock_bits != number:
            for freed in refcounts.decrement(cluster, 1):
                image.allocator.lower(freed)
        else:
            image.allocator.lower(cluster)
    refcounts.settle()
    for cluster in clusters:
        if not refcounts.get(cluster):
            store.discard(cluster << bits, 1 << bits)


def _clear_tail(image: Qcow2, size: int) -> None:
    """Clear what is left of the last cluster beyond *size*, where that needs no other cluster.

    Not every program that makes the image larger again looks after those bytes: the peer does not.
    """
    rest = -size % image.cluster_size
    if rest:
        # Several where the cluster has subclusters.
        for run in image.map(size, rest):
            if run.kind is Kind.DATA and run.writable and run.storage is not None:
                run.storage.zero(run.host, run.length)


def drop_from(image: Qcow2, size: int, former: int = 0) -> None:
    """Give back every cluster wholly beyond *size*, and the L2 tables of which nothing is left.

    An image that shrinks from *former* bytes has every table up to there made first, or copied where it is shared: the
    peer has them for a moment, and they decide where what is made later lies, and how long the file is.
    """
    geometry, tables = image.geometry, image.tables
    start = -(-size >> geometry.cluster_bits) << geometry.cluster_bits
    limit = len(tables.l1) << geometry.guest_bits
    if start >= limit:
        return
    while start < former:
        # The tables that follow may take what this one gives up.
        if image.allocator.reusable:
            image.order.write_back()
        stop = min(former, (start >> geometry.guest_bits) + 1 << geometry.guest_bits)
        image.writer.drop(start, stop - start, zero=False, unallocated_too=False, create=True)
        start = stop
    if start < limit:
        image.writer.drop(start, limit - start, zero=False, unallocated_too=False)
    # What is given up of tables is empty on disk, too, wherever the host does not take the space.
    image.order.write_back()
    for index in range(geometry.l1_entries_for(size), len(tables.l1)):
        if tables.l1[index]:
            tables.remove(index, requested=True)


def grow_l1_for_state(image: Qcow2, end: int) -> None:
    """Let the L1 table reach the guest offset *end*, with room to spare since more will follow."""
    entries = image.geometry.l1_entries_for(end)
    if entries <= len(image.tables.l1):
        return
    grown = max(len(image.tables.l1), 1)
    while grown < entries:
        grown = -(-grown * 3 // 2)
    if grown * 8 > MAX_L1_BYTES:
        raise BlockError.of(errno.EFBIG)
    grow_l1(image, grown)
    image.order.write_back()


def grow_l1(image: Qcow2, entries: int) -> None:
    """Move the L1 table to a place with room for *entries*."""
    store, tables, allocator = image.store, image.tables, image.allocator
    geometry, header = store.geometry, store.header
    # What is on disk and what is in memory must agree, so that the new table points at nothing that is not there.
    image.order.write_back()
    grown = tables.l1 + array("Q", bytes(8 * (entries - len(tables.l1))))
    store.file.event("l1_grow_alloc_table")
    count = -(-entries * 8 >> geometry.cluster_bits)
    old_offset, old_size = header.l1_table_offset, header.l1_size
    first = allocator.allocate_metadata(count, ACTIVE_L1)
    try:
        offset = first << geometry.cluster_bits
        store.file.event("l1_grow_write_table")
        store.write_words(offset, grown)
        # Its last cluster must be whole in the file.
        image.refcounts.settle()
        store.barrier()
    except BaseException:
        image.metadata.remove(first, count)
        allocator.cancel(first, count)
        raise
    if image.order.lazy:
        store.set_dirty(True)
        store.barrier()
    store.file.event("l1_grow_activate_table")
    # Where that fails, nobody knows which table it is: both stay taken.
    store.update_header("l1_size", "l1_table_offset", l1_table_offset=offset, l1_size=entries)
    tables.l1 = grown
    if old_size:
        old_count = -(-old_size * 8 >> geometry.cluster_bits)
        image.metadata.remove(old_offset >> geometry.cluster_bits, old_count)
        allocator.free(old_offset >> geometry.cluster_bits, old_count)
