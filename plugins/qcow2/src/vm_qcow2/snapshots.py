"""The table of internal snapshots (*Snapshots*): reading it, judging it, writing it anew.

What a snapshot's L1 table holds is looked at only when the snapshot is used or checked: one damaged snapshot must not
keep the image from being opened. A table that is damaged itself is refused, except where the image is opened to be
checked; a repair cuts off what cannot be kept (:func:`read_snapshots` with *repair*) and writes the rest.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

from vm_core.block.structs import Record, u16, u32, u64
from vm_core.errors import BlockError, ImageError

from .geometry import MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS
from .store import Store

if TYPE_CHECKING:
    from vm_core.block.node import Node

    from .image import Qcow2

#: Extra data of one entry, at most; 24 bytes are defined so far.
MAX_EXTRA_BYTES = 1024
#: What version 3 demands of it: up to the disk size.
MIN_EXTRA_BYTES = 16
NO_ICOUNT = (1 << 64) - 1
#: Bytes of a name and of an id that QEMU's tools show, and of a name that they give. More may be in a table.
LISTED_NAME = 255
LISTED_ID = 127


class SnapshotHead(Record, order="big"):
    """The fixed part of an entry; extra data, id and name follow."""

    l1_table_offset: int = u64(0, doc="where the snapshot's L1 table is; cluster-aligned")
    l1_size: int = u32(8, doc="entries of that table")
    id_size: int = u16(12, doc="bytes of the unique id")
    name_size: int = u16(14, doc="bytes of the name")
    seconds: int = u32(16, doc="when it was taken, seconds since the epoch")
    nanoseconds: int = u32(20, doc="the part of that below a second")
    vm_clock: int = u64(24, doc="nanoseconds that the guest had run")
    vm_state_size_32: int = u32(32, doc="bytes of saved machine state")
    extra_size: int = u32(36, doc="bytes of extra data")


class SnapshotExtra(Record, order="big"):
    """What is defined of the extra data; more may follow and is kept."""

    vm_state_size: int = u64(0, doc="bytes of saved machine state; counts instead of the 32-bit field")
    disk_size: int = u64(8, doc="virtual size when it was taken")
    icount: int = u64(16, default=NO_ICOUNT, doc="instructions executed, all ones if unknown")


class Snapshot(NamedTuple):
    """One entry."""

    #: Text with undecodable bytes as surrogate escapes.
    id: str
    name: str
    head: SnapshotHead
    vm_state_size: int
    disk_size: int
    #: None: not recorded.
    icount: int | None
    #: Extra data beyond what is defined.
    unknown: bytes = b""

    def info(self) -> dict[str, Any]:
        """QEMU's SnapshotInfo."""
        head = self.head
        data: dict[str, Any] = {"icount": self.icount} if self.icount is not None else {}
        return data | {
            "vm-clock-nsec": head.vm_clock % 1_000_000_000,
            "name": shorten(self.name, LISTED_NAME),
            "date-sec": head.seconds,
            "date-nsec": head.nanoseconds,
            "vm-clock-sec": head.vm_clock // 1_000_000_000,
            "id": shorten(self.id, LISTED_ID),
            "vm-state-size": self.vm_state_size,
        }

    def pack(self) -> bytes:
        """The entry with all extra data that is defined, without padding."""
        id, name = _encode(self.id), _encode(self.name)
        icount = NO_ICOUNT if self.icount is None else self.icount
        extra = SnapshotExtra(vm_state_size=self.vm_state_size, disk_size=self.disk_size, icount=icount).pack()
        head = SnapshotHead.parse(self.head.pack())
        head.id_size, head.name_size = len(id), len(name)
        head.vm_state_size_32 = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        head.extra_size = len(extra) + len(self.unknown)
        return head.pack() + extra + self.unknown + id + name

    def l1_problem(self, cluster_size: int) -> BlockError | None:
        """What is wrong with where the L1 table is said to be."""
        if self.head.l1_size * 8 > MAX_L1_BYTES:
            return BlockError.of(errno.EFBIG, "Snapshot L1 table too large")
        if self.head.l1_table_offset & cluster_size - 1 or self.head.l1_table_offset >> 63:
            return BlockError.of(errno.EINVAL, "Snapshot L1 table offset invalid")
        return None


