"""The driver: one open VDI image.

The block map is in memory as a whole. A write takes the next free block numbers, the core fills the blocks, and only
then their numbers are entered into the map (:meth:`Vdi.commit`).

What reaches the disk, and when, is :meth:`Vdi.flush`'s: first the data and, in the header, how many blocks are taken;
then a barrier; then the sectors of the map that changed; and another barrier. So at every instant each number in the
map on disk names a block that is full of its data, and no program that opens the image will hand that block out again.
A power cut between the barriers costs blocks that nobody uses.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.format import BackingReference, Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.block.tables import dump, load, places, run_length, runs
from vm_core.errors import ImageError, UsageError

from .header import DIFFERENCING, DYNAMIC, NO_UUID, SECTOR, STATIC, UNALLOCATED, ZERO, Header, read_header

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext
    from vm_core.block.relocation import Relocation

#: Blocks that an image may have lost with the end of its file and still be written to.
_SPARE = 1000
#: Entries of the block map in a sector.
_PER_SECTOR = SECTOR // 4


class Vdi(Format):
    """One open image. ``_map[n]`` is the number of the block that holds guest block *n*, or one of the markers."""

    create_failure = "Error writing header"

    def __init__(self, file: Node, name: str, header: Header, *, readonly: bool) -> None:
        """Read the block map; for writing also see to it that it can be added to. Raises ImageError."""
        self.file = file
        self.name = name
        self.header = header
        self.readonly = readonly
        self.cluster_size = header.block_size
        self._data = header.offset_data
        # Of a block map that is cut off, as much as there is: what is not there names nothing that could be read.
        there = max(0, file.size - header.offset_bmap) // 4
        count = min(header.blocks_in_image, there)
        self._map: array[int] = load("I", file.pread(header.offset_bmap, 4 * count), "little")
        self._set_absent(header.differencing)
        #: Sectors of the block map that differ from those on disk.
        self._dirty: set[int] = set()
        #: Number of the next new block, and of those below it that were given back.
        self._next = 0
        self._free: list[int] = []
        self._known_end = file.size
        if not readonly:
            self._prepare_writing()

    def _set_absent(self, differencing: bool) -> None:
        #: What a block that is not here reads as.
        self._absent = Kind.UNALLOCATED if differencing else Kind.ZERO
        # QEMU has no differencing images, and writes zeroes into the others.
        self.zero_parts = differencing
        self.emptied_first = differencing or self.header.image_type == STATIC

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Vdi:
        name = context.filename or file.filename
        header = read_header(file, name)
        self = cls(file, name, header, readonly=context.readonly)
        if header.differencing:
            from .parents import find_parent

            self.backing_reference = BackingReference(find_parent(header, name, context), "vdi")
        # All blocks are there from the start, most of them as holes.
        self.sparse = header.image_type == STATIC
        return self

    def _prepare_writing(self) -> None:
        fault = self._cut_off() if len(self._map) < self.header.blocks_in_image else self.header.misplaced()
        if fault:
            raise self._error(f"{fault}: open it read-only")
        end = 0
        room = max(0, self.file.size - self._data) // self.cluster_size
        try:
            runs_of_blocks = sorted(places(self._map, ZERO, 1, room + _SPARE))
        except ValueError:
            raise self._error(
                f"the block map names more blocks than the file has room for ({room}): open it read-only"
            ) from None
        for number, count, _ in runs_of_blocks:
            if number < end:
                raise self._error(f"the block map names block {number} twice: open it read-only")
            end = number + count
        if end > self.header.blocks_in_image:
            raise self._error(
                f"the block map names block {end - 1} of {self.header.blocks_in_image}: open it read-only"
            )
        self._next = end

    def _cut_off(self) -> str:
        header = self.header
        return (
            f"the block map at {header.offset_bmap:#x} ({header.blocks_in_image} entries) reaches past the end of the "
            "file"
        )

    def _error(self, reason: str) -> ImageError:
        return ImageError(self.name, reason)

    @property
    def size(self) -> int:
        return self.header.disk_size

    # Reading

    def map(self, offset: int, length: int) -> Sequence[Mapping]:
        unit, entries = self.cluster_size, self._map
        end = offset + length
        index, stop = offset // unit, -(-end // unit)
        if stop > len(entries):
            raise self._error(self._cut_off())
        found: list[Mapping] = []
        while index < stop:
            number = entries[index]
            if number < ZERO:
                count = run_length(entries, index, stop, 1)
                host = self._place(index, number, count) + offset % unit
                after = min((index + count) * unit, end)
                found.append(Mapping(Kind.DATA, offset, after - offset, self.file, host, not self.readonly))
            else:
                count = run_length(entries, index, stop, 0)
                after = min((index + count) * unit, end)
                kind = Kind.ZERO if number == ZERO else self._absent
                if found and found[-1].kind is kind:  # both markers, which mean the same without a parent
                    found[-1] = found[-1]._replace(length=found[-1].length + after - offset)
                else:
                    found.append(Mapping(kind, offset, after - offset))
            index += count
            offset = after
        return found

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        return self.map(offset, length)

    def _place(self, index: int, number: int, count: int) -> int:
        """Where block *number* lies, the first of *count* for guest blocks from *index* on. Raises ImageError."""
        last = number + count - 1
        end = self._data + last * self.cluster_size
        if end >= self._known_end:
            self._known_end = max(self._known_end, self.file.size)
            if end >= self._known_end or last >= self.header.blocks_in_image:
                raise self._error(f"block {last} of guest block {index + count - 1} lies outside the file, at {end:#x}")
        return self._data + number * self.cluster_size

    # Writing

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        unit, entries = self.cluster_size, self._map
        end = offset + length
        index, stop = offset // unit, -(-end // unit)
        found: list[Allocation] = []
        while index < stop:
            number = entries[index]
            if number < ZERO:
                count = run_length(entries, index, stop, 1)
                start = max(index * unit, offset)
                host = self._place(index, number, count) + start % unit
                after = min((index + count) * unit, end)
                found.append(Allocation(start, after - start, self.file, host, False))
                index += count
            else:
                count = run_length(entries, index, stop, 0)
                for number, some in self._take(count):
                    host = self._data + number * unit
                    zeroed = host >= self.file.size
                    found.append(Allocation(index * unit, some * unit, self.file, host, True, zeroed))
                    index += some
        self._extend(found)
        return found

    def _extend(self, allocations: Sequence[Allocation]) -> None:
        """Have the file reach to the end of fresh blocks: they are whole, also where zeroes are not written."""
        fresh = [one for one in allocations if one.fresh]
        end = max((one.host + one.length for one in fresh), default=0)
        if self.file.size < end:
            try:
                self.file.truncate(end)
            except BaseException:
                self.abort(fresh)
                raise

    def _take(self, count: int) -> list[tuple[int, int]]:
        """Runs (first number, count) of *count* new blocks: those given back first, the rest at the end."""
        taken: list[tuple[int, int]] = []
        while self._free and count:
            taken.append((self._free.pop(0), 1))
            count -= 1
        if count:
            taken.append((self._next, count))
            self._next += count
        return taken

    def commit(self, allocations: Sequence[Allocation]) -> None:
        unit, entries = self.cluster_size, self._map
        for one in allocations:
            index, count = one.offset // unit, one.length // unit
            number = (one.host - self._data) // unit
            entries[index : index + count] = array("I", range(number, number + count))
            self._touch(index, count)

    def _touch(self, index: int, count: int) -> None:
        self._dirty.update(range(index // _PER_SECTOR, (index + count - 1) // _PER_SECTOR + 1))

    def abort(self, allocations: Sequence[Allocation]) -> None:
        unit = self.cluster_size
        for one in allocations:
            number = (one.host - self._data) // unit
            self._free.extend(range(number, number + one.length // unit))
        self._free.sort()
        while self._free and self._free[-1] == self._next - 1:
            self._next = self._free.pop()

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        return self.zero_parts and self._zero(offset, length, unmap)

    def blank(self, offset: int, length: int) -> bool:
        return self._zero(offset, length, True)

    def _zero(self, offset: int, length: int, unmap: bool) -> bool:
        unit = self.cluster_size
        for run in self.map(offset, length):
            if run.kind is Kind.DATA:
                # The block stays the guest block's: a format without free space management has no use for holes.
                self.file.zero(run.host, run.length, unmap=unmap)
            elif run.kind is Kind.UNALLOCATED:
                index, count = run.offset // unit, -(-run.length // unit)
                self._map[index : index + count] = array("I", (ZERO,)) * count
                self._touch(index, count)
        return True

    def flush(self) -> None:
        if not self.readonly and (self._dirty or self.header.blocks_allocated != self._next):
            self._write_count()
            self.file.flush()
            for first, count in runs(sorted(self._dirty)):
                start = first * _PER_SECTOR
                piece = self._map[start : start + count * _PER_SECTOR]
                self.file.pwrite(self.header.offset_bmap + first * SECTOR, dump(piece, "little"))
            self.file.flush()
            self._dirty.clear()
        else:
            self.file.flush()

    def _write_count(self) -> None:
        header = self.header
        if header.blocks_allocated != self._next:
            former, header.blocks_allocated = header.blocks_allocated, self._next
            try:
                self.file.pwrite(*header.pack_fields("blocks_allocated"))
            except BaseException:
                header.blocks_allocated = former
                raise

    def empty(self) -> None:
        """Forget all blocks: the map first, then the count, and only then the file's end."""
        if not self.header.differencing:
            raise UsageError("an image without a parent cannot be emptied")
        self.flush()
        for index in range(0, len(self._map), _PER_SECTOR):
            piece = self._map[index : index + _PER_SECTOR]
            blank = array("I", (UNALLOCATED,)) * len(piece)
            if piece != blank:
                self._map[index : index + len(piece)] = blank
                self._dirty.add(index // _PER_SECTOR)
        self.flush()
        self.cut(0, [])

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """Name another parent, by its UUIDs; without one what is not here reads as zeroes."""
        from .parents import look_at

        if format not in (None, "vdi"):
            raise UsageError(f"the parent of a VDI image is a VDI image, not one of format '{format}'")
        header = self.header
        link = parent = NO_UUID
        if filename:
            if header.image_type == STATIC:
                raise UsageError("a static VDI image has no parent")
            below, whole = look_at(filename, self.file.filename)
            if whole > self.size:
                raise UsageError(f"'{filename}' has {whole} bytes: a VDI image is no smaller than the one below it")
            link, parent = below.uuid_image, below.uuid_last_snap
        self.flush()
        self._link(link, parent, DIFFERENCING if filename else DYNAMIC if header.differencing else header.image_type)
        self.backing_reference = BackingReference(filename, "vdi") if filename else None
        self._set_absent(bool(filename))

    def _link(self, link: bytes, parent: bytes, kind: int) -> None:
        """Write the parent's UUIDs and the image's type, all in one sector."""
        header = self.header
        former = header.uuid_link, header.uuid_parent, header.image_type
        if former == (link, parent, kind):
            return
        header.uuid_link, header.uuid_parent, header.image_type = link, parent, kind
        try:
            start, data = header.pack_fields("image_type", "uuid_parent")
            # As it is on disk, but for these.
            sector = bytearray(self.file.pread(0, SECTOR))
            for name in ("image_type", "uuid_link", "uuid_parent"):
                field = header.field(name)
                sector[field.offset : field.end] = data[field.offset - start : field.end - start]
            self.file.pwrite(0, bytes(sector))
            self.file.flush()
        except BaseException:
            header.uuid_link, header.uuid_parent, header.image_type = former
            raise

    def backing_committed(self, node: Node) -> None:
        from vm_core.block.parents import recorded_parent

        below, header = recorded_parent(node), self.header
        if not isinstance(below, Vdi) or below.header.uuid_image != header.uuid_link or header.uuid_parent == NO_UUID:
            return
        self._link(header.uuid_link, below.header.uuid_last_snap, header.image_type)

    def reopen(self, *, readonly: bool) -> None:
        if readonly:
            self.flush()
        else:
            self._prepare_writing()
        self.readonly = readonly

    def close(self) -> None:
        if not self.readonly:
            self.flush()

    def check(self, *, repair: str = "") -> dict[str, Any]:
        from .check import check

        if repair:
            raise UsageError("VDI images cannot be checked and repaired: checking alone tells what is wrong")
        return check(self.header, self._map)

    # Compacting

    def relocation(self) -> Relocation | None:
        if self.header.image_type == STATIC:  # every block is to have its place
            return None
        from .relocation import VdiRelocation

        return VdiRelocation(self)

    @property
    def block_map(self) -> array[int]:
        """The number of each guest block's block, or a marker. Not to be changed."""
        return self._map

    def place(self, index: int, number: int) -> None:
        """Let guest block *index* be block *number*, or what this marker says, from the next flush on."""
        self._map[index] = number
        self._touch(index, 1)

    def cut(self, count: int, free: list[int]) -> None:
        """End the file behind *count* blocks, of which those numbered *free* hold nothing. The map is stable."""
        self._next, self._free = count, free
        self.flush()
        end = self._data + count * self.cluster_size
        if end < self.file.size:
            self.file.truncate(end)
        self._known_end = self.file.size

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .create import create

        create(file, size, options)
