"""The block allocation table (2.5).

After every ``ratio`` entries for payload blocks comes one for the block of sector bitmaps that belongs to them; between
two of those, payload entries of adjoining blocks are adjoining numbers, which is how runs are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vm_core.block.node import Node
from vm_core.block.tables import dump, load, run_length

from .headers import MIB, invalid
from .log import SECTOR
from .metadata import Metadata
from .regions import Region, overlap_text

#: States of payload blocks (2.5.1.1)
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 6, 7
STATES = (NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT)
#: The state of a bitmap block that is there (2.5.1.2).
BITMAP_PRESENT = 6

STATE_MASK = 7
#: Bits of an entry that are the offset; those between are reserved.
OFFSET_MASK = ~(MIB - 1) & (1 << 64) - 1

_PER_SECTOR = SECTOR // 8
_MAX_OFFSET = (1 << 63) - 1


class Run(NamedTuple):
    """*length* blocks from number *block* on in one *state*; *host* is where the first lies, the others follow it."""

    block: int
    length: int
    state: int
    host: int


class Table:
    """The table in memory."""

    def __init__(self, file: Node, region: Region, metadata: Metadata, name: str) -> None:
        """Read as much of it as the disk needs. Raises ImageError where the region is too small."""
        self.file = file
        self.region = region
        self.name = name
        self.block_size = metadata.block_size
        self.disk_size = metadata.disk_size
        #: Payload blocks of a chunk, whose sector bitmaps are in one block (2.5).
        self.ratio = (1 << 23) * metadata.sector_size // metadata.block_size
        self.blocks = -(-metadata.disk_size // metadata.block_size)
        count = entry_count(self.blocks, self.ratio, metadata.has_parent)
        if 8 * count > region.length or region.offset + 8 * count > file.size:
            raise invalid(
                name,
                f"the block allocation table at {region.offset:#x}, {region.length} bytes, has no room for "
                f"{count} entries",
            )
        self.entries = load("Q", file.pread(region.offset, 8 * count), "little")
        #: Sectors of 4 KiB that differ from those on disk.
        self._dirty: set[int] = set()

    def index(self, block: int) -> int:
        """The entry of a payload block."""
        return block + block // self.ratio

    def bitmap_index(self, block: int) -> int:
        """The entry of the bitmap block that tells about a payload block."""
        return (block // self.ratio + 1) * (self.ratio + 1) - 1

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """The runs of the payload blocks from *first* to *stop*."""
        entries, size = self.entries, self.block_size
        block = first
        while block < stop:
            index = self.index(block)
            limit = index + min(stop - block, self.ratio - block % self.ratio)
            entry = entries[index]
            state = entry & STATE_MASK
            if state == FULLY_PRESENT:
                count = run_length(entries, index, limit, size)
            elif state == PARTIALLY_PRESENT:
                count = 1
            else:
                count = run_length(entries, index, limit, 0)
            yield Run(block, count, state, entry & OFFSET_MASK)
            block += count

    def enter(self, block: int, count: int, host: int, state: int = FULLY_PRESENT) -> None:
        """Have *count* blocks from *block* on lie at *host* and after it."""
        for number in range(count):
            self._set(self.index(block + number), host + number * self.block_size | state)

    def enter_state(self, block: int, count: int, state: int) -> None:
        """Have *count* blocks from *block* on, which lie nowhere any more, be in *state*."""
        for number in range(count):
            self._set(self.index(block + number), state)

    def enter_bitmaps(self, block: int, host: int) -> None:
        """Have the block of sector bitmaps that tells about payload *block* lie at *host*."""
        self._set(self.bitmap_index(block), host | BITMAP_PRESENT)

    def _set(self, index: int, entry: int) -> None:
        self.entries[index] = entry
        self._dirty.add(index // _PER_SECTOR)

    def bitmaps(self, block: int) -> int | None:
        """Where the block of sector bitmaps is that tells about payload *block*; None where there is none."""
        entry: int = self.entries[self.bitmap_index(block)]
        if entry & STATE_MASK == BITMAP_PRESENT:
            return entry & OFFSET_MASK
        return None

    def empty(self) -> None:
        """Have no block anywhere."""
        for index, entry in enumerate(self.entries):
            if entry:
                self._set(index, NOT_PRESENT)

    def leave(self, block: int) -> None:
        """Have *block* lie nowhere."""
        index = self.index(block)
        self.entries[index] = NOT_PRESENT
        self._dirty.add(index // _PER_SECTOR)

    def pending(self) -> list[tuple[int, bytes]]:
        """The sectors that have to be written, as (offset, contents)."""
        found = []
        for sector in sorted(self._dirty):
            piece = self.entries[sector * _PER_SECTOR : (sector + 1) * _PER_SECTOR]
            found.append((self.region.offset + sector * SECTOR, dump(piece, "little").ljust(SECTOR, b"\0")))
        return found

    def clean(self) -> None:
        """All of that is on disk."""
        self._dirty.clear()

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    def faults(self, regions: list[Region], size: int) -> Iterator[str]:
        """What is wrong with the places of present blocks in a file of *size* bytes, in QEMU's words."""
        for run in self.runs(0, self.blocks):
            if run.state != FULLY_PRESENT:
                continue
            length = run.length * self.block_size
            inside = run.host + self._bytes(run.block, run.length) <= size
            if inside and not any(_overlaps(run.host, length, one) for one in regions):
                continue
            for number in range(run.length):  # only now one by one
                block = run.block + number
                yield from self._fault(block, run.host + number * self.block_size, regions, size)

    def _bytes(self, block: int, count: int) -> int:
        """How much of *count* blocks belongs to the disk."""
        return min(count * self.block_size, self.disk_size - block * self.block_size)

    def _fault(self, block: int, host: int, regions: list[Region], size: int) -> Iterator[str]:
        index, length = self.index(block), self._bytes(block, 1)
        end = host + length
        truncated = f"points after end of file ({size}). Image has probably been truncated."
        if end > _MAX_OFFSET:
            yield f"VHDX BAT entry {index} offset overflow."
        if host >= size:
            yield f"VHDX BAT entry {index} start offset {host} {truncated}"
        elif end > size:
            yield f"VHDX BAT entry {index} end offset {end - 1} {truncated}"
        for one in regions:
            if _overlaps(host, self.block_size, one):
                yield overlap_text(host, self.block_size, one)
                break

    def overlaps(self) -> Iterator[tuple[int, int, int]]:
        """Blocks that lie on another one: the block, where it is, the other."""
        places = sorted((run.host, run.length, run.block) for run in self.runs(0, self.blocks) if _present(run))
        end, owner = 0, 0
        for host, length, block in places:
            if host < end:
                yield block, host, owner
            after = host + length * self.block_size
            if after > end:
                end, owner = after, block + length - 1

    def end(self) -> int:
        """Where the last of the payload blocks ends that are in the file."""
        return max(
            (run.host + run.length * self.block_size for run in self.runs(0, self.blocks) if _present(run)), default=0
        )

    def misplaced(self, regions: list[Region], size: int) -> Iterator[str]:
        """What would be destroyed if partially present blocks, and bitmaps, were written where the table says."""
        places = []
        for run in self.runs(0, self.blocks):
            if run.state == PARTIALLY_PRESENT:
                places.append((run.host, self._bytes(run.block, 1), self.block_size, f"block {run.block}"))
            elif run.state == FULLY_PRESENT:
                length = run.length * self.block_size
                places.append((run.host, self._bytes(run.block, run.length), length, f"block {run.block}"))
        for block in range(0, self.blocks, self.ratio):
            start = self.bitmaps(block)
            if start is not None:
                places.append((start, MIB, MIB, f"the sector bitmap block of blocks from {block} on"))
        end, before = 0, ""
        for host, inside, length, what in sorted(places):
            if host + inside > size:
                yield f"{what} at {host:#x} reaches past the end of the file"
            on = next((one.name for one in regions if _overlaps(host, length, one)), "")
            if on or host < end:
                yield f"{what} at {host:#x} lies on {on or before}"
            end, before = host + length, what


def _present(run: Run) -> bool:
    return run.state in (FULLY_PRESENT, PARTIALLY_PRESENT)


def _overlaps(host: int, length: int, region: Region) -> bool:
    return host < region.end and region.offset < host + length


def entry_count(blocks: int, ratio: int, has_parent: bool) -> int:
    """Entries of the table for a disk of *blocks* payload blocks (2.5)."""
    if has_parent:
        return -(-blocks // ratio) * (ratio + 1)
    return blocks + (blocks - 1) // ratio if blocks else 0
