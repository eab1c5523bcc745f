"""The sector bitmaps of blocks: a bit a sector, most significant first; set: the sector is in the block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from vm_core.block.node import Node

#: Bytes of bitmaps that are kept although they are on disk as they are, and of those that wait to be written.
KEPT = 4 << 20


def bit_runs(bitmap: bytes | bytearray, first: int, stop: int) -> Iterator[tuple[bool, int, int]]:
    """Runs of equal bits of those from *first* to *stop*: the bit, its first place, how many there are."""
    start = first // 8
    piece = bitmap[start : -(-stop // 8)]
    base = start * 8
    # As a text of ones and zeroes, in which the next change is found at the speed of memory.
    text = format(int.from_bytes(piece, "big"), f"0{len(piece) * 8}b")
    position = first
    while position < stop:
        bit = text[position - base] == "1"
        change = text.find("0" if bit else "1", position - base)
        after = stop if change < 0 else min(stop, base + change)
        yield bit, position, after - position
        position = after


def set_bits(bitmap: bytearray, first: int, count: int) -> None:
    """Set *count* bits from *first* on."""
    stop = first + count
    start, after = first // 8, -(-stop // 8)
    mask = ((1 << count) - 1) << (after * 8 - stop)
    value = int.from_bytes(bitmap[start:after], "big") | mask
    bitmap[start:after] = value.to_bytes(after - start, "big")


class Bitmaps:
    """The bitmaps of one image by the position of their block, read when they are first asked for."""

    def __init__(self, file: Node, length: int) -> None:
        """*length* is that of each, in bytes."""
        self._file = file
        self._length = length
        #: Those that are on disk as they are, the longest unused first.
        self._clean: OrderedDict[int, bytearray] = OrderedDict()
        self._dirty: dict[int, bytearray] = {}

    def get(self, start: int) -> bytearray:
        """The bitmap of the block at *start*."""
        found = self._dirty.get(start)
        if found is None:
            found = self._clean.get(start)
            if found is None:
                found = self._clean[start] = bytearray(self._file.pread(start, self._length))
                self._trim()
            else:
                self._clean.move_to_end(start)
        return found

    def _trim(self) -> None:
        while len(self._clean) * self._length > KEPT:
            self._clean.popitem(last=False)

    def cached(self, start: int) -> bool:
        """Whether :meth:`get` needs no reading."""
        return start in self._dirty or start in self._clean

    def new(self, start: int) -> None:
        """The block at *start* is new: no sector is in it."""
        self._clean.pop(start, None)
        self._dirty[start] = bytearray(self._length)

    def mark(self, start: int, first: int, count: int) -> None:
        """Sectors are now in the block."""
        found = self._dirty[start] = self.get(start)
        self._clean.pop(start, None)
        set_bits(found, first, count)

    @property
    def many(self) -> bool:
        """So many wait to be written that they should be."""
        return len(self._dirty) * self._length > KEPT

    def pending(self) -> list[tuple[int, bytearray]]:
        """What has to be written, by position."""
        return sorted(self._dirty.items())

    def clean(self) -> None:
        """All of that is on disk."""
        self._clean.update(self._dirty)
        self._dirty.clear()
        self._trim()
