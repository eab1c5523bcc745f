"""Taking, applying, deleting and loading internal snapshots.

The order on disk. At every instant the guest's disk is what it was or what it will be, each snapshot that the header's
table lists is whole, and no active table has the bit COPIED for what is counted more than once: whoever writes to an
image that a power cut left so does not reach into a snapshot. What a power cut can leave are clusters that are counted
too often, and bits COPIED that are missing.

* *Taking*: the COPIED bits of the active tables are cleared; then a copy of the L1 table (with the bits, as the peer
  has it) and the higher counts are stable; then a new snapshot table; then the header points at it; then the former
  table is given back.
* *Applying*: the higher counts of the snapshot's clusters are stable, and the COPIED bits of its tables are cleared;
  then its L1 entries become the active ones, and its size the image's (:func:`_replace_l1`); then the former active
  ones are counted down, and the COPIED bits set where nobody shares any more.
* *Deleting*: a table without the snapshot is stable, then the header points at it; then what only the snapshot used is
  given back; then the COPIED bits are set where nobody shares any more.
"""

from __future__ import annotations

import errno
import time
from array import array
from contextlib import suppress
from typing import TYPE_CHECKING

from vm_core.block.notices import notice
from vm_core.errors import BlockError, ImageError, UsageError

from .emptying import last_used, trim
from .geometry import COPIED, MAX_SNAPSHOTS, OFFSET_MASK
from .overlap import ACTIVE_L1, ACTIVE_L2, INACTIVE_L1
from .resize import check_size, drop_blocks, grow_l1, prepare_growth, unused_blocks
from .sharing import Tree
from .snapshots import (
    LISTED_NAME,
    Snapshot,
    SnapshotHead,
    discard_table,
    prepare_snapshots,
    shorten,
    switch_snapshots,
)

if TYPE_CHECKING:
    from .image import Qcow2

_L1_KIND = INACTIVE_L1


def create(image: Qcow2, name: str) -> None:
    """Take a snapshot. Raises BlockError; the image is then as it was."""
    store, tables = image.store, image.tables
    header = store.header
    _check(image)
    entries = image.snapshot_table.entries
    if len(entries) >= MAX_SNAPSHOTS:
        raise BlockError.of(errno.EFBIG)
    _settle(image)
    bits = image.geometry.cluster_bits
    now = time.time_ns() // 1000
    count = -(-len(tables.l1) * 8 >> bits)
    first = image.allocator.allocate_metadata(count, _L1_KIND) if count else 0
    snapshot = Snapshot(
        _next_id(entries),
        shorten(name, LISTED_NAME),
        SnapshotHead(
            l1_table_offset=first << bits,
            l1_size=len(tables.l1),
            seconds=now // 1_000_000,
            nanoseconds=now % 1_000_000 * 1000,
        ),
        0,
        header.size,
        0,
    )
    tree = Tree(image, tables.l1, active=True)
    copy = tables.l1[:]
    counted = False
    try:
        tree.mark(shared=True)
        _settle(image)
        if count:
            store.write_words(first << bits, copy)
        tree.count(1)
        counted = True
        _settle(image)
        table = prepare_snapshots(image, [*entries, snapshot])
    except BaseException:
        with suppress(OSError):
            if counted:
                tree.count(-1)
            tree.mark()
        if count:
            discard_table(image, first, count)
        raise
    _give_back(image, [switch_snapshots(image, table)])


def delete(image: Qcow2, name: str | None, id: str | None) -> None:
    """Delete the first snapshot of this *name* and *id*, as far as they are given. Raises ImageError, BlockError."""
    _check(image)
    entries = image.snapshot_table.entries
    snapshot = _find(image, id, name)
    if snapshot is None:
        raise ImageError(image.store.name, "snapshot not found")
    problem = snapshot.l1_problem(image.cluster_size)
    if problem is not None:
        raise problem
    _settle(image)
    l1 = _read_l1(image, snapshot)
    table = prepare_snapshots(image, [one for one in entries if one is not snapshot])
    former = switch_snapshots(image, table)
    bits = image.geometry.cluster_bits
    # Read anew: storage that fails from now on does so before a count has changed, and the clusters are leaked alone.
    image.refcounts.forget()
    try:
        _give_back(image, [former])
    except OSError as error:
        # The snapshot is gone all the same; these clusters are leaked.
        notice(f"qcow2_free_clusters failed: {error.strerror}")
    try:
        freed = _count_down(image, l1)
        own = snapshot.head.l1_table_offset >> bits, -(-len(l1) * 8 >> bits)
        _give_back(image, [own], freed)
    except OSError as error:
        raise _said("Failed to free the cluster and L1 table", error) from error
    try:
        Tree(image, image.tables.l1, active=True).mark()
        _settle(image)
    except OSError as error:
        raise _said("Failed to update snapshot status in disk", error) from error


