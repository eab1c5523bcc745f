"""Moving blocks into the places of blocks that are zeroes, so that the file gets shorter (``compact``).

Blocks move with their bitmaps. The footer goes behind the last block, where a block was that the table on disk does not
name any more; its copy at the start of the file stands in for it meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.relocation import FREE, Units, arrange
from vm_core.block.tables import places

from .footer import SECTOR
from .table import UNUSED

if TYPE_CHECKING:
    from .dynamic import DynamicVpc


class VpcRelocation(Units):
    """Blocks with their bitmaps; their owners are guest blocks."""

    def __init__(self, image: DynamicVpc) -> None:
        self.image = image
        self.table = table = image.table
        found = [
            (start * SECTOR, count, index)
            for start, count, index in places(table.entries, UNUSED, table.stride // SECTOR)
        ]
        origin = min((start for start, _, _ in found), default=table.end)
        # Images of other programs may have them between blocks, or behind them.
        fixed = [(first * SECTOR, last * SECTOR) for first, last in table.metadata if last * SECTOR > origin]
        super().__init__(
            image.file, origin, table.stride, arrange(origin, table.stride, found, fixed), len(table.entries)
        )

    def owners(self, offset: int, length: int) -> range:
        unit = self.image.cluster_size
        return range(offset // unit, -(-(offset + length) // unit))

    def leave(self, owners: Sequence[int]) -> None:
        for index in owners:
            self.table.leave(index)
        self.image.flush()

    def enter(self, moves: Sequence[tuple[int, int]]) -> None:
        for index, place in moves:
            self.table.enter(index, self.origin + place * self.unit)
        self.image.flush()

    def cut(self, count: int) -> None:
        free = [self.origin + place * self.unit for place in range(count) if self.places[place] == FREE]
        self.table.cut(self.origin + count * self.unit, free)
        self.image.flush()
