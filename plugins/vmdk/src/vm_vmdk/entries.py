"""Runs of grain table entries: grains that lie one behind the other for the guest and in the file, found by comparing
whole slices of a table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from vm_core.block.tables import run_length


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
