"""Sector bitmaps: a bit a sector, least significant first; set: the sector is in this image (2.4)."""

from __future__ import annotations

from collections.abc import Iterator


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