class SnapshotTable:
    """What was read: the entries, and for a check what is wrong."""

    def __init__(self) -> None:
        self.entries: list[Snapshot] = []
        #: Bytes on disk, without the padding of the last entry.
        self.length = 0
        #: Numbers of entries without the extra data that version 3 demands.
        self.incomplete: list[int] = []
        #: What a repair cut off: one sentence each, and how many entries are concerned.
        self.cuts: list[str] = []
        self.cut = 0
        #: How many of the cuts are within entries.
        self.trimmed = 0

    @property
    def rewrite(self) -> bool:
        """Whether single entries have to be written as the format demands."""
        return bool(self.trimmed or self.incomplete)

    @property
    def problems(self) -> int:
        """Corruptions that writing the table anew repairs."""
        return self.cut + len(self.incomplete)

    def by_id(self, id: str) -> Snapshot | None:
        """The first snapshot of this id."""
        return next((one for one in self.entries if one.id == id), None)

    def by_name(self, name: str) -> Snapshot | None:
        """The first snapshot of this name; names need not be unique."""
        return next((one for one in self.entries if one.name == name), None)


def check_place(store: Store, count: int) -> None:
    """Raise ImageError unless a table of *count* entries can be where the header says."""
    start = store.header.snapshots_offset
    if count > MAX_SNAPSHOTS:
        raise store.error("Snapshot table too large")
    if start & store.geometry.cluster_size - 1 or start + count * SnapshotHead.LENGTH >= 1 << 63:
        raise store.error("Snapshot table offset invalid")


def read_snapshots(store: Store, *, repair: bool = False, count: int | None = None) -> SnapshotTable:
    """The table; with *repair* what is too much is cut off in memory instead of raising ImageError.

    *count* counts instead of the header's number. What lies beyond the end of the file reads as zeroes, as everywhere.
    """
    header = store.header
    count = header.nb_snapshots if count is None else count
    check_place(store, count)
    table = SnapshotTable()
    window = _Window(store.file, header.snapshots_offset)
    position = kept_length = 0
    for number in range(count):
        begin = position + 7 & ~7
        head = SnapshotHead.parse(window.get(begin, SnapshotHead.LENGTH))
        kept = head.extra_size
        if kept > MAX_EXTRA_BYTES:
            if not repair:
                raise _too_much(
                    store, f"Too much extra metadata in snapshot table entry {number}", "this extra metadata"
                )
            table.cuts.append(
                f"Discarding too much extra metadata in snapshot table entry {number} ({kept} > {MAX_EXTRA_BYTES})"
            )
            table.cut += 1
            table.trimmed += 1
            kept = MAX_EXTRA_BYTES
        kept_length += SnapshotHead.LENGTH + kept + head.id_size + head.name_size + 7 & ~7
        if kept_length > MAX_SNAPSHOT_TABLE_BYTES:
            rest = count - number
            if not repair:
                raise _too_much(store, "Snapshot table is too big", f"all {rest} overhanging snapshots")
            table.cuts.append(f"Discarding {rest} overhanging snapshots (snapshot table is too big)")
            table.cut += rest
            break
        position = begin + SnapshotHead.LENGTH
        extra_data = window.get(position, kept)
        extra = SnapshotExtra.parse(extra_data)
        position += head.extra_size
        names = window.get(position, head.id_size + head.name_size)
        position += len(names)
        if kept < MIN_EXTRA_BYTES and store.geometry.version >= 3:
            table.incomplete.append(number)
        table.entries.append(
            Snapshot(
                _decode(names[: head.id_size]),
                _decode(names[head.id_size :]),
                head,
                extra.vm_state_size if kept >= 8 else head.vm_state_size_32,
                extra.disk_size if kept >= 16 else header.size,
                extra.icount if extra.icount != NO_ICOUNT else None,
                extra_data[SnapshotExtra.LENGTH :],
            )
        )
    table.length = position
    return table


class NewTable(NamedTuple):
    """A table that is in the image's memory of free space and in the file, but at which nothing points yet."""

    entries: list[Snapshot]
    first: int
    clusters: int
    length: int


def prepare_snapshots(image: Qcow2, entries: list[Snapshot]) -> NewTable:
    """Write a table of *entries* to free clusters. Raises BlockError, with the clusters free again."""
    store, allocator, bits = image.store, image.allocator, image.geometry.cluster_bits
    data = bytearray()
    for one in entries:
        data.extend(bytes(-len(data) % 8))
        data.extend(one.pack())
    if len(data) > MAX_SNAPSHOT_TABLE_BYTES or len(entries) > MAX_SNAPSHOTS:
        raise BlockError.of(errno.EFBIG)
    count = -(-len(data) >> bits)
    first = allocator.allocate_metadata(count, "snapshot table") if count else 0
    try:
        if count:
            store.write(first << bits, data)
            image.refcounts.settle()
            store.barrier()
    except BaseException:
        discard_table(image, first, count)
        raise
    return NewTable(entries, first, count, len(data))


