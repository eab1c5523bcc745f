"""Sparse extents: hosted (SPARSE: *Virtual Disk Format 5.0*, "Hosted Sparse Extents"), stream-optimized
("Stream-Optimized Compressed") and those of ESXi hosts (VMFSSPARSE: "ESXi Host Sparse Extents", also called COWD).

A grain is allocated at the end of the file and never given back. Its entry is set in memory when its data has been
written, and reaches the disk after the data does (``tables.py``).
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.errors import BlockError, ImageError

from .compression import InflateError, inflate
from .entries import runs
from .extent import Extent
from .header import (
    COMPRESSION_DEFLATE,
    COWD_TABLE_ENTRIES,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINES,
    FLAG_REDUNDANT,
    FLAG_ZEROED,
    GD_AT_END,
    GRAIN_MARKER,
    GTE_ZEROED,
    MAGIC,
    MARKER_EOS,
    MARKER_FOOTER,
    NEWLINES,
    SECTOR,
    CowdHeader,
    Marker,
    SparseHeader,
)
from .tables import MAX_DIRECTORY, Tables

if TYPE_CHECKING:
    from vm_core.block.node import Node

#: Sectors of a grain, and entries of a grain table, at most: QEMU's limits.
MAX_GRAIN = 0x200000
MAX_TABLE_ENTRIES = 512
#: Bytes of a grain that can be written to, at most: a write of one byte writes a whole grain.
MAX_WRITABLE_GRAIN = 64 << 20
#: Bytes of a compressed grain, at most.
MAX_COMPRESSED_GRAIN = 16 << 20
#: A sector number has 32 bits.
MAX_SECTOR = 1 << 32
#: Compressed data can be this much longer than what it stands for.
EXPANSION = 4096


class Geometry(NamedTuple):
    """What a header says of a sparse extent, checked."""

    capacity: int
    grain_sectors: int
    table_entries: int
    directory_offset: int
    directory_entries: int
    redundant_offset: int | None
    #: Bytes of metadata at the start of the file: no grain lies there.
    overhead: int
    compressed: bool
    markers: bool
    zeroed: bool
    version: int


def read_header(file: Node, name: str) -> SparseHeader:
    """The header of a hosted sparse extent, or its footer where that has the truth. Raises ImageError."""
    header = SparseHeader.parse(file.pread(0, SECTOR))
    if header.gd_offset == GD_AT_END:
        header = _read_footer(file, name, header)
    return header


def _read_footer(file: Node, name: str, head: SparseHeader) -> SparseHeader:
    """The footer at the end of a stream: marker, copy of the header, end-of-stream marker, a sector each."""
    size = file.size
    if size < 4 * SECTOR:
        raise ImageError(name, "Invalid footer")
    data = file.pread(size - 3 * SECTOR, 3 * SECTOR)
    before, footer = Marker.parse(data), SparseHeader.parse(data, SECTOR)
    after = Marker.parse(data, 2 * SECTOR)
    if (
        footer.magic != MAGIC
        or before.size
        or before.type != MARKER_FOOTER
        or after.value
        or after.size
        or after.type != MARKER_EOS
        or footer.gd_offset == GD_AT_END
    ):
        raise ImageError(name, "Invalid footer")
    return footer


def hosted_geometry(file: Node, name: str, header: SparseHeader) -> Geometry:
    """What *header* says, with all its fields checked. Raises ImageError, in QEMU's words where it has any."""
    if header.version > 3:
        raise ImageError(name, f"Unsupported VMDK version {header.version}")
    if header.table_entries > MAX_TABLE_ENTRIES:
        raise ImageError(name, "L2 table size too big")
    span = header.table_entries * header.grain_size
    if not span & 0xFFFFFFFF:
        raise ImageError(name, "L1 entry size is invalid")
    overhead = header.overhead * SECTOR
    if file.size < overhead:
        raise ImageError(name, f"File truncated, expecting at least {overhead} bytes")
    if header.grain_size > MAX_GRAIN:
        raise ImageError(name, "Invalid granularity, image may be corrupt")
    entries = -(-header.capacity // span)
    if entries > MAX_DIRECTORY:
        raise ImageError(name, "L1 size too big")
    if header.flags & FLAG_NEWLINES and header.newlines != NEWLINES:
        raise ImageError(
            name,
            f"the line ends in the header are {header.newlines!r} instead of {NEWLINES!r}: the file was transferred "
            "as text, which damaged it",
        )
    compressed = header.compress_algorithm == COMPRESSION_DEFLATE
    if header.flags & FLAG_COMPRESSED and header.compress_algorithm not in (0, COMPRESSION_DEFLATE):
        raise ImageError(name, f"compression algorithm {header.compress_algorithm} is not supported; 1 (deflate) is")
    if compressed and header.grain_size * SECTOR > MAX_COMPRESSED_GRAIN:
        raise ImageError(
            name,
            f"compressed grains of {header.grain_size * SECTOR} bytes are not supported; "
            f"{MAX_COMPRESSED_GRAIN} bytes are the most",
        )
    redundant = header.rgd_offset * SECTOR if header.flags & FLAG_REDUNDANT and header.rgd_offset else None
    if header.gd_offset >= 1 << 54:
        raise ImageError(name, f"Could not read l1 table from extent '{file.filename}': Input/output error")
    return Geometry(
        header.capacity * SECTOR,
        header.grain_size,
        header.table_entries,
        header.gd_offset * SECTOR,
        entries,
        redundant,
        overhead,
        compressed,
        bool(header.flags & FLAG_MARKERS),
        bool(header.flags & FLAG_ZEROED),
        header.version,
    )


def cowd_geometry(file: Node, name: str) -> Geometry:
    """What the header of an ESXi host sparse extent says. Raises ImageError."""
    header = CowdHeader.parse(file.pread(0, min(file.size, 2048)))
    if not 0 < header.grain_size <= MAX_GRAIN:
        raise ImageError(name, "Invalid granularity, image may be corrupt")
    span = COWD_TABLE_ENTRIES * header.grain_size
    entries = -(-header.sectors // span)
    return Geometry(
        header.sectors * SECTOR,
        header.grain_size,
        COWD_TABLE_ENTRIES,
        header.gd_offset * SECTOR,
        entries,
        None,
        header.gd_offset * SECTOR + entries * 4,
        False,
        False,
        False,
        header.version,
    )


class SparseExtent(Extent):
    """Grains anywhere in a file, found by a directory and tables."""

    def __init__(
        self, start: int, file: Node, filename: str, geometry: Geometry, *, type: str, name: str, cowd: bool = False
    ) -> None:
        super().__init__(start, geometry.capacity, file, filename)
        self.file: Node = file
        self.type = type
        self.name = name
        self.cowd = cowd
        self.geometry = geometry
        self.grain = geometry.grain_sectors * SECTOR
        self.compressed = geometry.compressed
        self.zeroed = geometry.zeroed
        self._zero_entry = GTE_ZEROED if geometry.zeroed else -1
        self._step = geometry.grain_sectors
        self._span = geometry.table_entries * self.grain
        self.tables = Tables(
            file,
            name,
            offset=geometry.directory_offset,
            count=geometry.directory_entries,
            entries=geometry.table_entries,
            redundant=geometry.redundant_offset,
            empty=self._zero_entry,
        )
        #: Where the next grain goes: whole grains from the start of the file, behind all that is there.
        self._next = -(-max(file.size, geometry.overhead) // self.grain) * self.grain
        #: The file shall be at least this long.
        self._least = 0

    # Reading

    def runs(self, offset: int, stop: int, writable: bool) -> Iterator[Mapping]:
        base, grain, span, size = self.start, self.grain, self._span, self.file.size
        tables = self.tables
        last_table = (stop - 1) // span + 1
        special = self.compressed
        step = 0 if special else self._step
        while offset < stop:
            number = offset // span
            table = tables.get(number)
            if table is None:
                limit = min(stop, tables.absent(number, last_table) * span)
                yield Mapping(Kind.UNALLOCATED, base + offset, limit - offset)
                offset = limit
                continue
            origin = number * span
            limit = min(stop, origin + span)
            for index, count, entry in runs(
                table, (offset - origin) // grain, -(-(limit - origin) // grain), step, self._zero_entry
            ):
                first = origin + index * grain
                upto = min(limit, first + count * grain)
                if entry == 0:
                    yield Mapping(Kind.UNALLOCATED, base + offset, upto - offset)
                elif entry == self._zero_entry:
                    yield Mapping(Kind.ZERO, base + offset, upto - offset)
                else:
                    host = entry * SECTOR
                    if host + (count - 1) * grain >= size:
                        raise self._outside(origin // grain + index, host, count, size)
                    if special:
                        token = (self, host, first // grain)
                        yield Mapping(Kind.SPECIAL, base + offset, upto - offset, self.file, host, False, token)
                    else:
                        yield Mapping(
                            Kind.DATA,
                            base + offset,
                            upto - offset,
                            self.file,
                            host + offset - first,
                            writable and host >= self.geometry.overhead,
                        )
                offset = upto

    def _outside(self, grain: int, host: int, count: int, size: int) -> ImageError:
        bad = max(0, -(-(size - host) // self.grain))
        return ImageError(
            self.name,
            f"grain {grain + min(bad, count - 1)} at {host + bad * self.grain:#x} lies past the end of the file "
            f"({size} bytes)",
        )

    def cached(self, offset: int, stop: int) -> bool:
        return all(self.tables.cached(number) for number in range(offset // self._span, (stop - 1) // self._span + 1))

    def read_special(self, place: int, index: int) -> bytes:
        grain = self.grain
        wanted = min(grain, self.length - index * grain)
        if self.geometry.markers:
            head = self.file.pread(place, SECTOR)
            marker = Marker.parse(head)
            size = marker.size
            if not 0 < size <= grain + EXPANSION:
                raise ImageError(
                    self.name, f"the marker at {place:#x} says that grain {index} takes {size} bytes, of {grain}"
                )
            if marker.value * SECTOR != index * grain:
                raise ImageError(
                    self.name,
                    f"the marker at {place:#x} is for sector {marker.value}, and not for {index * self._step}",
                )
            data = head[GRAIN_MARKER : GRAIN_MARKER + size]
            if len(data) < size:
                data += self.file.pread(place + SECTOR, size - len(data))
        else:
            data = self.file.pread(place, min(grain + EXPANSION, max(self.file.size - place, 0)))
        try:
            found = inflate(data, grain)
        except InflateError as error:
            raise ImageError(self.name, f"grain {index} at {place:#x} cannot be decompressed: {error}") from None
        if len(found) < wanted:
            raise ImageError(
                self.name, f"grain {index} at {place:#x} decompresses to {len(found)} bytes; {wanted} are needed"
            )
        return found[:wanted]

    # Writing

    def load_for_writing(self) -> None:
        if not self.compressed and self.grain > MAX_WRITABLE_GRAIN:
            raise ImageError(
                self.name,
                f"grains of {self.grain} bytes are too large to write to; {MAX_WRITABLE_GRAIN} bytes are the most",
            )
        self.tables.load_redundant()

    def allocate(self, offset: int, stop: int) -> Iterator[Allocation]:
        if self.tables.full:
            self.tables.write_back()
        grain, span, base = self.grain, self._span, self.start
        while offset < stop:
            number = offset // span
            table = self._table(number)
            origin = number * span
            limit = min(stop, origin + span)
            for index, count, entry in runs(
                table, (offset - origin) // grain, -(-(limit - origin) // grain), self._step, self._zero_entry
            ):
                first = origin + index * grain
                upto = min(limit, first + count * grain)
                if entry == 0 or entry == self._zero_entry:
                    host = self._take(count * grain)
                    length = min(count * grain, self.length - first)
                    yield Allocation(base + first, length, self.file, host, True, True, self)
                else:
                    host = entry * SECTOR
                    if host < self.geometry.overhead:
                        raise ImageError(
                            self.name, f"grain {first // grain} at {host:#x} lies in the metadata: not written to"
                        )
                    if host + (count - 1) * grain >= self.file.size:
                        raise self._outside(first // grain, host, count, self.file.size)
                    yield Allocation(base + offset, upto - offset, self.file, host + offset - first, False)
                offset = upto

    def _table(self, number: int) -> array[int]:
        """The table, in a place where it can be written."""
        tables = self.tables
        table = tables.get(number)
        if tables.missing(number):
            size = -(-tables.bytes // SECTOR) * SECTOR
            redundant = None
            if tables.redundant is not None:
                redundant = self._take(size) // SECTOR
            tables.add(number, self._take(size) // SECTOR, redundant)
            self._align()
            table = tables.get(number)
        else:
            tables.check_writable(number)
        assert table is not None
        return table

    def _take(self, length: int) -> int:
        """*length* bytes at the end of the file, which then has them. Raises BlockError."""
        host = self._next
        end = host + length
        if end > MAX_SECTOR * SECTOR:
            raise BlockError.of(errno.EFBIG, f"{self.filename}: an extent's file can have {MAX_SECTOR} sectors")
        if self.file.size < end:
            self.file.truncate(end)
        self._next = end
        return host

    def _align(self) -> None:
        self._next = -(-self._next // self.grain) * self.grain

    def commit(self, one: Allocation) -> None:
        offset, place = one.offset - self.start, one.host // SECTOR
        count = -(-one.length // self.grain) if not self.compressed else 1
        step, entries = self._step, self.geometry.table_entries
        index = offset // self.grain
        while count:
            number, at = divmod(index, entries)
            part = min(count, entries - at)
            self.tables.set(number, at, array("I", range(place, place + part * step, step)))
            index += part
            count -= part
            place += part * step

    def allocate_encoded(self, offset: int, length: int) -> Allocation:
        """A place for a compressed grain of *length* bytes with its marker. Raises BlockError where it has one."""
        if self.tables.full:
            self.tables.write_back()
        number, inside = divmod(offset, self._span)
        table = self._table(number)
        entry = table[inside // self.grain]
        if entry and entry != self._zero_entry:
            raise BlockError.of(errno.EIO, "Could not write to allocated cluster for streamOptimized")
        host = self._next
        end = host + -(-length // SECTOR) * SECTOR
        if end > MAX_SECTOR * SECTOR:
            raise BlockError.of(errno.EFBIG, f"{self.filename}: an extent's file can have {MAX_SECTOR} sectors")
        self._next = end
        # As qemu-img leaves it: room for a whole grain behind the last one's place.
        self._least = host + self.grain
        return Allocation(self.start + offset, min(self.grain, self.length - offset), self.file, host, True, True, self)

    def empty(self) -> None:
        """Forget all grains, and give their space back where it lies behind the tables."""
        tables = self.tables
        self._next = -(-max(self.geometry.overhead, tables.end) // self.grain) * self.grain
        for number in range(len(tables.directory)):
            if tables.get(number) is not None:
                tables.check_writable(number)
                tables.set(number, 0, array("I", bytes(tables.bytes)))
                if tables.full:
                    tables.write_back()
        tables.write_back()
        if self.file.size > self._next:
            self.file.truncate(self._next)

    def cut(self, end: int) -> None:
        """No grain and no table lies at *end* or behind it: end the file there."""
        self.flush()
        self._next = -(-max(end, self.geometry.overhead) // self.grain) * self.grain
        if end < self.file.size:
            self.file.truncate(end)

    def can_zero(self, offset: int, stop: int) -> bool:
        return self.zeroed and offset % self.grain == 0 and (stop % self.grain == 0 or stop == self.length)

    def zero(self, offset: int, stop: int) -> None:
        if self.tables.full:
            self.tables.write_back()
        first, last = offset // self.grain, -(-stop // self.grain)
        entries = self.geometry.table_entries
        while first < last:
            number, at = divmod(first, entries)
            count = min(last - first, entries - at)
            self._table(number)
            self.tables.set(number, at, array("I", (GTE_ZEROED,)) * count)
            first += count

    def grow(self) -> None:
        if self._least > self.file.size:
            self.file.truncate(self._least)
        self._least = 0

    def flush(self) -> None:
        self.grow()
        if self.tables.dirty:
            self.tables.write_back()
            if self.cowd:
                where, data = CowdHeader(free_sector=min(self._next // SECTOR, MAX_SECTOR - 1)).pack_fields(
                    "free_sector"
                )
                self.file.pwrite(where, data)
        self.file.flush()


def pack_grain(lba: int, data: bytes) -> bytes:
    """A grain's marker and *data*, padded to sectors."""
    head = Marker(value=lba, size=len(data)).pack()[:GRAIN_MARKER]
    length = GRAIN_MARKER + len(data)
    return b"".join((head, data, bytes(-length % SECTOR)))
