"""Space-efficient sparse extents (SESPARSE, ESXi 6.5 and later): snapshots of large disks. Read only.

The format is not published; what is known of it was told by those who read such files (the announcement of QEMU's
support in April 2019, and forensic tools). All numbers have 64 bits. Grains of 4 KiB are found through a directory and
tables of 4096 entries; tables and grains are numbered from the places that the header gives:

    directory entry     0 no table; else 0x1000000000000000 | number of the table
    table entry         top four bits: 0 not there, 1 unmapped by the guest, 2 zeroes, 3 data;
                        for data bits 48 to 59 are the low, bits 0 to 47 the high part of the grain's number
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vm_core.block.mapping import Kind, Mapping
from vm_core.block.tables import load, run_length
from vm_core.errors import ImageError

from .extent import Extent
from .header import SECTOR, SeSparseHeader, SeSparseVolatileHeader
from .tables import CACHE_BYTES, MAX_DIRECTORY

if TYPE_CHECKING:
    from vm_core.block.node import Node

_MAGIC = SeSparseHeader().magic
_VOLATILE_MAGIC = SeSparseVolatileHeader().magic
_VERSION = SeSparseHeader().version

_DIRECTORY_USED = 0x1000000000000000
_DIRECTORY_TYPE = 0xFFFFFFFF00000000
#: What the top four bits of a table's entry say.
_ABSENT, _UNMAPPED, _ZERO, _DATA = range(4)


class SeSparseExtent(Extent):
    """One such extent."""

    readonly = True

    def __init__(self, start: int, file: Node, filename: str, *, type: str, name: str) -> None:
        """Read and check the headers. Raises ImageError, in QEMU's words where it has any."""
        self.name = name
        header = _read_headers(file, name)
        super().__init__(start, header.capacity * SECTOR, file, filename)
        self.file: Node = file
        self.type = type
        self.grain = header.grain_size * SECTOR
        self._entries = header.table_size * SECTOR // 8
        self._span = self._entries * self.grain
        count = -(-self.length // self._span)
        if count > MAX_DIRECTORY:
            raise ImageError(name, "L1 size too big")
        size = file.size
        offset = header.gd_offset * SECTOR
        if offset + count * 8 > size:
            raise ImageError(
                name, f"the grain directory ({count * 8} bytes at {offset:#x}) reaches past the end of the file"
            )
        self._directory = load("Q", file.pread(offset, count * 8), "little")
        self._tables = header.tables_offset * SECTOR
        self._table_bytes = header.table_size * SECTOR
        self._grains = header.grains_offset * SECTOR
        self._cache: dict[int, array[int]] = {}

    def runs(self, offset: int, stop: int, writable: bool) -> Iterator[Mapping]:
        base, grain, span = self.start, self.grain, self._span
        last_table = (stop - 1) // span + 1
        while offset < stop:
            number = offset // span
            table = self._table(number)
            if table is None:
                limit = min(stop, (number + run_length(self._directory, number, last_table, 0)) * span)
                yield Mapping(Kind.UNALLOCATED, base + offset, limit - offset)
                offset = limit
                continue
            origin = number * span
            limit = min(stop, origin + span)
            index, last = (offset - origin) // grain, -(-(limit - origin) // grain)
            while index < last:
                entry = table[index]
                what = entry >> 60
                first = origin + index * grain
                if what == _DATA:
                    host, count = self._data(table, index, last)
                    upto = min(limit, first + count * grain)
                    yield Mapping(Kind.DATA, base + offset, upto - offset, self.file, host + offset - first)
                elif what > _DATA:
                    raise ImageError(
                        self.name, f"entry {entry:#018x} of grain {first // grain} is of no known type (0 to 3)"
                    )
                else:
                    count = run_length(table, index, last, 0)
                    upto = min(limit, first + count * grain)
                    kind = Kind.UNALLOCATED if what == _ABSENT else Kind.ZERO
                    yield Mapping(kind, base + offset, upto - offset)
                offset = upto
                index += count

    def _data(self, table: array[int], index: int, last: int) -> tuple[int, int]:
        """Where the grain at *index* lies, and how many lie one behind the other there."""
        number = _grain_number(table[index])
        count = 1
        while index + count < last:
            entry = table[index + count]
            if entry >> 60 != _DATA or _grain_number(entry) != number + count:
                break
            count += 1
        host = self._grains + number * self.grain
        size = self.file.size
        if host + (count - 1) * self.grain >= size:
            raise ImageError(self.name, f"grain number {number} at {host:#x} lies past the end of the file")
        return host, count

    def _table(self, number: int) -> array[int] | None:
        entry = self._directory[number]
        if not entry:
            return None
        table = self._cache.get(number)
        if table is None:
            if entry & _DIRECTORY_TYPE != _DIRECTORY_USED:
                raise ImageError(self.name, f"grain directory entry {number} ({entry:#018x}) is of no known type")
            offset = self._tables + (entry & 0xFFFFFFFF) * self._table_bytes
            if offset + self._table_bytes > self.file.size:
                raise ImageError(
                    self.name,
                    f"grain table {number} ({self._table_bytes} bytes at {offset:#x}) reaches past the end of the file",
                )
            table = load("Q", self.file.pread(offset, self._table_bytes), "little")
            if len(self._cache) >= CACHE_BYTES // self._table_bytes:
                self._cache.clear()
            self._cache[number] = table
        return table

    def cached(self, offset: int, stop: int) -> bool:
        return all(
            number in self._cache or not self._directory[number]
            for number in range(offset // self._span, (stop - 1) // self._span + 1)
        )


def _grain_number(entry: int) -> int:
    return (entry & 0x0FFF000000000000) >> 48 | (entry & 0x0000FFFFFFFFFFFF) << 12


def _read_headers(file: Node, name: str) -> SeSparseHeader:
    header = SeSparseHeader.parse(file.pread(0, SECTOR))
    if header.magic != _MAGIC:
        raise ImageError(name, f"Bad const header magic: 0x{header.magic:016x}")
    if header.version != _VERSION:
        raise ImageError(name, f"Unsupported version: 0x{header.version:016x}")
    if header.grain_size != 8:
        raise ImageError(name, f"Unsupported grain size: {header.grain_size}")
    if header.table_size != 64:
        raise ImageError(name, f"Unsupported grain table size: {header.table_size}")
    if header.flags:
        raise ImageError(name, f"Unsupported flags: 0x{header.flags:016x}")
    reserved = (header.reserved1, header.reserved2, header.reserved3, header.reserved4)
    if any(reserved):
        raise ImageError(name, "Unsupported reserved bits: " + " ".join(f"0x{one:016x}" for one in reserved))
    if any(header.padding):
        raise ImageError(name, "Unsupported non-zero const header padding")
    place = header.volatile_header_offset * SECTOR
    if place + SECTOR > file.size:
        raise ImageError(name, f"the volatile header at {place:#x} lies past the end of the file")
    volatile = SeSparseVolatileHeader.parse(file.pread(place, SECTOR))
    if volatile.magic != _VOLATILE_MAGIC:
        raise ImageError(name, f"Bad volatile header magic: 0x{volatile.magic:016x}")
    if volatile.replay_journal:
        raise ImageError(name, "Image is dirty, Replaying journal not supported")
    if any(volatile.padding):
        raise ImageError(name, "Unsupported non-zero volatile header padding")
    if header.capacity > 1 << 53:
        raise ImageError(name, f"a capacity of {header.capacity} sectors is more than an image can have")
    return header
