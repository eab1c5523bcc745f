"""Dynamic images: blocks that are there or not. What is not there reads as zeroes.

The sector bitmaps say nothing that matters here: sectors never written are zeroes in the file (*Block Bitmap and
Data*). Like QEMU's, new blocks get a bitmap in which every sector counts as written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.block.tables import run_length

from .footer import SECTOR, DynamicHeader, Footer
from .image import Vpc
from .table import UNUSED, Table

if TYPE_CHECKING:
    from vm_core.block.relocation import Relocation


class DynamicVpc(Vpc):
    """One open dynamic image."""

    emptied_first = False

    def __init__(
        self, file: Node, name: str, footer: Footer, header: DynamicHeader, sectors: int, *, readonly: bool
    ) -> None:
        self.file = file
        self.name = name
        self.footer = footer
        self.sectors = sectors
        self.readonly = readonly
        self.cluster_size = header.block_size
        self.table = Table(file, name, footer, header)
        if not readonly:
            self.table.prepare_writing()
        #: Bitmaps of new blocks, by their position, that are not on disk yet.
        self._bitmaps: set[int] = set()

    def map(self, offset: int, length: int) -> Sequence[Mapping]:
        unit, entries = self.cluster_size, self.table.entries
        skip = self.table.bitmap_size
        end = offset + length
        index, stop = offset // unit, -(-end // unit)
        writable = not self.readonly
        found: list[Mapping] = []
        while index < stop:
            entry = entries[index]
            if entry == UNUSED:
                index += run_length(entries, index, stop, 0)
                after = min(index * unit, end)
                found.append(Mapping(Kind.ZERO, offset, after - offset))
            else:
                index += 1
                after = min(index * unit, end)
                host = entry * SECTOR + skip + offset % unit
                found.append(Mapping(Kind.DATA, offset, after - offset, self.file, host, writable))
            offset = after
        return found

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        return self.map(offset, length)

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        unit, entries, table = self.cluster_size, self.table.entries, self.table
        end = offset + length
        found: list[Allocation] = []
        try:
            for index in range(offset // unit, -(-end // unit)):
                entry = entries[index]
                base = index * unit
                if entry == UNUSED:
                    start, zeroed = table.take()
                    found.append(Allocation(base, unit, self.file, start + table.bitmap_size, True, zeroed))
                else:
                    first, after = max(base, offset), min(base + unit, end)
                    host = entry * SECTOR + table.bitmap_size + first - base
                    found.append(Allocation(first, after - first, self.file, host, False))
        except BaseException:
            self.abort([one for one in found if one.fresh])
            raise
        return found

    def commit(self, allocations: Sequence[Allocation]) -> None:
        for one in allocations:
            start = one.host - self.table.bitmap_size
            self.table.enter(one.offset // self.cluster_size, start)
            self._bitmaps.add(start)

    def abort(self, allocations: Sequence[Allocation]) -> None:
        self.table.give_back([one.host - self.table.bitmap_size for one in allocations])

    def blank(self, offset: int, length: int) -> bool:
        for run in self.map(offset, length):
            if run.kind is Kind.DATA:
                self.file.zero(run.host, run.length, unmap=True)
        return True

    def flush(self) -> None:
        if self.readonly:
            return
        full = b"\xff" * self.table.bitmap_size
        self.table.flush(((start, full) for start in sorted(self._bitmaps)), wait=False)
        self._bitmaps.clear()

    def relocation(self) -> Relocation:
        from .relocation import VpcRelocation

        return VpcRelocation(self)

    def reopen(self, *, readonly: bool) -> None:
        if readonly:
            self.flush()
        else:
            self.table.prepare_writing()
        self.readonly = readonly

    def close(self) -> None:
        self.flush()
