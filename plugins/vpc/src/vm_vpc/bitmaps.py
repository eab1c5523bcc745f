"""The sector bitmaps of blocks: a bit a sector, most significant first; set: the sector is in the block."""

from __future__ import annotations

from collections.abc import Iterator

from vm_core.block.node import Node
from vm_core.block.pages import Pages

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


class Bitmaps(Pages):
    """The bitmaps of one image by the position of their block."""

    def __init__(self, file: Node, length: int) -> None:
        """*length* is that of each, in bytes."""
        super().__init__(file, length, KEPT // length)

    def mark(self, start: int, first: int, count: int) -> None:
        """Sectors are now in the block at *start*."""
        set_bits(self.change(start), first, count)
