"""Setting host space aside for guest clusters before anybody writes them.

* ``metadata`` enters a host cluster for every guest cluster; the file is as long as the whole disk, and empty there.
* ``falloc`` and ``full`` do the same, and the file system sets the space aside or is written zeroes. Refcount
  structures come first, then all data in one piece, then the L2 tables.

The clusters lie in the file before anything points at them. An image that ended within a cluster holds something there
already: what the guest reads of it goes along to where that cluster is put.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vm_core.block.mapping import Allocation
from vm_core.block.resize import set_aside

from .emptying import last_used
from .entries import bitmap_range
from .geometry import COMPRESSED
from .told import told

if TYPE_CHECKING:
    from .image import Qcow2

#: Guest bytes that are entered at a time.
STEP = 1 << 30

#: What the guest reads: offset, length.
Read = Callable[[int, int], bytes]


def preallocate(image: Qcow2, start: int, end: int, mode: str, *, used: bool = False, read: Read | None = None) -> None:
    """Give every guest cluster from *start* to *end* that has none a place of its own.

    *used*: with space set aside that reads as zeroes, subclusters are in use, to hide a backing image. *read* is needed
    where *start* lies within a cluster.
    """
    if mode in ("falloc", "full") and not image.geometry.external:
        _in_one_piece(image, start, end, mode, used, read)
        with told("Failed to update L2 tables"):
            image.order.write_back()
    else:
        if start < end:
            with told("Allocating clusters failed"):
                _metadata(image, start, end, read)
                image.order.write_back()
            if image.geometry.external and mode in ("falloc", "full"):
                with told("Failed to resize data file", nested=True):
                    set_aside(image.data, start, end - start, full=mode == "full")
        with told("Failed to flush the preallocated area to disk"):
            image.order.write_back()


def _metadata(image: Qcow2, start: int, end: int, read: Read | None) -> None:
    offset = start
    while offset < end:
        length = min(STEP, end - offset)
        allocations = image.allocate(offset, length)
        fresh = [one for one in allocations if one.fresh]
        if not image.geometry.external:
            last = max(one.host + one.length for one in allocations)
            if image.file.size < last:
                image.file.truncate(last)
        for one in fresh:
            _fill(image, one, start, end, read)
        _enter(image, fresh, start)
        offset += length


def _fill(image: Qcow2, one: Allocation, start: int, end: int, read: Read | None) -> None:
    """Have an allocation for what is gained from *start* to *end* hold what the guest is to read there."""
    low, high = max(one.offset, start), min(one.offset + one.length, end)
    if one.offset < low:
        assert read is not None
        one.storage.pwrite(one.host, read(one.offset, low - one.offset))
    if not one.zeroed and not image.geometry.external and image.encryption is None:
        # Space that was something else before. QEMU leaves it at that.
        one.storage.zero(one.host + low - one.offset, high - low, unmap=True)
    rest = one.offset + one.length - high
    if rest:
        one.storage.pwrite(one.host + high - one.offset, bytes(rest))


def _in_one_piece(image: Qcow2, start: int, end: int, mode: str, used: bool, read: Read | None) -> None:
    geometry, allocator = image.geometry, image.allocator
    bits = geometry.cluster_bits
    first = start >> bits
    count = -(-end >> bits) - first
    head = start - (first << bits)
    former = b""
    if head:
        assert read is not None
        former = read(first << bits, head)
    with told("Failed to resize refcount structures"):
        image.order.write_back()
    # At most so many L2 tables are new; where the range begins, one may be there in part.
    tables = -(-count // geometry.l2_entries) + 1
    with told("Failed to resize refcount structures"):
        host = allocator.cover(last_used(image) + 1, count + tables)
    if count:
        stale = min(image.file.size - (host << bits), count << bits)
        with told("Failed to resize underlying file", nested=True):
            set_aside(image.file, host << bits, count << bits, full=mode == "full")
            if stale > 0 and mode == "falloc":
                # The file goes on behind what is in use.
                image.file.zero(host << bits, stale)
    if former:
        image.storage(first << bits, host << bits).pwrite(host << bits, former)
    allocator.take(host, count)
    while count:
        index = first & geometry.l2_entries - 1
        step = min(count, geometry.l2_entries - index)
        with told("Failed to update L2 tables"):
            image.order.relieve()
        one = Allocation(first << bits, step << bits, image.data, host << bits, True)
        if used:
            image.commit([one])
        else:
            _enter(image, [one], start)
        first, host, count = first + step, host + step, count - step


def _enter(image: Qcow2, allocations: list[Allocation], start: int) -> None:
    """Make them part of the tables; of subclusters, those are in use that were, and what lay packed before *start*."""
    bitmaps = {}
    if image.geometry.extended:
        bits = image.geometry.cluster_bits
        for one in allocations:
            first = one.offset >> bits
            after = (one.offset + one.length - 1 >> bits) + 1
            for cluster in range(first, after):
                table = image.tables.writable(cluster >> image.geometry.l2_bits)
                assert table.bitmaps is not None
                index = cluster & image.geometry.l2_entries - 1
                bitmaps[cluster] = table.bitmaps[index]
                if table.entries[index] & COMPRESSED:
                    bitmaps[cluster] = bitmap_range(0, -(-(start - (cluster << bits)) >> image.geometry.unit_bits))
    image.commit(allocations)
    for cluster, bitmap in bitmaps.items():
        table = image.tables.writable(cluster >> image.geometry.l2_bits)
        assert table.bitmaps is not None
        table.bitmaps[cluster & image.geometry.l2_entries - 1] = bitmap
