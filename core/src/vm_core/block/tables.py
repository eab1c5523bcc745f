"""Tables of numbers in memory: blocks' places as formats keep them, handled many entries at a time.

A run is found by comparing whole slices of a table with what the run would hold, in growing steps: the comparison is
one of memory, so long runs cost next to nothing an entry.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Literal

    Order = Literal["big", "little"]

#: Entries compared in the first step and, at most, in a later one.
_FIRST, _MOST = 16, 4096


def load(code: str, data: bytes | bytearray | memoryview, order: Order) -> array[int]:
    """An array of type *code* (``I``, ``Q``) from *data* in the byte order *order*; *data* is whole entries."""
    entries = array(code)
    entries.frombytes(data)
    if order != sys.byteorder:
        entries.byteswap()
    return entries


def dump(entries: array[int], order: Order) -> bytes:
    """*entries* as bytes in the byte order *order*."""
    if order != sys.byteorder:
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def run_length(entries: array[int], index: int, stop: int, step: int) -> int:
    """How many entries from *index* on, below *stop*, are each *step* more than the one before; at least one."""
    first = entries[index]
    count = 1
    # Most runs of fragmented images end at once.
    if index + 1 < stop and entries[index + 1] != first + step:
        return 1
    code = entries.typecode
    limit = (1 << 8 * entries.itemsize) - 1
    if step > 0:
        stop = min(stop, index + (limit - first) // step + 1)
    chunk = _FIRST
    while index + count < stop:
        size = min(chunk, stop - index - count)
        piece = entries[index + count : index + count + size]
        start = first + count * step
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


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Ascending *numbers* as runs (first, count) of consecutive ones."""
    first = last = -1
    for number in numbers:
        if number != last + 1 or first < 0:
            if first >= 0:
                yield first, last + 1 - first
            first = number
        last = number
    if first >= 0:
        yield first, last + 1 - first


def places(entries: array[int], limit: int, step: int, most: int | None = None) -> list[tuple[int, int, int]]:
    """Runs of the entries below *limit* as (first value, how many, index), each *step* more than the one before.

    Raises ValueError where there are more than *most*: a table of many entries that all say the same has as many runs.
    """
    found: list[tuple[int, int, int]] = []
    index, stop = 0, len(entries)
    while index < stop:
        entry = entries[index]
        if entry < limit:
            count = run_length(entries, index, stop, step)
            if entry + (count - 1) * step >= limit:
                count = (limit - 1 - entry) // step + 1
            found.append((entry, count, index))
            if most is not None and len(found) > most:
                raise ValueError(f"more than {most} runs")
        else:
            count = run_length(entries, index, stop, 0)
        index += count
    return found
