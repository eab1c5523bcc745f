"""Moving clusters into the places of such as are zeroes or nobody's, so that the file gets shorter (``compact``).

Tables stay where they are. While anything changes the image is marked as one to be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.relocation import Units, arrange

from .tables import UNALLOCATED, ZERO

if TYPE_CHECKING:
    from .image import Qed


class QedRelocation(Units):
    """Clusters; their owners are guest clusters."""

    def __init__(self, image: Qed) -> None:
        self.image = image
        header, unit = image.header, image.cluster_size
        length = header.table_length
        fixed = [(0, header.header_size * unit), (header.l1_table_offset, header.l1_table_offset + length)]
        fixed += [(where, where + length) for where in image.tables.l1 if where != UNALLOCATED]
        owners = len(image.tables.l1) * header.entries
        super().__init__(image.file, 0, unit, arrange(0, unit, self._found(), fixed), owners)

    def _found(self) -> list[tuple[int, int, int]]:
        tables, header = self.image.tables, self.image.header
        size, found = header.cluster_size, list[tuple[int, int, int]]()
        for number, where in enumerate(tables.l1):
            if where == UNALLOCATED:
                continue
            for page in range(header.entries // tables.page_entries):
                table = tables.page(number, page)
                assert table is not None
                base = number * header.entries + page * tables.page_entries
                at = 0
                while at < len(table):
                    entry, count = table[at], 1
                    if entry > ZERO:
                        while at + count < len(table) and table[at + count] == entry + count * size:
                            count += 1
                        found.append((entry, count, base + at))
                    at += count
        return found

    def owners(self, offset: int, length: int) -> range:
        return range(offset // self.unit, -(-(offset + length) // self.unit))

    def leave(self, owners: Sequence[int]) -> None:
        entry = ZERO if self.image.backing_reference is not None else UNALLOCATED
        self._set([(index, entry) for index in owners])

    def enter(self, moves: Sequence[tuple[int, int]]) -> None:
        self.image.file.flush()
        self._set([(index, place * self.unit) for index, place in moves])

    def _set(self, entries: list[tuple[int, int]]) -> None:
        image = self.image
        image.changing()
        for index, entry in entries:
            image.tables.set(index, 1, entry, 0)
            if image.tables.many_waiting:
                image.flush()
        image.flush()

    def cut(self, count: int) -> None:
        self.image.cut(count * self.unit)
