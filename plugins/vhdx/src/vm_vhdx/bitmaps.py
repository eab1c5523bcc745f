"""Sector bitmaps: a bit a sector, least significant first; set: the sector is in this image (2.4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from vm_core.block.node import Node

from .log import SECTOR

#: Sectors of bitmaps that are kept although they are on disk as they are, and of those that wait to be written.
KEPT = 1024


def runs(bitmap: bytes, first: int, stop: int) -> Iterator[tuple[bool, int, int]]:
    """Runs of equal bits of those from *first* to *stop*: the bit, its first place, how many there are."""
    # As a text of ones and zeroes, last bit first, in which the next change is found at the speed of memory.
    text = format(int.from_bytes(bitmap, "little"), f"0{len(bitmap) * 8}b")[::-1]
    position = first
    while position < stop:
        bit = text[position] == "1"
        change = text.find("0" if bit else "1", position)
        after = stop if change < 0 else min(stop, change)
        yield bit, position, after - position
        position = after


class Bitmaps:
    """The bitmaps of one image, in sectors of 4 KiB by their position in the file, read when first asked for."""

    def __init__(self, file: Node) -> None:
        self._file = file
        #: Those that are on disk as they are, the longest unused first.
        self._clean: OrderedDict[int, bytearray] = OrderedDict()
        self._dirty: dict[int, bytearray] = {}

    def read(self, start: int, length: int) -> bytes:
        """The bytes of bitmaps at *start* in the file."""
        first, end = start // SECTOR * SECTOR, start + length
        pieces = [self._sector(at) for at in range(first, end, SECTOR)]
        return b"".join(pieces)[start - first : end - first]

    def cached(self, start: int, length: int) -> bool:
        """Whether :meth:`read` needs no reading."""
        sectors = range(start // SECTOR * SECTOR, start + length, SECTOR)
        return all(at in self._clean or at in self._dirty for at in sectors)

    def _sector(self, at: int) -> bytearray:
        found = self._dirty.get(at)
        if found is None:
            found = self._clean.get(at)
            if found is None:
                found = self._clean[at] = bytearray(self._file.pread(at, SECTOR))
                self._trim()
            else:
                self._clean.move_to_end(at)
        return found

    def _trim(self) -> None:
        while len(self._clean) > KEPT:
            self._clean.popitem(last=False)

    def clear(self, start: int, length: int) -> None:
        """No sector is in this image of those that the bytes at *start* tell about."""
        self._change(start, bytes(length))

    def mark(self, start: int, first: int, count: int) -> None:
        """*count* sectors are in this image, those from bit *first* on of the bitmap at *start*."""
        at, after = first // 8, -(-(first + count) // 8)
        bits = int.from_bytes(self.read(start + at, after - at), "little")
        bits |= ((1 << count) - 1) << (first - at * 8)
        self._change(start + at, bits.to_bytes(after - at, "little"))

    def _change(self, start: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            sector, within = divmod(start + done, SECTOR)
            some = min(SECTOR - within, len(data) - done)
            at = sector * SECTOR
            found = self._dirty[at] = self._sector(at)
            self._clean.pop(at, None)
            found[within : within + some] = data[done : done + some]
            done += some

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    @property
    def many(self) -> bool:
        """So many wait to be written that they should be."""
        return len(self._dirty) > KEPT

    def pending(self) -> list[tuple[int, bytes]]:
        """The sectors that have to be written, as (offset, contents)."""
        return [(at, bytes(contents)) for at, contents in sorted(self._dirty.items())]

    def clean(self) -> None:
        """All of that is on disk."""
        self._clean.update(self._dirty)
        self._dirty.clear()
        self._trim()
