"""The driver.

Source: "Parallels Expandable Image File Format" (``parallels.txt`` of QEMU's interoperability documents). All numbers
are little-endian. New clusters go to the end of the file; what the allocation table (BAT) says of them reaches the
disk only after them, with the next :meth:`Parallels.flush`. The header's *in_use* mark stands while the image is open
for writing; an image that still has it was not closed, and is written to again only once it has been repaired.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vm_core.block.format import Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.structs import Record, raw, u32, u64
from vm_core.block.tables import dump, load
from vm_core.errors import BlockError, ImageError, UsageError

if TYPE_CHECKING:
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext

SECTOR = 512
MAGIC, MAGIC_EXT = b"WithoutFreeSpace", b"WithouFreSpacExt"
VERSION = 2
IN_USE = 0x746F6E59
#: A table of more entries is refused: it takes half a gigabyte of memory.
MAX_ENTRIES = (1 << 31) // 4
#: Table entries a page of it has; pages are written back.
PAGE = 1024


class Header(Record, order="little"):
    """The first 64 bytes; the table follows."""

    magic: bytes = raw(0, 16, default=MAGIC_EXT)
    version: int = u32(16, default=VERSION)
    heads: int = u32(20, default=16)
    cylinders: int = u32(24)
    tracks: int = u32(28, doc="sectors of a cluster")
    bat_entries: int = u32(32)
    sectors: int = u64(36, doc="sectors of the disk; the older magic counts in the lower half alone")
    in_use: int = u32(44)
    data_off: int = u32(48, doc="sector at which the data begins; 0: behind the table (older magic)")
    flags: int = u32(52, doc="bit 0: empty image")
    ext_off: int = u64(56, doc="sector of the format extension")


class Parallels(Format):
    """One open image. ``_bat[n]`` times ``_unit`` is where guest cluster *n* lies; 0: nowhere."""

    create_failure = "Failed to create Parallels image: {}"
    tells_clusters = False
    zero_parts = False

    def __init__(self, file: Node, header: Header, bat: array[int], name: str, readonly: bool) -> None:
        self.file = file
        self.readonly = readonly
        self.cluster_size = header.tracks * SECTOR
        self._header = header
        self._bat = bat
        self._name = name
        self._dirty: set[int] = set()
        #: The mark in the header says only that the image is open here.
        self._own_mark = False
        extended = header.magic == MAGIC_EXT
        self._unit = self.cluster_size if extended else SECTOR
        self._size = (header.sectors if extended else header.sectors & 0xFFFFFFFF) * SECTOR
        self._data = header.data_off * SECTOR or -(-(Header.LENGTH + 4 * len(bat)) // SECTOR) * SECTOR
        #: Where the next cluster goes.
        self._end = max(self._data, (max(bat) * self._unit + self.cluster_size) if bat and any(bat) else 0)
        if header.ext_off:
            self._end = max(self._end, header.ext_off * SECTOR + self.cluster_size)

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Parallels:
        def bad(reason: str) -> ImageError:
            return ImageError(context.filename, reason)

        header = Header.parse(file.pread(0, Header.LENGTH))
        if header.magic not in (MAGIC, MAGIC_EXT) or header.version != VERSION:
            raise bad("Image not in Parallels format")
        if not header.tracks:
            raise bad("Invalid image: Zero sectors per track")
        if header.tracks > (1 << 31) // SECTOR:
            raise bad("Invalid image: Too big cluster")
        if header.bat_entries > MAX_ENTRIES:
            raise bad("Catalog too large")
        if Header.LENGTH + 4 * header.bat_entries > file.size:
            raise bad(f"the table of {header.bat_entries} entries does not fit the file ({file.size} bytes)")
        bat = load("I", file.pread(Header.LENGTH, 4 * header.bat_entries), "little")
        self = cls(file, header, bat, context.filename, context.readonly)
        if self._size > len(bat) * self.cluster_size and not context.readonly:
            # To be read, the rest is not allocated: so QEMU makes disks of 4 PiB, whose entries 32 bits cannot count.
            raise bad(f"a table of {len(bat)} entries is too short for {self._size} bytes")
        if self._size >= 1 << 63:
            raise bad("the disk is too large")
        if header.ext_off and not context.readonly:
            raise bad("images with a format extension (dirty bitmaps) can only be read")
        if not context.readonly and not context.check:
            if header.in_use == IN_USE:
                raise bad("parallels: Image was not closed correctly; cannot be opened read/write")
            try:
                self._mark(IN_USE)
            except OSError:
                with suppress(OSError):
                    self._mark(0)
                raise
        return self

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        bat, size, unit = self._bat, self.cluster_size, self._unit
        step = size // unit
        end, limit, writable = offset + length, self._end, not self.readonly
        while offset < end:
            first = index = offset // size
            if index >= len(bat):
                yield Mapping(Kind.UNALLOCATED, offset, end - offset)
                return
            entry = bat[index]
            last = min(-(-end // size), len(bat))
            index += 1
            if entry:
                expected = entry + step
                while index < last and bat[index] == expected:
                    index += 1
                    expected += step
            else:
                while index < last and not bat[index]:
                    index += 1
            stop = min(end, index * size)
            if entry:
                start = entry * unit
                if start < self._data or start + (index - first) * size > limit:
                    raise ImageError(self._name, f"cluster {first} at {start:#x} lies outside the data area")
                host = start + offset - first * size
                yield Mapping(Kind.DATA, offset, stop - offset, self.file, host, writable)
            else:
                yield Mapping(Kind.UNALLOCATED, offset, stop - offset)
            offset = stop

    # Writing

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        found: list[Allocation] = []
        size = self.cluster_size
        length = min(-(-(offset + length) // size) * size, len(self._bat) * size) - offset
        for run in list(self.map(offset, length)):
            if run.kind is Kind.DATA:
                found.append(Allocation(run.offset, run.length, self.file, run.host, fresh=False))
                continue
            start = run.offset - run.offset % size
            span = run.offset + run.length - start
            host = self._end
            if (host + span) // self._unit > 0xFFFFFFFF:
                raise BlockError(errno.EFBIG, "the image file cannot grow any more")
            self._end += span
            found.append(Allocation(start, span, self.file, host, fresh=True, zeroed=host >= self.file.size))
        return found

    def commit(self, allocations: Sequence[Allocation]) -> None:
        size, step = self.cluster_size, self.cluster_size // self._unit
        for allocation in allocations:
            if allocation.fresh:
                first, entry = allocation.offset // size, allocation.host // self._unit
                for number in range(allocation.length // size):
                    self._bat[first + number] = entry + number * step
                    self._dirty.add((first + number) // PAGE)

    def flush(self) -> None:
        if self._dirty:
            self.file.flush()
            self._write_back()
        self.file.flush()

    def _write_back(self) -> None:
        for page in sorted(self._dirty):
            piece = self._bat[page * PAGE : (page + 1) * PAGE]
            self.file.pwrite(Header.LENGTH + 4 * page * PAGE, dump(piece, "little"))
        self._dirty.clear()

    def _mark(self, value: int) -> None:
        self._own_mark = value == IN_USE
        self._header.in_use = value
        self.file.pwrite(*self._header.pack_fields("in_use"))
        self.file.flush()

    def close(self) -> None:
        if not self.readonly:
            self.flush()
            if self._header.in_use == IN_USE and self._end >= self._data:
                self._mark(0)

    def reopen(self, *, readonly: bool) -> None:
        if readonly and not self.readonly:
            self.close()
        elif not readonly and self.readonly:
            if self._header.in_use == IN_USE:
                raise ImageError(self._name, "parallels: Image was not closed correctly; cannot be opened read/write")
            self._mark(IN_USE)
        self.readonly = readonly

    # Checking

    def check(self, *, repair: str = "") -> dict[str, Any]:
        messages: list[str] = []
        corruptions = leaks = corruptions_fixed = leaks_fixed = 0
        all_, verb = repair == "all", "Repairing" if repair == "all" else "ERROR"
        size, unit, bat = self.cluster_size, self._unit, self._bat
        limit = self.file.size
        if self._header.in_use == IN_USE and not self._own_mark:
            messages.append(f"{verb} image was not closed correctly")
            corruptions += 1
            corruptions_fixed += all_
        owner: dict[int, int] = {}
        allocated = fragmented = previous = 0
        end = self._data
        for number, entry in enumerate(bat):
            if not entry:
                previous = 0
                continue
            start = entry * unit
            if start < self._data or start + size > max(limit, self._data):
                messages.append(f"{verb} cluster {number} is outside image")
                corruptions += 1
                previous = 0
                if all_:
                    corruptions_fixed += 1
                    bat[number] = 0
                    self._dirty.add(number // PAGE)
                continue
            if entry in owner:
                # Whose bytes they are cannot be known, so nothing is changed.
                messages.append(f"ERROR cluster {number} shares host offset {start:#x} with cluster {owner[entry]}")
                corruptions += 1
            owner.setdefault(entry, number)
            allocated += 1
            fragmented += bool(previous and entry != previous + size // unit)
            previous = entry
            end = max(end, start + size)
        self._end = max(end, self._header.ext_off * SECTOR + size if self._header.ext_off else 0)
        if limit > self._end:
            leaked = -(-(limit - self._end) // size)
            leaks += leaked
            fixing = repair in ("leaks", "all")
            prefix = "Repairing" if fixing else "ERROR"
            messages.append(f"{prefix} space leaked at the end of the image {limit - self._end}")
            if fixing:
                self.file.truncate(self._end)
                leaks_fixed += leaked
        if all_ and not self.readonly:
            self.flush()
            if corruptions == corruptions_fixed and self._header.in_use == IN_USE and not self._own_mark:
                self._mark(0)
        result: dict[str, Any] = {
            "check-errors": 0,
            "image-end-offset": self._end,
            "total-clusters": len(bat),
            "allocated-clusters": allocated,
            "fragmented-clusters": fragmented,
            "compressed-clusters": 0,
            "messages": messages,
        }
        if repair:
            # What was mended is no longer wrong.
            corruptions -= corruptions_fixed
            leaks -= leaks_fixed
        for key, value in (
            ("corruptions", corruptions),
            ("leaks", leaks),
            ("corruptions-fixed", corruptions_fixed),
            ("leaks-fixed", leaks_fixed),
        ):
            if value:
                result[key] = value
        return result

    # New images

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        cluster = options.pop("cluster_size", None) or 1 << 20
        if cluster % SECTOR or cluster >= 1 << 31:
            raise UsageError(f"cluster_size={cluster}: a multiple of {SECTOR} below 2 GiB is needed")
        entries = -(-size // cluster)
        if entries > MAX_ENTRIES:
            raise UsageError("Image size is too large for this cluster size")
        total = -(-size // SECTOR)
        data = -(-(Header.LENGTH + 4 * entries) // cluster) * cluster
        header = Header(
            cylinders=min(total // 16 // 32, 0xFFFFFFFF),
            tracks=cluster // SECTOR,
            bat_entries=entries,
            sectors=total,
            data_off=data // SECTOR,
        )
        file.pwrite(0, header.pack())
        file.truncate(data)
