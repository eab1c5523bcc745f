"""Taking, applying, deleting and loading internal snapshots.

The order on disk. At every instant the active tables and each snapshot that the header's table lists are whole, and no
cluster that two of them use has the bit COPIED; a power cut costs clusters that are counted too often, and bits COPIED
that contradict such counts, nothing else.

* *Taking*: a copy of the L1 table and the higher counts are stable; then the COPIED bits of the active tables are
  cleared; then a new snapshot table is stable; then the header points at it; then the former table is given back.
* *Applying*: the higher counts of the snapshot's clusters are stable, and the COPIED bits of its tables are cleared;
  then its L1 entries become the active ones (:func:`_replace_l1`); then the former active ones are counted down, and
  the COPIED bits set where nobody shares any more.
* *Deleting*: a table without the snapshot is stable, then the header points at it; what only the snapshot used is
  given back after that.
"""

from __future__ import annotations

import errno
import time
from array import array
from typing import TYPE_CHECKING

from vm_core.block.notices import notice
from vm_core.errors import BlockError, ImageError, UsageError

from .geometry import COPIED, MAX_SNAPSHOTS, OFFSET_MASK
from .overlap import ACTIVE_L1, ACTIVE_L2, INACTIVE_L1
from .resize import grow_l1, resize
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
    counted = False
    try:
        if count:
            store.write_words(first << bits, tables.l1)
        tree.count(1)
        counted = True
        _settle(image)
        tree.mark()
        _settle(image)
        table = prepare_snapshots(image, [*entries, snapshot])
    except BaseException:
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
    _check(image)
    if image.bitmaps():
        raise ImageError(image.store.name, "Device has active dirty bitmaps")
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
    if snapshot.disk_size != image.size:
        resize(image, snapshot.disk_size)
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
    _replace_l1(image, new)
    tables.replace(new)
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


def _count_down(image: Qcow2, l1: array[int]) -> list[tuple[int, int]]:
    """Count what is below *l1*, which nothing on disk uses any more, once less; returns the runs that are free now."""
    store, bits = image.store, image.geometry.cluster_bits
    store.file.event("cluster_free")
    tree = Tree(image, l1, active=False)
    freed = tree.count(-1)
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
            image.store.file.discard(first << bits, count << bits)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return joined


def _replace_l1(image: Qcow2, new: array[int]) -> None:
    """Make *new* the active L1 table on disk, in the place of the one that is there; a power cut leaves old or new.

    Where they differ in more than one sector, a copy elsewhere is the active one meanwhile.
    """
    store, header, bits = image.store, image.store.header, image.geometry.cluster_bits
    old = image.tables.l1
    sectors = [at for at in range(0, len(new), 64) if new[at : at + 64] != old[at : at + 64]]
    if not sectors:
        return
    place = header.l1_table_offset
    if len(sectors) == 1:
        store.write_words(place, new, sectors[0], min(sectors[0] + 64, len(new)))
        store.barrier()
        return
    end = store.file.size
    count = -(-len(new) * 8 >> bits)
    first = image.allocator.allocate_metadata(count, ACTIVE_L1)
    try:
        store.write_words(first << bits, new)
        image.refcounts.settle()
        store.barrier()
    except BaseException:
        discard_table(image, first, count)
        raise
    header.l1_table_offset = first << bits
    store.write_header("l1_table_offset")
    store.barrier()
    store.write_words(place, new)
    store.barrier()
    header.l1_table_offset = place
    store.write_header("l1_table_offset")
    store.barrier()
    discard_table(image, first, count)
    image.refcounts.settle()
    if first << bits >= end:
        store.file.truncate(end)
        image.allocator.fresh_from = min(image.allocator.fresh_from, -(-end >> bits))


def _said(text: str, error: OSError) -> BlockError:
    return BlockError.of(error.errno or errno.EIO, f"{text}: {error.strerror}")


def _load_error(image: Qcow2, error: OSError) -> ImageError:
    return ImageError(image.store.name, f"Failed to load snapshot: {error.strerror}")
