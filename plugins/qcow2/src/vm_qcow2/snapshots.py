"""The table of internal snapshots (*Snapshots*): read, so that they are kept when the image is written and checked."""

from __future__ import annotations

from typing import NamedTuple

from vm_core.block.structs import Record, u16, u32, u64

from .geometry import MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS
from .store import Store

#: Extra data of one entry; 24 bytes are defined so far.
MAX_EXTRA_BYTES = 1024


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
    icount: int = u64(16, doc="instructions executed, all ones if unknown")


class Snapshot(NamedTuple):
    """One entry."""

    id: str
    name: str
    head: SnapshotHead
    vm_state_size: int
    disk_size: int
    icount: int | None
    extra: bytes


def read_snapshots(store: Store) -> tuple[list[Snapshot], int]:
    """All entries of the table, and its length in bytes. Raises ImageError."""
    header = store.header
    count = header.nb_snapshots
    if not count:
        return [], 0
    if count > MAX_SNAPSHOTS:
        raise store.error(f"{count} internal snapshots; {MAX_SNAPSHOTS} is the most that is supported")
    start = header.snapshots_offset
    store.check_range(start, count * SnapshotHead.LENGTH, "snapshot table")
    limit = min(store.file.size - start, MAX_SNAPSHOT_TABLE_BYTES)
    data = bytearray()

    def need(end: int) -> None:
        """Have the table's bytes up to *end* in memory; tables are small, so they are read in growing parts."""
        if end > limit:
            raise store.error(f"snapshot table at {start:#x}: entry {number} reaches past {limit:#x} bytes")
        if end > len(data):
            more = min(limit, max(end, 65536, 2 * len(data)))
            data.extend(store.file.pread(start + len(data), more - len(data)))

    position = 0
    found: list[Snapshot] = []
    for number in range(count):
        need(position + SnapshotHead.LENGTH)
        head = SnapshotHead.parse(data, position)
        if head.extra_size > MAX_EXTRA_BYTES:
            raise store.error(f"snapshot {number + 1}: {head.extra_size} bytes of extra data are too many")
        need(position + SnapshotHead.LENGTH + head.extra_size + head.id_size + head.name_size)
        extra_at = position + SnapshotHead.LENGTH
        id_at = extra_at + head.extra_size
        name_at = id_at + head.id_size
        extra = SnapshotExtra.parse(data[extra_at:id_at])
        if head.l1_size * 8 > MAX_L1_BYTES:
            raise store.error(f"snapshot {number + 1}: L1 table of {head.l1_size} entries is too large")
        if head.l1_size:
            store.check_range(head.l1_table_offset, head.l1_size * 8, f"snapshot {number + 1}: L1 table")
        found.append(
            Snapshot(
                data[id_at:name_at].decode("utf-8", "replace"),
                data[name_at : name_at + head.name_size].decode("utf-8", "replace"),
                head,
                extra.vm_state_size if head.extra_size >= 8 else head.vm_state_size_32,
                extra.disk_size if head.extra_size >= 16 else header.size,
                extra.icount if head.extra_size >= 24 and extra.icount != (1 << 64) - 1 else None,
                bytes(data[extra_at:id_at]),
            )
        )
        position = name_at + head.name_size + 7 & ~7
    return found, position
