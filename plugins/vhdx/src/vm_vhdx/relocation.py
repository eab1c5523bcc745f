"""Moving blocks into the places of blocks that are zeroes, so that the file gets shorter (``compact``).

Entries of the log tell how long the file was: it gets shorter only when the log is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.relocation import FREE, Units, arrange

from .table import FULLY_PRESENT

if TYPE_CHECKING:
    from .image import Vhdx


class VhdxRelocation(Units):
    """Payload blocks; their owners are guest blocks."""

    def __init__(self, image: Vhdx) -> None:
        self.image = image
        table, unit = image.table, image.cluster_size
        found = [(run.host, run.length, run.block) for run in table.runs(0, table.blocks) if run.state == FULLY_PRESENT]
        after = max(region.end for region in image.regions)
        origin = min((host for host, _, _ in found), default=after)
        fixed = [(region.offset, region.end) for region in image.regions if region.end > origin]
        super().__init__(image.file, origin, unit, arrange(origin, unit, found, fixed), table.blocks)

    def owners(self, offset: int, length: int) -> range:
        unit = self.image.cluster_size
        return range(offset // unit, -(-(offset + length) // unit))

    def leave(self, owners: Sequence[int]) -> None:
        self.image.changing()
        for block in owners:
            self.image.table.leave(block)
        self.image.flush()

    def enter(self, moves: Sequence[tuple[int, int]]) -> None:
        self.image.changing()
        for block, place in moves:
            self.image.table.enter(block, 1, self.origin + place * self.unit)
        self.image.flush()

    def cut(self, count: int) -> None:
        free = [self.origin + place * self.unit for place in range(count) if self.places[place] == FREE]
        self.image.cut(self.origin + count * self.unit, free)
