"""Differencing images: sectors that are there or the parent's.

Here the unit is the logical sector: of a block that is partially present a bitmap tells which sectors are in it; the
others go on being the parent's. The bitmaps of the blocks of a chunk lie in a block of their own (2.4, 2.5.1.2).

Two changes that no guest notices are made before data is written. A block that is not there becomes one of which no
sector is there; a block of zeroes becomes one that is there, full of zeroes. So a write finds the block in place, and
only the bits of its sectors wait for the data.

The order of a flush: the data, and zeroes, first; a **barrier**; then through the log (``log.py``) the bitmaps, and
after them the table, the last sectors of it first, since the entry of a chunk's bitmaps comes behind those of its
blocks. So whatever part of it is on the disk, each block that the table names has the bitmap that tells about it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vm_core.block.format import BackingReference
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.block.parents import recorded_parent
from vm_core.errors import ImageError, UsageError

from .bitmaps import Bitmaps, runs
from .headers import MIB, Headers
from .image import Vhdx
from .log import Log
from .metadata import Metadata, build_locator, replace_locator
from .parents import linkage
from .regions import Region
from .table import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, STATES, ZERO, Table


class DifferencingVhdx(Vhdx):
    """One open differencing image."""

    #: QEMU has none.
    zero_parts = True
    emptied_first = True

    def __init__(
        self, file: Node, name: str, headers: Headers, log: Log, regions: list[Region], metadata: Metadata, table: Table
    ) -> None:
        super().__init__(file, name, headers, log, regions, metadata, table)
        self._bitmaps = Bitmaps(file)
        #: Bytes of the bitmap of a block.
        self._bits = metadata.block_size // metadata.sector_size // 8

    def _prepare_writing(self) -> None:
        super()._prepare_writing()
        for text in self.table.misplaced(self.regions, self.file.size):
            raise ImageError(self.name, f"{text}: open it read-only")
        # Of the last block, what is behind the disk need not be in the file.
        self._end = max(self._end, self.table.end())

    # Reading

    def _bitmap(self, block: int) -> int:
        """Where the bitmap of *block* is. Raises ImageError where that cannot be."""
        start = self.table.bitmaps(block)
        if start is None:
            raise ImageError(self.name, f"block {block} has no sector bitmap")
        place = start + block % self.table.ratio * self._bits
        if place + self._bits > self._known_end:
            self._known_end = max(self._known_end, self.file.size)
            if place + self._bits > self._known_end:
                raise ImageError(self.name, f"the sector bitmap of block {block} lies outside the file, at {place:#x}")
        return place

    def _partial(self, block: int, host: int, start: int, stop: int) -> list[Mapping]:
        sector = self.metadata.sector_size
        base = block * self.cluster_size
        place = self._bitmap(block)
        first, after = (start - base) // sector, -(-(stop - base) // sector)
        skipped = first // 8 * 8
        data = self._bitmaps.read(place + first // 8, -(-after // 8) - first // 8)
        writable = self._begun and not self.readonly
        found: list[Mapping] = []
        for present, number, count in runs(data, first - skipped, after - skipped):
            number += skipped
            begin = max(start, base + number * sector)
            length = min(stop, base + (number + count) * sector) - begin
            if present:
                self._check_place(block, host + begin - base, length)
                found.append(Mapping(Kind.DATA, begin, length, self.file, host + begin - base, writable))
            else:
                found.append(Mapping(Kind.UNALLOCATED, begin, length))
        return found

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        unit = self.cluster_size
        for run in self.table.runs(offset // unit, -(-(offset + length) // unit)):
            if run.state == PARTIALLY_PRESENT and not self._bitmaps.cached(self._bitmap(run.block), self._bits):
                return None
        return self.map(offset, length)

    # Writing

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        self._begin()
        unit, sector = self.cluster_size, self.metadata.sector_size
        end = offset + length
        start, stop = offset // sector * sector, -(-end // sector) * sector
        found: list[Allocation] = []
        try:
            for block in range(start // unit, -(-stop // unit)):
                base = block * unit
                first, after = max(start, base), min(stop, base + unit)
                run = next(self.table.runs(block, block + 1))
                if run.state == NOT_PRESENT and first == base and after >= min(base + unit, self.size):
                    # All of it is written: it needs no bitmap.
                    host = self._take(1)[0][0]
                    found.append(Allocation(first, after - first, self.file, host, True, token=block))
                    continue
                host, state = self._put(block)
                if state == FULLY_PRESENT:
                    pieces = [Mapping(Kind.DATA, first, after - first, self.file, host + first - base)]
                else:
                    pieces = self._partial(block, host, first, after)
                for one in pieces:
                    if one.kind is Kind.DATA:
                        # In place exactly what is written, not whole sectors.
                        begin, finish = max(one.offset, offset), min(one.offset + one.length, end)
                        found.append(Allocation(begin, finish - begin, self.file, host + begin - base, False))
                    else:
                        found.append(Allocation(one.offset, one.length, self.file, host + one.offset - base, True))
        except BaseException:
            self.abort([one for one in found if one.fresh])
            raise
        return found

    def _put(self, block: int) -> tuple[int, int]:
        """Have *block* be there, wholly or partially: where it is and in which state. It reads as it did before."""
        run = next(self.table.runs(block, block + 1))
        if run.state not in STATES:
            raise self._bad_state(block, run.state)
        if run.state in (FULLY_PRESENT, PARTIALLY_PRESENT):
            return run.host, run.state
        if run.state == NOT_PRESENT:
            self._put_bitmaps(block)
            host = self._take(1)[0][0]
            self._bitmaps.clear(self._bitmap(block), self._bits)
            self.table.enter(block, 1, host, PARTIALLY_PRESENT)
            return host, PARTIALLY_PRESENT
        host, _, zeroed = self._take(1)[0]
        if not zeroed:
            self.file.zero(host, self.cluster_size)
        self.table.enter(block, 1, host)
        return host, FULLY_PRESENT

    def _put_bitmaps(self, block: int) -> None:
        """Have the block of bitmaps be there that tells about *block*, all zeroes where it is new."""
        if self.table.bitmaps(block) is None:
            start, size = self._end, self.file.size
            if size < start + MIB:
                self.file.truncate(start + MIB)
            if start < size:
                self.file.zero(start, MIB)
            self._end = start + MIB
            self.table.enter_bitmaps(block, start)

    def commit(self, allocations: Sequence[Allocation]) -> None:
        unit, sector = self.cluster_size, self.metadata.sector_size
        for one in allocations:
            if one.token is not None:
                self.table.enter(one.token, 1, one.host)
                continue
            block, within = divmod(one.offset, unit)
            self._bitmaps.mark(self._bitmap(block), within // sector, one.length // sector)
        if self._bitmaps.many:
            self.flush()

    def abort(self, allocations: Sequence[Allocation]) -> None:
        unit = self.cluster_size
        # Other blocks are in the table, and there they stay.
        super().abort([one._replace(length=unit) for one in allocations if one.token is not None])

    def blank(self, offset: int, length: int) -> bool:
        return self.zero(offset, length, unmap=True)

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        unit, end = self.cluster_size, offset + length
        if offset % unit or (end % unit and end != self.size):
            return False
        for run in self.table.runs(offset // unit, -(-end // unit)):
            if run.state in (FULLY_PRESENT, PARTIALLY_PRESENT):
                self._begin()
                inside = min(run.length * unit, self.size - run.block * unit)
                self.file.zero(run.host, inside, unmap=unmap)
                if run.state == PARTIALLY_PRESENT:
                    self.table.enter(run.block, 1, run.host)
            elif run.state == NOT_PRESENT:
                self._begin()
                self.table.enter_state(run.block, run.length, ZERO)
        return True

    def flush(self) -> None:
        if self.readonly:
            return
        self.file.flush()
        if self._bitmaps.dirty or self.table.dirty:
            self.log.write(self._bitmaps.pending() + self.table.pending()[::-1])
            self._bitmaps.clean()
            self.table.clean()

    # The image as a whole

    def empty(self) -> None:
        self._begin()
        self.table.empty()
        self.flush()
        # An entry of the log tells how long the file was.
        self.log.clear()
        end = max(one.end for one in self.regions)
        if end < self.file.size:
            self.file.truncate(end)
        self._end, self._free, self._known_end = end, [], end
        self._bitmaps = Bitmaps(self.file)

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """Name another parent, through the log."""
        from .overlay import look_at

        if not filename:
            raise UsageError("a differencing VHDX image has a parent: convert it to make one that has none")
        if format not in (None, "vhdx"):
            raise UsageError(f"the parent of a VHDX image is a VHDX image, not one of format '{format}'")
        parent = look_at(filename, self.file.filename, self.size)
        self._begin()
        self._name(parent.locator)
        self.backing_reference = BackingReference(filename, "vhdx")

    def _name(self, locator: dict[str, str]) -> None:
        """Write another parent locator."""
        if not self._begun:
            self.headers.begin(visible=False)
        self.flush()
        region = next(one for one in self.regions if one.name == "metadata")
        self.log.write(replace_locator(self.file, region, self.name, build_locator(locator)))
        self.metadata = self.metadata._replace(locator=locator)

    def backing_commits(self, node: Node) -> None:
        """From now on the parent fits before the change and after it (*parent_linkage2*)."""
        parent = self._recorded(node)
        if parent is not None:
            self._name({**self.metadata.locator, "parent_linkage2": linkage(parent.next_state)})

    def backing_committed(self, node: Node) -> None:
        parent = self._recorded(node)
        if parent is not None:
            locator = {key: value for key, value in self.metadata.locator.items() if key != "parent_linkage2"}
            locator["parent_linkage"] = linkage(parent.headers.current.data_write_guid)
            if locator != self.metadata.locator:
                self._name(locator)

    def _recorded(self, node: Node) -> Vhdx | None:
        """The driver of the backing image *node* if that is the recorded one."""
        parent, reference = recorded_parent(node), self.backing_reference
        if not isinstance(parent, Vhdx) or reference is None:
            return None
        try:
            path = os.path.join(os.path.dirname(self.name), reference.filename)
            return parent if os.path.samefile(path, parent.file.filename) else None
        except OSError:
            return None
