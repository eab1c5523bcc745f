"""L2 tables whose runs are short, handled as a whole.

An image that a guest has used for long has a run for every few clusters, and a run costs as much as hundreds of
entries. What a check wants to know of such a table – which clusters it points at, how often it jumps, which bits are
set – needs no runs: sorted, the entries of most tables are a few long ones again.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from operator import sub

from .entries import BadEntryError, run_length, runs
from .geometry import COPIED, OFFSET_MASK, Geometry

#: Runs that are looked at to judge a table, and the part of it that they have to cover to be worth going on with.
_PROBED, _PART = 16, 8
_WORD = (1 << 64) - 1


def plain_entries(entries: array[int], geometry: Geometry) -> list[int] | None:
    """What a table points at, in its order: the entries that are not zero.

    None where runs are the better way: they are long, or there are other entries than for standard clusters with data.
    """
    if geometry.extended or geometry.external:
        return None
    at = 0
    try:
        for number, run in enumerate(runs(entries, 0, len(entries), geometry)):
            at = run.at
            if number == _PROBED:
                break
        else:
            return None
    except BadEntryError:
        return None
    if at * _PART > len(entries):
        return None
    found = [entry for entry in entries if entry]
    wrong = _WORD ^ (OFFSET_MASK & -geometry.cluster_size | COPIED)
    lanes = int.from_bytes(wrong.to_bytes(8, sys.byteorder) * len(found), sys.byteorder)
    if int.from_bytes(array("Q", found).tobytes(), sys.byteorder) & lanes or COPIED in found:
        return None
    return found


def jumps(hosts: list[int], geometry: Geometry) -> int:
    """How many of *hosts*, in the order of a table, do not follow the one before."""
    return max(0, len(hosts) - 1) - list(map(sub, hosts[1:], hosts)).count(geometry.cluster_size)


def clusters(hosts: list[int], geometry: Geometry) -> Iterator[tuple[int, int]]:
    """The (first, count) of the runs of clusters that *hosts* are, whatever their order."""
    ordered = array("Q", sorted(hosts))
    bits, step, stop = geometry.cluster_bits, geometry.cluster_size, len(ordered)
    index = 0
    while index < stop:
        count = run_length(ordered, index, stop, step)
        yield ordered[index] >> bits, count
        index += count
