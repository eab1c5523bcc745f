"""Moving blocks into the places of blocks that are zeroes, so that the file gets shorter (``compact``).

The header counts the blocks in the file, and programs take it for the number of the next one: so it goes down only when
the block map on disk names nothing behind it, and the file is cut off after that.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.relocation import FREE, Units
from vm_core.block.tables import places, run_length

from .header import UNALLOCATED, ZERO

if TYPE_CHECKING:
    from .image import Vdi


class VdiRelocation(Units):
    """Blocks, by their numbers; their owners are guest blocks."""

    def __init__(self, image: Vdi) -> None:
        self.image = image
        found = places(image.block_map, ZERO, 1)
        end = max((number + count for number, count, _ in found), default=0)
        owner = array("I", (FREE,)) * end
        for number, count, index in found:
            owner[number : number + count] = array("I", range(index, index + count))
        super().__init__(image.file, image.header.offset_data, image.cluster_size, owner, image.header.blocks_in_image)

    def owners(self, offset: int, length: int) -> range:
        unit = self.image.cluster_size
        return range(offset // unit, -(-(offset + length) // unit))

    def leave(self, owners: Sequence[int]) -> None:
        # What is not there is a parent's, if there is one.
        marker = ZERO if self.image.header.differencing else UNALLOCATED
        for index in owners:
            self.image.place(index, marker)
        self.image.flush()

    def enter(self, moves: Sequence[tuple[int, int]]) -> None:
        for index, number in moves:
            self.image.place(index, number)
        self.image.flush()

    def cut(self, count: int) -> None:
        free: list[int] = []
        at = 0
        while at < count:
            if self.places[at] == FREE:
                some = run_length(self.places, at, count, 0)
                free.extend(range(at, at + some))
                at += some
            else:
                at += 1
        self.image.cut(count, free)
