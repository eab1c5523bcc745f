"""The block allocation table, and the order in which everything reaches the disk.

A block is a bitmap of its sectors and then its data; the table gives the sector at which that begins. New blocks go
where the footer is, which moves behind them. So between two flushes the footer at the end of the file may be
overwritten with data: its copy at the start of the file is there for that.

The order of a flush:

1. Sector bitmaps that tell about sectors in blocks which the table names already wait for the data: a **barrier**.
2. The bitmaps, and the footer behind the last block. A **barrier**: what the table will name is on the disk.
3. The sectors of the table that changed, and a last **barrier**.

At every instant each block that the table on disk names is full of what its bitmap says. A power cut before step 3
costs space that nobody uses.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vm_core.block.node import Node
from vm_core.block.tables import dump, load, places, runs
from vm_core.errors import ImageError

from .footer import FOOTER_LENGTH, HEADER_LENGTH, SECTOR, DynamicHeader, Footer, footer_at_end, seal, sealed
from .image import truncated

#: An entry of the table that names no block.
UNUSED = 0xFFFFFFFF
#: Blocks lying on one another that an image may have and still be read.
SPARE = 1000
#: Entries in a sector of the table.
_PER_SECTOR = SECTOR // 4


class Space(NamedTuple):
    """Host space of a new block: where its bitmap begins, and whether its data is known to read as zeroes."""

    start: int
    zeroed: bool


class Table:
    """The table in memory, the end of the blocks, and writing back."""

    def __init__(
        self,
        file: Node,
        name: str,
        footer: Footer,
        header: DynamicHeader,
        others: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Read the table and check it. Raises ImageError.

        *others* are further places (offset, length) of metadata, which lie in the file.
        """
        self.file = file
        self.name = name
        self.footer = footer
        self.offset = header.table_offset
        count = header.max_table_entries
        self.entries: array[int] = load("I", file.pread(self.offset, 4 * count), "big")
        self.block_size = header.block_size
        #: Bytes of a bitmap: one bit a sector, in whole sectors.
        self.bitmap_size = -(-header.block_size // (8 * SECTOR * SECTOR)) * SECTOR
        #: Bytes of a block with its bitmap.
        self.stride = self.bitmap_size + self.block_size
        self.others = list(others)
        #: Where the next block goes.
        self.end = max(last for _, last in self.metadata) * SECTOR
        #: Where it goes where there are no blocks.
        self._first = self.end
        for start, length in self._places():
            self.end = max(self.end, start * SECTOR + length * self.stride)
        if self.end > -(-file.size // SECTOR) * SECTOR:
            raise truncated(name)
        #: Sectors of the table that differ from those on disk.
        self._dirty: set[int] = set()
        #: The footer has to be written behind the last block.
        self._moved = False
        #: Blocks that were given back and are not the last.
        self._free: list[int] = []

    def prepare_writing(self) -> None:
        """Raise ImageError where a write could destroy what another entry or the metadata holds.

        A footer that is missing or broken at the end of the file is put back with the next flush.
        """
        footer = footer_at_end(self.file)
        self._moved = footer is None or not sealed(footer[1], 64)
        metadata = self.metadata
        for place, (first, last) in enumerate(metadata[:3]):
            if any(first < stop and start < last for start, stop in metadata[:place]):
                raise ImageError(
                    self.name, f"the metadata at sector {first} lies on other metadata: open the image read-only"
                )
        step = self.stride // SECTOR
        end = 0
        for start, length in sorted(self._places()):
            if any(start < last and start + length * step > first for first, last in metadata):
                raise self._damaged(f"sector {start}, where metadata is")
            if start < end:
                raise self._damaged(f"overlapping blocks at sector {start}")
            end = start + length * step

    @property
    def metadata(self) -> tuple[tuple[int, int], ...]:
        """The (first, last and one) sectors of the footer's copy, the header, the table, and what else there is."""
        return (
            (0, 1),
            _sectors(self.footer.data_offset, HEADER_LENGTH),
            _sectors(self.offset, 4 * len(self.entries)),
            *[_sectors(offset, length) for offset, length in self.others],
        )

    def _places(self) -> list[tuple[int, int]]:
        """Runs of blocks one behind the other: the first one's sector, how many.

        Raises ImageError where there are more than the file has room for.
        """
        most = self.file.size // self.stride + SPARE
        try:
            return [(start, length) for start, length, _ in places(self.entries, UNUSED, self.stride // SECTOR, most)]
        except ValueError:
            raise ImageError(
                self.name,
                f"the block allocation table at {self.offset:#x} names more blocks of {self.block_size} bytes than the "
                f"file has room for ({self.file.size} bytes)",
            ) from None

    def _damaged(self, what: str) -> ImageError:
        return ImageError(self.name, f"the block allocation table names {what}: open it read-only")

    def take(self) -> Space:
        """Host space for one block. The file reaches to its end afterwards. Raises OSError where it cannot."""
        size = self.file.size
        if self._free:
            start = self._free.pop(0)
        else:
            start = self.end
            after = start + self.stride
            if after // SECTOR > UNUSED:
                raise ImageError(self.name, "the image has grown as large as a VHD file can be (2 TiB)")
            if size < after:
                self.file.truncate(after)
            self.end = after
            self._moved = True
        return Space(start, start + self.bitmap_size >= size)

    def give_back(self, starts: Iterable[int]) -> None:
        """Blocks of :meth:`take` that will not be used."""
        self._free.extend(starts)
        self._free.sort()
        while self._free and self._free[-1] + self.stride == self.end:
            self.end = self._free.pop()
            self._moved = True

    def enter(self, index: int, start: int) -> None:
        """Have guest block *index* be the block at *start*, from the next flush on also on disk."""
        self.entries[index] = start // SECTOR
        self._dirty.add(index // _PER_SECTOR)

    def add_metadata(self, length: int) -> int:
        """Room for *length* more bytes of metadata, whole sectors, where the footer is: where that begins.

        Nothing in the file's start may speak of it before the next flush.
        """
        start = self.end
        self.end = self._first = start + length
        self._moved = True
        return start

    def rewrite_footer(self) -> None:
        """The footer was changed, and that at the file's start is on the disk: so will the other one be."""
        self._moved = True
        self.flush((), wait=False)

    def empty(self) -> None:
        """Forget all blocks, on the disk too, and give their space back."""
        count = len(self.entries)
        for index in range(0, count, _PER_SECTOR):
            piece = self.entries[index : index + _PER_SECTOR]
            if piece != array("I", (UNUSED,)) * len(piece):
                self.entries[index : index + len(piece)] = array("I", (UNUSED,)) * len(piece)
                self._dirty.add(index // _PER_SECTOR)
        self.flush((), wait=False)
        self._free.clear()
        if self.end != self._first:
            self.end = self._first
            self._moved = True
            self.flush((), wait=False)

    def leave(self, index: int) -> None:
        """Have guest block *index* be no block, from the next flush on also on disk."""
        self.entries[index] = UNUSED
        self._dirty.add(index // _PER_SECTOR)

    def cut(self, end: int, free: list[int]) -> None:
        """The blocks end at *end*, those at *free* before that are nobody's; all of it is so on disk."""
        self.end, self._free = end, free
        self._moved = True

    def flush(self, bitmaps: Iterable[tuple[int, bytes | bytearray]], *, wait: bool) -> None:
        """Bring everything to the disk; *bitmaps* are (position, contents) to be written, *wait* for data first.

        After an error it can be called again.
        """
        if wait:
            self.file.flush()
        for start, contents in bitmaps:
            self.file.pwrite(start, contents)
        if self._moved:
            self.file.pwrite(self.end, seal(self.footer))
            if self.file.size > self.end + FOOTER_LENGTH:
                self.file.truncate(self.end + FOOTER_LENGTH)
            self._moved = False
        self.file.flush()
        if self._dirty:
            for first, count in runs(sorted(self._dirty)):
                start = first * _PER_SECTOR
                piece = self.entries[start : start + count * _PER_SECTOR]
                self.file.pwrite(self.offset + first * SECTOR, dump(piece, "big"))
            self.file.flush()
            self._dirty.clear()


def _sectors(offset: int, length: int) -> tuple[int, int]:
    """The first of the sectors that a place in the file lies on, and the one behind the last."""
    return offset // SECTOR, -(-(offset + length) // SECTOR)