def discard_table(image: Qcow2, first: int, count: int) -> None:
    """Forget a new table of *count* clusters that is not used after all."""
    if count:
        image.metadata.remove(first, count)
        image.allocator.cancel(first, count)


def switch_snapshots(image: Qcow2, new: NewTable) -> tuple[int, int]:
    """Let the header point at *new*; returns first and count of the former table's clusters, which nobody freed yet.

    One sector is written, so a power cut leaves the one or the other. If that fails, it may still have happened: both
    tables, and what they point at, stay taken.
    """
    store, bits = image.store, image.geometry.cluster_bits
    header = store.header
    former = header.snapshots_offset >> bits, -(-image.snapshot_table.length >> bits)
    before = header.nb_snapshots, header.snapshots_offset
    header.nb_snapshots, header.snapshots_offset = len(new.entries), new.first << bits
    try:
        store.write_header("nb_snapshots", "snapshots_offset")
        store.barrier()
    except BaseException:
        header.nb_snapshots, header.snapshots_offset = before
        raise
    table = SnapshotTable()
    table.entries = new.entries
    table.length = new.length
    image.snapshot_table = table
    return former


def check_snapshots(image: Qcow2, *, repair: bool) -> tuple[list[str], int]:
    """Read the table for a check, into :attr:`Qcow2.snapshot_table`: sentences to tell, and how many corruptions.

    With *repair* what is too much is cut off in memory; :func:`repair_snapshots` puts that on disk, after the refcounts
    are right. Raises BlockError, with a note that tells more, where the table cannot be read: then nothing else can be
    checked.
    """
    store = image.store
    count = store.header.nb_snapshots
    said: list[str] = []
    found = 0
    try:
        beyond = count - MAX_SNAPSHOTS
        if beyond > 0:
            if not repair:
                error = BlockError.of(errno.EFBIG)
                error.add_note(
                    "ERROR snapshot table too large\n"
                    f"You can force-remove all {beyond} overhanging snapshots with qemu-img check -r all"
                )
                raise error
            said.append(f"Discarding {beyond} overhanging snapshots")
            found += beyond
            count = MAX_SNAPSHOTS
        table = read_snapshots(store, repair=repair, count=count)
    except ImageError as problem:
        place = "offset invalid" in problem.peer
        error = BlockError.of(errno.EINVAL if place else errno.EFBIG)
        error.add_note(f"ERROR failed to read the snapshot table: {problem.peer}")
        raise error from problem
    said += table.cuts
    if repair and len(table.entries) < store.header.nb_snapshots:
        # The table may stay where it is, only shorter.
        store.check_writable()
        store.header.nb_snapshots = len(table.entries)
        store.write_header("nb_snapshots")
        store.barrier()
    word = "Repairing" if repair else "ERROR"
    said += [f"{word} snapshot table entry {number} is incomplete" for number in table.incomplete]
    image.snapshot_table = table
    return said, found + table.problems


def repair_snapshots(image: Qcow2) -> None:
    """Write the table anew where :func:`check_snapshots` cut entries or found some incomplete; free the former."""
    if image.snapshot_table.rewrite:
        rewrite_snapshots(image)


def rewrite_snapshots(image: Qcow2) -> None:
    """Write the table anew, with all extra data that is defined; free the former."""
    table = prepare_snapshots(image, image.snapshot_table.entries)
    first, count = switch_snapshots(image, table)
    if count:
        image.metadata.remove(first, count)
        for cluster in image.refcounts.decrement(first, count):
            image.allocator.lower(cluster)
        image.refcounts.settle()


def _too_much(store: Store, what: str, which: str) -> ImageError:
    return ImageError(
        store.name,
        f"{what}; vm-img check -r all removes {which}",
        peer=f"{what}\nYou can force-remove {which} with qemu-img check -r all",
    )


class _Window:
    """Bytes of a table that is read from its start to its end."""

    SIZE = 256 << 10

    def __init__(self, file: Node, start: int) -> None:
        self._file = file
        self._start = start
        self._from = 0
        self._data = b""

    def get(self, position: int, length: int) -> bytes:
        """*length* bytes at *position*; zeroes past the end of the file."""
        at = position - self._from
        if at < 0 or at + length > len(self._data):
            self._data = self._file.pread(self._start + position, max(length, self.SIZE))
            self._from, at = position, 0
        return self._data[at : at + length]


def shorten(text: str, length: int) -> str:
    """The first *length* bytes of a name."""
    return _decode(_encode(text)[:length])


def _decode(data: bytes) -> str:
    """A name ends at its first null byte."""
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
