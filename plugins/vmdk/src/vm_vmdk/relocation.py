"""Moving grains into the places of grains that are zeroes, so that extents' files get shorter (``compact``).

Each sparse extent whose grains are not compressed is a matter of its own. Grain tables stay where they are, and so do
grains that lie at no whole number of grains from the start of the file.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.relocation import Move, Relocation, Units, arrange

from .entries import runs
from .header import GTE_ZEROED, SECTOR
from .sparse import SparseExtent, read_header

if TYPE_CHECKING:
    from .image import Vmdk


class VmdkRelocation(Relocation):
    """All extents of an image, one after the other."""

    def __init__(self, image: Vmdk) -> None:
        backed = image.backing_reference is not None
        self._extents = [
            _Grains(one, backed)
            for one in image.extents
            if isinstance(one, SparseExtent) and not (one.compressed or one.cowd or one.readonly)
            and (one.zeroed or not backed)
        ]  # fmt: skip
        self._at = 0

    @property
    def possible(self) -> bool:
        """Whether there is any such extent."""
        return bool(self._extents)

    def plan(self) -> tuple[int, int]:
        plans = [one.plan() for one in self._extents]
        return sum(moved for moved, _ in plans), sum(gained for _, gained in plans)

    def unwanted(self, offset: int, length: int) -> bool:
        stop = offset + length
        for one in self._extents:
            start, end = one.extent.start, one.extent.end
            if start <= offset and stop <= end:
                return one.unwanted(offset - start, length)
        return False

    def prepare(self, limit: int) -> Sequence[Move]:
        while self._at < len(self._extents):
            moves = self._extents[self._at].prepare(limit)
            if moves:
                return moves
            self._at += 1
        return ()

    def complete(self) -> None:
        self._extents[self._at].complete()

    def abandon(self) -> None:
        self._extents[self._at].abandon()


class _Grains(Units):
    """The grains of one extent, in places that are whole grains from the start of the file."""

    def __init__(self, extent: SparseExtent, backed: bool) -> None:
        self.extent = extent
        # What is not there is a backing image's.
        self._marker = GTE_ZEROED if backed else 0
        extent.tables.load_redundant()
        total = -(-extent.length // extent.grain)
        super().__init__(
            extent.file, 0, extent.grain, arrange(0, extent.grain, self._found(total), self._fixed()), total
        )

    def _found(self, total: int) -> list[tuple[int, int, int]]:
        extent, tables = self.extent, self.extent.tables
        entries, step = extent.geometry.table_entries, extent.geometry.grain_sectors
        found: list[tuple[int, int, int]] = []
        number = 0
        while number < len(tables.directory):
            table = tables.get(number)
            if table is None:
                number = tables.absent(number, len(tables.directory))
                continue
            base = number * entries
            if base >= total:
                break
            for index, count, entry in runs(
                table, 0, min(entries, total - base), step, GTE_ZEROED if extent.zeroed else -1
            ):
                if entry > (1 if extent.zeroed else 0):
                    found.append((entry * SECTOR, count, base + index))
            number += 1
        return found

    def _fixed(self) -> list[tuple[int, int]]:
        """All that is no grain."""
        extent, tables = self.extent, self.extent.tables
        header = read_header(extent.file, extent.name)
        fixed = [(0, max(extent.geometry.overhead, SECTOR))]
        start = header.descriptor_offset * SECTOR
        fixed.append((start, start + header.descriptor_size * SECTOR))
        size = len(tables.directory) * 4
        for offset in (extent.geometry.directory_offset, extent.geometry.redundant_offset):
            if offset is not None:
                fixed.append((offset, offset + size))
        for directory in (tables.directory, tables.redundant):
            for number in range(len(directory or ())):
                assert directory is not None
                place = directory[number]
                if place > (1 if extent.zeroed else 0):
                    fixed.append((place * SECTOR, place * SECTOR + tables.bytes))
        return [(start, min(end, extent.file.size)) for start, end in fixed if start < end]

    def owners(self, offset: int, length: int) -> range:
        return range(offset // self.unit, -(-(offset + length) // self.unit))

    def leave(self, owners: Sequence[int]) -> None:
        for index in owners:
            self._set(index, self._marker)
        self.extent.flush()

    def enter(self, moves: Sequence[tuple[int, int]]) -> None:
        # Tables may be written while the rest is still being entered.
        self.extent.file.flush()
        for index, place in moves:
            self._set(index, place * self.unit // SECTOR)
        self.extent.flush()

    def _set(self, index: int, entry: int) -> None:
        tables = self.extent.tables
        number, at = divmod(index, self.extent.geometry.table_entries)
        if tables.full:
            tables.write_back()
        tables.check_writable(number)
        tables.set(number, at, array("I", (entry,)))

    def cut(self, count: int) -> None:
        self.extent.cut(count * self.unit)
