"""Differencing images: sectors that are there or the parent's.

Here the unit is the sector: a write puts its sectors into the block and sets their bits in its bitmap; the others go on
being the parent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.format import BackingReference
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.block.tables import run_length
from vm_core.errors import UsageError

from .bitmaps import Bitmaps, bit_runs
from .footer import HEADER_LENGTH, SECTOR, DynamicHeader, Footer, checksum, locators, seal
from .image import Vpc
from .table import UNUSED, Table

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


class DifferencingVpc(Vpc):
    """One open differencing image."""

    def __init__(
        self,
        file: Node,
        name: str,
        footer: Footer,
        header: DynamicHeader,
        sectors: int,
        raw: bytes,
        *,
        readonly: bool,
    ) -> None:
        """*raw* are the bytes of *header*."""
        self.file = file
        self.name = name
        self.footer = footer
        self.header = header
        self._raw = raw
        self.sectors = sectors
        self.readonly = readonly
        self.cluster_size = SECTOR
        self.table = Table(file, name, footer, header, _locator_places(raw, file.size))
        if not readonly:
            self.table.prepare_writing()
        self.sector_bitmaps = Bitmaps(file, self.table.bitmap_size)
        #: Guest blocks that have host space which the table does not name yet: where it is.
        self._reserved: dict[int, int] = {}
        #: Sectors were put into blocks that the table on disk may name.
        self._changed = False

    def find_parent(self, context: OpenContext) -> None:
        """Find the file that the header says is the parent. Raises ImageError."""
        from .parents import find_parent

        reference = find_parent(self.file, self.header, self._raw, self.name, context)
        self.backing_reference = BackingReference(reference, "vpc") if reference else None

    def map(self, offset: int, length: int) -> Sequence[Mapping]:
        unit, entries = self.table.block_size, self.table.entries
        end = offset + length
        index, stop = offset // unit, -(-end // unit)
        found: list[Mapping] = []
        while index < stop:
            entry = entries[index]
            if entry == UNUSED:
                index += run_length(entries, index, stop, 0)
                after = min(index * unit, end)
                self._append(found, Mapping(Kind.UNALLOCATED, offset, after - offset))
            else:
                base = index * unit
                index += 1
                after = min(base + unit, end)
                self._append_block(found, entry * SECTOR, base, offset, after)
            offset = after
        return found

    def _append_block(self, found: list[Mapping], start: int, base: int, offset: int, end: int) -> None:
        """Add the runs of the block at *start*, which is guest bytes from *base* on, between *offset* and *end*."""
        data = start + self.table.bitmap_size
        first, stop = (offset - base) // SECTOR, -(-(end - base) // SECTOR)
        for present, sector, count in bit_runs(self.sector_bitmaps.get(start), first, stop):
            begin = max(offset, base + sector * SECTOR)
            length = min(end, base + (sector + count) * SECTOR) - begin
            if present:
                run = Mapping(Kind.DATA, begin, length, self.file, data + begin - base, not self.readonly)
            else:
                run = Mapping(Kind.UNALLOCATED, begin, length)
            self._append(found, run)

    @staticmethod
    def _append(found: list[Mapping], run: Mapping) -> None:
        if found and run.kind is Kind.UNALLOCATED and found[-1].kind is Kind.UNALLOCATED:
            found[-1] = found[-1]._replace(length=found[-1].length + run.length)
        else:
            found.append(run)

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        unit, entries = self.table.block_size, self.table.entries
        for index in range(offset // unit, -(-(offset + length) // unit)):
            if entries[index] != UNUSED and not self.sector_bitmaps.holds(entries[index] * SECTOR):
                return None
        return self.map(offset, length)

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        unit, table = self.table.block_size, self.table
        end = -(-(offset + length) // SECTOR) * SECTOR
        start = offset // SECTOR * SECTOR
        found: list[Allocation] = []
        for index in range(start // unit, -(-end // unit)):
            base = index * unit
            first, after = max(start, base), min(end, base + unit)
            if table.entries[index] == UNUSED:
                # Kept although this write may fail: the next one to the block needs it.
                if index not in self._reserved:
                    self._reserved[index] = table.take().start
                host = self._reserved[index] + table.bitmap_size + first - base
                found.append(Allocation(first, after - first, self.file, host, True))
                continue
            for run in self.map(first, after - first):
                if run.kind is Kind.DATA:
                    # In place exactly what is written, not whole sectors.
                    begin, finish = max(run.offset, offset), min(run.offset + run.length, offset + length)
                    host = run.host + begin - run.offset
                    found.append(Allocation(begin, finish - begin, self.file, host, False))
                else:
                    host = table.entries[index] * SECTOR + table.bitmap_size + run.offset - base
                    found.append(Allocation(run.offset, run.length, self.file, host, True))
        return found

    def commit(self, allocations: Sequence[Allocation]) -> None:
        unit, table = self.table.block_size, self.table
        for one in allocations:
            index, within = divmod(one.offset, unit)
            if table.entries[index] == UNUSED:
                host = self._reserved.pop(index)
                table.enter(index, host)
                self.sector_bitmaps.new(host)
            self.sector_bitmaps.mark(table.entries[index] * SECTOR, within // SECTOR, one.length // SECTOR)
            self._changed = True
        if self.sector_bitmaps.many:
            self.flush()

    def flush(self) -> None:
        if self.readonly:
            return
        self.table.flush(self.sector_bitmaps.pending(), wait=self._changed)
        self.sector_bitmaps.clean()
        self._changed = False

    def empty(self) -> None:
        self.flush()
        self._reserved.clear()
        self.table.empty()
        self.sector_bitmaps = Bitmaps(self.file, self.table.bitmap_size)

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """Name another parent.

        The header that does so is written where there is room; the footer at the start of the file, a sector, then
        tells where it is.
        """
        from .overlay import look_at, other_size

        if not filename:
            raise UsageError("a differencing VHD image has a parent: convert it to make one that has none")
        if format not in (None, "vpc", "vhd"):
            raise UsageError(f"the parent of a VHD image is a VHD image, not one of format '{format}'")
        parent, _, whole = look_at(filename, self.file.filename)
        if whole != self.size:
            raise other_size(filename, whole, self.size)
        self.flush()
        header = DynamicHeader.parse(self._raw)
        _, names = parent.describe(header, 0)
        start = self.table.add_metadata(HEADER_LENGTH + len(names))
        raw, names = parent.describe(header, start + HEADER_LENGTH)
        self.file.pwrite(start, raw + names)
        self.table.flush((), wait=False)
        former, self.footer.data_offset = self.footer.data_offset, start
        try:
            self.file.pwrite(0, seal(self.footer))
            self.file.flush()
        except BaseException:
            self.footer.data_offset = former
            raise
        self.header, self._raw = header, raw
        self.table.others += _locator_places(raw, self.file.size)
        self.backing_reference = BackingReference(filename, "vpc")
        self.table.rewrite_footer()

    def backing_committed(self, node: Node) -> None:
        from vm_core.block.parents import recorded_parent

        from .overlay import changed

        parent = recorded_parent(node)
        if not isinstance(parent, Vpc) or parent.footer.uuid != self.header.parent_uuid:
            return
        if self.header.parent_timestamp in (0, parent.footer.timestamp):
            return  # that of whoever made the image
        try:
            now = changed(parent.file.filename)
        except OSError:
            return  # it is no file: who opens the image next is told that the parent may have been changed
        if now == self.header.parent_timestamp:
            return
        raw = bytearray(self._raw)
        for name, value in (("parent_timestamp", now), ("checksum", 0)):
            field = DynamicHeader.field(name)
            raw[field.offset : field.end] = value.to_bytes(4, "big")
        raw[field.offset : field.end] = checksum(raw, field.offset).to_bytes(4, "big")
        # Both are in one sector.
        self.file.pwrite(self.footer.data_offset, bytes(raw[:SECTOR]))
        self.file.flush()
        self.header, self._raw = DynamicHeader.parse(raw), bytes(raw)

    def reopen(self, *, readonly: bool) -> None:
        if readonly:
            self.flush()
        else:
            self.table.prepare_writing()
        self.readonly = readonly

    def close(self) -> None:
        if self._reserved and not self.readonly:
            self.table.give_back(self._reserved.values())
            self._reserved.clear()
        self.flush()


def _locator_places(raw: bytes, size: int) -> list[tuple[int, int]]:
    """Offset and length of the parent locators that lie in the file of *size* bytes."""
    found = [(locator.offset, locator.length) for locator in locators(raw)]
    return [(offset, length) for offset, length in found if offset + length <= size]
