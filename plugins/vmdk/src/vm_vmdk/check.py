"""Checking an image: every grain that a table names lies in its file, and nothing lies where something else does.

QEMU stops at the first grain past the end of the file and fails. That a grain is used twice, which it does not look
for, is told as a corruption. Nothing can be repaired: an entry that is wrong does not tell what it was.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Any

from vm_core.errors import BlockError, ImageError, UsageError, VmError

from .entries import runs
from .header import SECTOR
from .sparse import SparseExtent

if TYPE_CHECKING:
    from .image import Vmdk

#: Messages that are kept.
_MOST = 100
#: Runs of grains among which overlaps are looked for, at most: of more fragmented extents only the first ones.
_MOST_RUNS = 1 << 20


def check(image: Vmdk, *, repair: str = "") -> dict[str, Any]:
    """The result in the shape of ImageCheck. Raises BlockError (EINVAL) with a note where QEMU gives up.

    Nobody else uses the image meanwhile.
    """
    if repair:
        raise UsageError("images of this format cannot be checked and repaired: an entry does not tell what it was")
    messages: list[str] = []
    corruptions = 0
    for extent in image.extents:
        if isinstance(extent, SparseExtent):
            corruptions += _check_extent(extent, messages)
    found: dict[str, Any] = {"check-errors": 0}
    if corruptions:
        found["corruptions"] = corruptions
        found["messages"] = messages
    return found


def _check_extent(extent: SparseExtent, messages: list[str]) -> int:
    grain, size = extent.grain, extent.file.size
    step = extent.geometry.grain_sectors
    zeroed = -1 if not extent.zeroed else 1
    entries = extent.geometry.table_entries
    total = -(-extent.length // grain)
    #: Starts of grains met so far, in runs that ascend.
    starts = array("Q")
    tables = extent.tables
    count = len(tables.directory)
    number = 0
    while number < count:
        try:
            table = tables.get(number)
        except VmError as error:
            raise _failed(extent, number * entries, "could not get cluster_offset for sector {}", error) from None
        if table is None:
            number = tables.absent(number, count)
            continue
        stop = min(entries, total - number * entries)
        for index, length, entry in runs(table, 0, stop, 0 if extent.compressed else step, zeroed):
            if entry == 0 or entry == zeroed:
                continue
            last = entry + (length - 1) * step
            if last * SECTOR >= size:
                bad = max(0, -(-(size - entry * SECTOR) // grain))
                raise _failed(
                    extent, number * entries + index + bad, "cluster offset for sector {} points after EOF", None
                )
            if len(starts) < 2 * _MOST_RUNS:
                starts.append(entry)
                starts.append(length)
        number += 1
    return _overlaps(extent, starts, step, messages)


def _failed(extent: SparseExtent, grain: int, text: str, cause: VmError | None) -> BlockError:
    """QEMU's way: a line about the grain, and a check that failed."""
    sector = (extent.start + grain * extent.grain) // SECTOR
    error = BlockError.of(errno.EINVAL)
    error.add_note(f"ERROR: {text.format(sector)}")
    if isinstance(cause, ImageError):
        error.add_note(cause.reason)
    return error


def _overlaps(extent: SparseExtent, starts: array[int], step: int, messages: list[str]) -> int:
    """Runs of grains that overlap; of compressed ones whether one starts where another does."""
    pairs = sorted(zip(starts[::2], starts[1::2], strict=True))
    found = 0
    end = 0
    for place, length in pairs:
        if place < end:
            found += 1
            if len(messages) < _MOST:
                messages.append(f"ERROR: the grain at {place * SECTOR:#x} is used more than once")
        end = max(end, place + (1 if extent.compressed else length * step))
    return found
