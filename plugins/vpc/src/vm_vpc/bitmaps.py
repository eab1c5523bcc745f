"""The sector bitmaps of blocks: a bit a sector, most significant first; set: the sector is in the block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from vm_core.block.node import Node

#: Bytes of bitmaps that are kept although they are on disk as they are.
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
        self._kept: OrderedDict[int, bytearray] = OrderedDict()
        #: Those that differ from the disk.
        self.dirty: set[int] = set()

    def get(self, start: int) -> bytearray:
        """The bitmap of the block at *start*."""
        found = self._kept.get(start)
        if found is None:
            found = self._kept[start] = bytearray(self._file.pread(start, self._length))
            if len(self._kept) * self._length > KEPT and not self.dirty:
                self._kept.popitem(last=False)
        return found

    def cached(self, start: int) -> bool:
        """Whether :meth:`get` needs no reading."""
        return start in self._kept

    def new(self, start: int) -> None:
        """The block at *start* is new: no sector is in it."""
        self._kept[start] = bytearray(self._length)
        self.dirty.add(start)

    def mark(self, start: int, first: int, count: int) -> None:
        """Sectors are now in the block."""
        set_bits(self.get(start), first, count)
        self.dirty.add(start)

    def pending(self) -> list[tuple[int, bytearray]]:
        """What has to be written, by position."""
        return [(start, self._kept[start]) for start in sorted(self.dirty)]

    def clean(self) -> None:
        """All of that is on disk."""
        self.dirty.clear()
        while len(self._kept) * self._length > KEPT:
            self._kept.popitem(last=False)