def apply(image: Qcow2, name: str) -> None:
    """Go back to the snapshot of this id, or else of this name. Raises ImageError, BlockError."""
    if image.bitmaps():
        raise ImageError(image.store.name, "Device has active dirty bitmaps")
    if image.has_data_file:
        raise _load_error(image, BlockError.of(errno.EOPNOTSUPP))
    _check(image)
    table = image.snapshot_table
    snapshot = table.by_id(name) or table.by_name(name)
    if snapshot is None:
        raise _load_error(image, BlockError.of(errno.ENOENT))
    problem = snapshot.l1_problem(image.cluster_size)
    if problem is not None:
        error = _load_error(image, BlockError.of(problem.code))
        error.add_note(str(problem.strerror))
        raise error
    try:
        _apply(image, snapshot)
    except OSError as failure:
        raise _load_error(image, failure) from failure


def _apply(image: Qcow2, snapshot: Snapshot) -> None:
    store, tables = image.store, image.tables
    size, former_size = snapshot.disk_size, image.size
    if check_size(image, size) and size > former_size:
        prepare_growth(image, size)
    elif size < former_size:
        unused_blocks(image)  # raises where they make no sense
    if snapshot.head.l1_size > len(tables.l1):
        grow_l1(image, snapshot.head.l1_size)
    _settle(image)
    l1 = _read_l1(image, snapshot)
    own = array("Q", l1)
    tree = Tree(image, own, active=False)
    # Before anything is changed: no table of the snapshot lies on top of something else.
    image.metadata.register_tables((entry & ~COPIED for entry in own), ACTIVE_L2)
    tree.count(1)
    _settle(image)
    active = {entry & OFFSET_MASK for entry in tables.l1}
    if tree.mark(passing=active):
        store.write_words(snapshot.head.l1_table_offset, own)
    store.barrier()
    former = tables.l1
    new = own + array("Q", bytes(8 * (len(former) - len(own))))
    _replace_l1(image, new, size)
    tables.replace(new)
    if size < former_size:
        former, spare = _shrink_away(image, former, size, former_size)
        _give_back(image, [(cluster, 1) for cluster in spare], _count_down(image, former, size))
    else:
        _give_back(image, [], _count_down(image, former))
    Tree(image, tables.l1, active=True).mark()
    _settle(image)


def load(image: Qcow2, id: str | None, name: str | None) -> None:
    """Show a snapshot's contents from now on. Raises ImageError, UsageError."""
    if not image.readonly:
        raise UsageError("a snapshot can only be looked at while its image is open read-only")
    snapshot = _find(image, id, name)
    if snapshot is None:
        raise ImageError(image.store.name, "Can't find snapshot")
    problem = snapshot.l1_problem(image.cluster_size)
    if problem is not None:
        raise ImageError(image.store.name, str(problem.strerror))
    l1 = _read_l1(image, snapshot)
    missing = image.geometry.l1_entries_for(image.size) - len(l1)
    image.tables.replace(l1 + array("Q", bytes(8 * max(0, missing))))


# Parts


def _check(image: Qcow2) -> None:
    image.store.check_writable()
    if image.has_data_file:
        raise BlockError.of(errno.ENOTSUP)


def _settle(image: Qcow2) -> None:
    """Bring everything to the disk, refcounts of lazy images included."""
    image.order.write_back()
    image.refcounts.settle()


def _next_id(entries: list[Snapshot]) -> str:
    """One more than the highest of the ids, as far as they begin with a number."""
    highest = 0
    for one in entries:
        text = one.id.strip()
        digits = len(text) - len(text.lstrip("0123456789"))
        highest = max(highest, min(int(text[: min(digits, 25)] or 0), (1 << 64) - 1))
    return str((highest + 1) % (1 << 64))


def _find(image: Qcow2, id: str | None, name: str | None) -> Snapshot | None:
    for one in image.snapshot_table.entries:
        if (id is None or one.id == id) and (name is None or shorten(one.name, LISTED_NAME) == name):
            return one
    return None


def _read_l1(image: Qcow2, snapshot: Snapshot) -> array[int]:
    """The entries of a snapshot's L1 table, whose place and size were judged before."""
    head = snapshot.head
    return image.store.read_words(head.l1_table_offset, head.l1_size, _L1_KIND)


