"""Setting host space aside for guest clusters before anybody writes them.

* ``metadata`` enters a host cluster for every guest cluster; the file is as long as the whole disk, and empty there.
* ``falloc`` and ``full`` do the same, and the file system sets the space aside or is written zeroes. Refcount
  structures come first, then all data in one piece, then the L2 tables.

The clusters lie in the file before anything points at them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vm_core.block.mapping import Allocation

from .emptying import last_used

if TYPE_CHECKING:
    from .image import Qcow2

#: Guest bytes that are entered at a time.
STEP = 1 << 30


def preallocate(image: Qcow2, start: int, end: int, mode: str, *, used: bool = False) -> None:
    """Give every guest cluster from *start* to *end* that has none a place of its own.

    *used*: with space set aside that reads as zeroes, subclusters are in use, to hide a backing image.
    """
    if start >= end:
        return
    if mode in ("falloc", "full") and not image.geometry.external:
        if not _blank(image, start):
            start = min(-(-start >> image.geometry.cluster_bits) << image.geometry.cluster_bits, end)
        if start < end:
            _in_one_piece(image, start, end, mode, used)
    else:
        if image.backing_reference is not None:
            # The cluster that the image ended in may show the backing image's bytes: it is filled when it is written.
            start = min(-(-start >> image.geometry.cluster_bits) << image.geometry.cluster_bits, end)
        _metadata(image, start, end)
        if image.geometry.external and mode in ("falloc", "full"):
            image.data.reserve(start, end - start, full=mode == "full")


def _blank(image: Qcow2, offset: int) -> bool:
    """Whether nothing is in the guest cluster around *offset*, and nothing shows through."""
    table = image.tables.get(offset >> image.geometry.guest_bits)
    index = offset >> image.geometry.cluster_bits & image.geometry.l2_entries - 1
    return image.backing_reference is None and (table is None or not table.entries[index])


def _metadata(image: Qcow2, start: int, end: int) -> None:
    bits = image.geometry.cluster_bits
    offset = start
    last = 0
    while offset < end:
        length = min(STEP, end - offset)
        allocations = image.allocate(offset, length)
        fresh = [one for one in allocations if one.fresh]
        if not image.geometry.external:
            last = max([last, *[one.host + one.length for one in allocations]])
            size = -(-last >> bits) << bits
            if image.file.size < size:
                image.file.truncate(size)
        _enter(image, fresh)
        offset += length


def _in_one_piece(image: Qcow2, start: int, end: int, mode: str, used: bool) -> None:
    geometry, allocator = image.geometry, image.allocator
    bits = geometry.cluster_bits
    first = start >> bits
    count = -(-end >> bits) - first
    image.order.write_back()
    # At most so many L2 tables are new; where the range begins, one may be there in part.
    tables = -(-count // geometry.l2_entries) + 1
    host = allocator.cover(last_used(image) + 1, count + tables)
    image.file.reserve(host << bits, count << bits, full=mode == "full")
    allocator.take(host, count)
    while count:
        index = first & geometry.l2_entries - 1
        step = min(count, geometry.l2_entries - index)
        image.order.relieve()
        one = Allocation(first << bits, step << bits, image.data, host << bits, True)
        if used:
            image.commit([one])
        else:
            _enter(image, [one])
        first, host, count = first + step, host + step, count - step


def _enter(image: Qcow2, allocations: list[Allocation]) -> None:
    """Make them part of the tables; of subclusters, nothing is in use."""
    bitmaps = {}
    if image.geometry.extended:
        bits = image.geometry.cluster_bits
        for one in allocations:
            first = one.offset >> bits
            after = (one.offset + one.length - 1 >> bits) + 1
            for cluster in range(first, after):
                table = image.tables.writable(cluster >> image.geometry.l2_bits)
                assert table.bitmaps is not None
                bitmaps[cluster] = table.bitmaps[cluster & image.geometry.l2_entries - 1]
    image.commit(allocations)
    for cluster, bitmap in bitmaps.items():
        table = image.tables.writable(cluster >> image.geometry.l2_bits)
        assert table.bitmaps is not None
        table.bitmaps[cluster & image.geometry.l2_entries - 1] = bitmap
