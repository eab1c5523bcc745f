"""Runs of grain table entries: grains that lie one behind the other for the guest and in the file, found by comparing
whole slices of a table.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

#: Pieces of a table that are compared at once, at first and at most.
_FIRST = 16
_MOST = 4096


def from_bytes(code: str, data: bytes | bytearray) -> array[int]:
    """A table (*code* as in :mod:`array`) from its little-endian bytes."""
    table = array(code)
    table.frombytes(data)
    if sys.byteorder == "big":
        table.byteswap()
    return table


def to_bytes(table: array[int]) -> bytes:
    """A table's little-endian bytes."""
    if sys.byteorder == "big":
        table = table[:]
        table.byteswap()
    return table.tobytes()


def run_length(table: array[int], index: int, stop: int, step: int) -> int:
    """How many entries from *index* on each are *step* more than the one before."""
    first = table[index]
    if index + 1 < stop and table[index + 1] != first + step:
        return 1  # most runs of fragmented images
    count, chunk, code = 1, _FIRST, table.typecode
    while index + count < stop:
        size = min(chunk, stop - index - count)
        piece = table[index + count : index + count + size]
        start = first + count * step
        if start + size * step >> 8 * table.itemsize:
            size = max(((1 << 8 * table.itemsize) - start) // step, 0)  # the numbers end here
            stop = index + count + size
            piece = piece[:size]
        wanted = array(code, range(start, start + size * step, step)) if step else array(code, (first,)) * size
        if piece != wanted:
            for have, want in zip(piece, wanted, strict=True):
                if have != want:
                    return count
                count += 1
        count += size
        if chunk < _MOST:
            chunk *= 4
    return count


def runs(table: array[int], start: int, stop: int, step: int, zeroed: int) -> Iterator[tuple[int, int, int]]:
    """Runs of the entries from *start* to *stop*: (first index, count, first entry).

    Entries of 0 and of *zeroed* (-1 where there is none) repeat, others ascend by *step* (0: each is a run).
    """
    index = start
    while index < stop:
        entry = table[index]
        if entry == 0 or entry == zeroed:
            count = run_length(table, index, stop, 0)
        elif step:
            count = run_length(table, index, stop, step)
        else:
            count = 1
        yield index, count, entry
        index += count