def _shrink_away(image: Qcow2, l1: array[int], size: int, former: int) -> tuple[array[int], list[int]]:
    """Count down what lies beyond *size* below *l1*, which nothing on disk uses any more and was of *former* bytes.

    Returns what is left of *l1*, and clusters that have to be given back with that.

    The peer shrinks the image before it does anything else. The tables that it makes for that, and the refcount blocks
    that it gives up, decide which refcount blocks there are in the end: so the same clusters are taken for a moment.
    """
    geometry, allocator, bits = image.geometry, image.allocator, image.geometry.cluster_bits
    position, stop = -(-size >> bits), -(-former >> bits)
    kept = geometry.l1_entries_for(size)
    tree = Tree(image, l1, active=False)
    spare: list[int] = []
    gone = [(entry & OFFSET_MASK) >> bits for entry in l1[kept:] if entry & OFFSET_MASK]
    while position < stop:
        index = position >> geometry.l2_bits
        after = min(stop, index + 1 << geometry.l2_bits)
        if not l1[index] & COPIED:
            made = allocator.allocate_metadata(1, ACTIVE_L2)
            (spare if index < kept else gone).append(made)
        # One table at a time: what it gives up may be where the next one lies.
        _give_back(image, [], tree.count(-1, position, after, tables=False))
        position = after
    freed = tree.count(-1, stop, tables=False)
    for cluster in gone:
        for free in image.refcounts.decrement(cluster, 1):
            image.metadata.remove(free, 1)
            freed.append((free, 1))
    _give_back(image, [], freed)
    drop_blocks(image, unused_blocks(image))
    trim(image)
    return l1[:kept], spare


def _count_down(image: Qcow2, l1: array[int], size: int | None = None) -> list[tuple[int, int]]:
    """Count what is below *l1*, which nothing on disk uses any more, once less; returns the runs that are free now.

    What lies beyond *size* was counted before.
    """
    store, bits = image.store, image.geometry.cluster_bits
    store.file.event("cluster_free")
    tree = Tree(image, l1, active=False)
    freed = tree.count(-1, stop=None if size is None else -(-size >> bits))
    active = {entry & OFFSET_MASK for entry in image.tables.l1}
    tree.mark(passing=active)
    for entry in l1:
        cluster = (entry & OFFSET_MASK) >> bits
        if cluster and not image.refcounts.get(cluster):
            image.metadata.remove(cluster, 1)
    return freed


def _give_back(image: Qcow2, tables: list[tuple[int, int]], freed: list[tuple[int, int]] | None = None) -> None:
    """Free the clusters (first, count) of *tables*, at which nothing on disk points any more.

    With those that are *freed* already, their space goes back to the host once the counts are stable.
    """
    runs = list(freed or ())
    for first, count in tables:
        if count:
            image.store.file.event("cluster_free")
            image.metadata.remove(first, count)
            runs += [(cluster, 1) for cluster in image.refcounts.decrement(first, count)]
    image.refcounts.settle()
    for first, _ in runs:
        image.allocator.lower(first)
    if image.order.pass_discard_snapshot:
        bits = image.geometry.cluster_bits
        for first, count in _joined(runs):
            image.store.discard(first << bits, count << bits)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _replace_l1(image: Qcow2, new: array[int], size: int) -> None:
    """Make *new* the active L1 table on disk, in the place of the one that is there, and *size* the image's.

    A power cut leaves both as they were or as they will be. Where that takes more than one sector, a copy of the table
    elsewhere is the active one meanwhile.
    """
    store, header = image.store, image.header
    old = image.tables.l1
    sectors = [at for at in range(0, len(new), 64) if new[at : at + 64] != old[at : at + 64]]
    if sectors and (len(sectors) > 1 or size != header.size):
        _replace_through_copy(image, new, size)
    elif sectors:
        store.write_words(header.l1_table_offset, new, sectors[0], min(sectors[0] + 64, len(new)))
    elif size != header.size:
        header.size = size
        store.write_header("size")
    store.barrier()


def _replace_through_copy(image: Qcow2, new: array[int], size: int) -> None:
    store, header, bits = image.store, image.header, image.geometry.cluster_bits
    place, end = header.l1_table_offset, store.file.size
    count = -(-len(new) * 8 >> bits)
    blocks = {number for number, entry in enumerate(image.refcounts.table) if entry}
    first = image.allocator.allocate_metadata(count, ACTIVE_L1)
    try:
        store.write_words(first << bits, new)
        image.refcounts.settle()
        store.barrier()
    except BaseException:
        discard_table(image, first, count)
        raise
    try:
        header.size, header.l1_table_offset = size, first << bits
        store.write_header("size", "l1_table_offset")
        store.barrier()
        store.write_words(place, new)
        store.barrier()
        header.l1_table_offset = place
        store.write_header("l1_table_offset")
        store.barrier()
    except BaseException:
        # Nobody knows which of the two tables is the active one.
        store.corrupt = True
        raise
    discard_table(image, first, count)
    image.refcounts.settle()
    # Nothing of this is left: the peer does without.
    if len(blocks) < sum(1 for entry in image.refcounts.table if entry):
        drop_blocks(image, [number for number in unused_blocks(image) if number not in blocks])
    if last_used(image) << bits < end < store.file.size:
        store.file.truncate(end)
        image.allocator.fresh_from = min(image.allocator.fresh_from, -(-end >> bits))


def _said(text: str, error: OSError) -> BlockError:
    return BlockError.of(error.errno or errno.EIO, f"{text}: {error.strerror}")


def _load_error(image: Qcow2, error: OSError) -> ImageError:
    return ImageError(image.store.name, f"Failed to load snapshot: {error.strerror}")
