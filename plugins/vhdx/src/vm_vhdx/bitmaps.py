"""Sector bitmaps: a bit a sector, least significant first; set: the sector is in this image (2.4)."""

from __future__ import annotations

from collections.abc import Iterator

from vm_core.block.node import Node
from vm_core.block.pages import Pages

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


class Bitmaps(Pages):
    """The bitmaps of one image, in sectors of 4 KiB by their position in the file."""

    def __init__(self, file: Node) -> None:
        super().__init__(file, SECTOR, KEPT)

    def read(self, start: int, length: int) -> bytes:
        """The bytes of bitmaps at *start* in the file."""
        first, end = start // SECTOR * SECTOR, start + length
        pieces = [self.get(at) for at in range(first, end, SECTOR)]
        return b"".join(pieces)[start - first : end - first]

    def cached(self, start: int, length: int) -> bool:
        """Whether :meth:`read` needs no reading."""
        return all(map(self.holds, range(start // SECTOR * SECTOR, start + length, SECTOR)))

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
            self.change(sector * SECTOR)[within : within + some] = data[done : done + some]
            done += some
