"""The driver: one open VHDX image.

A write takes space at the end of the file, the core fills it, and only then the blocks are entered into the block
allocation table, in memory. :meth:`Vhdx.flush` brings it to the disk: the data first, then a **barrier**, then the
table through the log (``log.py``). At every instant the image on disk is one whose table, after its log has been
replayed, names only blocks that are full of their data. A power cut costs at most space at the end of the file.

Nothing is changed before the first write: the headers get new GUIDs then, by which differencing images notice it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.format import BackingReference, Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.errors import ImageError

from . import guids
from .headers import MIB, Headers, invalid
from .log import Log
from .metadata import Metadata, read_metadata
from .regions import Region, check_overlaps, read_regions
from .table import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, STATES, Table

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext
    from vm_core.block.relocation import Relocation


class Vhdx(Format):
    """One open image."""

    create_failure = "Failed to write file signature: {}"
    peer_maps = False
    zero_parts = False
    emptied_first = False

    def __init__(
        self, file: Node, name: str, headers: Headers, log: Log, regions: list[Region], metadata: Metadata, table: Table
    ) -> None:
        self.file = file
        self.name = name
        self.headers = headers
        self.log = log
        #: Where no block can be.
        self.regions = regions
        self.metadata = metadata
        self.table = table
        self.cluster_size = metadata.block_size
        #: The log had to be replayed when the image was opened.
        self.replayed = False
        #: What a block that is not here reads as.
        self._absent = Kind.UNALLOCATED if metadata.has_parent else Kind.ZERO
        #: The headers tell that the image is being changed.
        self._begun = False
        #: Where the next block goes, and blocks before it that were given back.
        self._end = 0
        self._free: list[int] = []
        self._known_end = file.size

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Vhdx:
        name = context.filename or file.filename
        headers = Headers(file, name)
        log = Log(file, name, headers)
        pending = log.pending()
        if pending:
            if context.readonly:
                raise _dirty_log(name)
            log.replay(pending)
        found = read_regions(file, name)
        regions = [Region("headers", 0, MIB), Region("log", log.offset, log.length), *found.values()]
        check_overlaps(regions, name)
        regions.reverse()  # the order in which QEMU looks for what lies on one
        metadata = read_metadata(file, found[guids.METADATA], name)
        table = Table(file, found[guids.BAT], metadata, name)
        if not getattr(context, "check", False):
            for text in table.faults(regions, file.size):
                raise invalid(name, text)
        kind: type[Vhdx] = cls
        if metadata.has_parent:
            from .differencing import DifferencingVhdx

            kind = DifferencingVhdx
        self = kind(file, name, headers, log, regions, metadata, table)
        self.readonly = context.readonly
        self.replayed = bool(pending)
        if metadata.has_parent:
            from .parents import find_parent

            reference = find_parent(metadata.locator, name, context)
            self.backing_reference = BackingReference(reference, "vhdx") if reference else None
        if not self.readonly:
            self._prepare_writing()
        return self

    def _prepare_writing(self) -> None:
        """Find where blocks can go. Raises ImageError where the log is unusable."""
        for block, host, other in self.table.overlaps():
            raise invalid(self.name, f"block {block} at {host:#x} lies on block {other}: open it read-only")
        if self.log.length < MIB or self.log.offset + self.log.length > self.file.size:
            raise invalid(
                self.name,
                f"a log of {self.log.length} bytes at {self.log.offset:#x} cannot be written: open it read-only",
            )
        end = max(one.end for one in self.regions)
        self._end = -(-max(self.file.size, end) // MIB) * MIB

    @property
    def size(self) -> int:
        return self.metadata.disk_size

    # Reading

    def map(self, offset: int, length: int) -> Sequence[Mapping]:
        unit = self.cluster_size
        end = offset + length
        found: list[Mapping] = []
        for run in self.table.runs(offset // unit, -(-end // unit)):
            base = run.block * unit
            start, stop = max(offset, base), min(end, base + run.length * unit)
            if run.state == FULLY_PRESENT:
                host = run.host + start - base
                self._check_place(run.block, host, stop - start)
                one = Mapping(Kind.DATA, start, stop - start, self.file, host, self._begun and not self.readonly)
            elif run.state == PARTIALLY_PRESENT:
                for piece in self._partial(run.block, run.host, start, stop):
                    _append(found, piece)
                continue
            elif run.state not in STATES:
                raise self._bad_state(run.block, run.state)
            else:
                kind = self._absent if run.state == NOT_PRESENT else Kind.ZERO
                one = Mapping(kind, start, stop - start)
            _append(found, one)
        return found

    def _check_place(self, block: int, host: int, length: int) -> None:
        if host + length > self._known_end:
            self._known_end = max(self._known_end, self.file.size)
            if host + length > self._known_end:
                raise ImageError(self.name, f"block {block} lies outside the file, at {host:#x}")

    def _partial(self, block: int, host: int, start: int, stop: int) -> list[Mapping]:
        """The runs of a block of which some sectors are the parent's. Raises ImageError where there is no parent."""
        raise self._bad_state(block, PARTIALLY_PRESENT)

    def _bad_state(self, block: int, state: int) -> ImageError:
        return ImageError(self.name, f"block {block} is in state {state}, which has no meaning")

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        return self.map(offset, length)

    # Writing

    def _begin(self) -> None:
        if not self._begun:
            self.headers.begin()
            self._begun = True

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        self._begin()
        unit = self.cluster_size
        end = offset + length
        found: list[Allocation] = []
        try:
            for run in self.table.runs(offset // unit, -(-end // unit)):
                base = run.block * unit
                if run.state == FULLY_PRESENT:
                    start, stop = max(offset, base), min(end, base + run.length * unit)
                    host = run.host + start - base
                    self._check_place(run.block, host, stop - start)
                    found.append(Allocation(start, stop - start, self.file, host, False))
                    continue
                if run.state not in STATES or run.state == PARTIALLY_PRESENT:
                    raise self._bad_state(run.block, run.state)
                block = run.block
                for host, count, zeroed in self._take(run.length):
                    found.append(Allocation(block * unit, count * unit, self.file, host, True, zeroed))
                    block += count
        except BaseException:
            self.abort([one for one in found if one.fresh])
            raise
        return found

    def _take(self, count: int) -> list[tuple[int, int, bool]]:
        """Space for *count* blocks, as (where, how many, whether it reads as zeroes). The file reaches to its end."""
        taken: list[tuple[int, int, bool]] = []
        while self._free and count:
            taken.append((self._free.pop(0), 1, False))
            count -= 1
        if count:
            start, size = self._end, self.file.size
            try:
                if size < start + count * self.cluster_size:
                    self.file.truncate(start + count * self.cluster_size)
            except BaseException:
                self._free[:0] = [host for host, _, _ in taken]
                raise
            self._end = start + count * self.cluster_size
            taken.append((start, count, start >= size))
        return taken

    def commit(self, allocations: Sequence[Allocation]) -> None:
        unit = self.cluster_size
        for one in allocations:
            self.table.enter(one.offset // unit, one.length // unit, one.host)

    def abort(self, allocations: Sequence[Allocation]) -> None:
        unit = self.cluster_size
        for one in allocations:
            self._free.extend(range(one.host, one.host + one.length, unit))
        self._free.sort()
        while self._free and self._free[-1] + unit == self._end:
            self._end = self._free.pop()

    def blank(self, offset: int, length: int) -> bool:
        for run in self.map(offset, length):
            if run.kind is Kind.DATA:
                self._begin()
                self.file.zero(run.host, run.length, unmap=True)
        return True

    def relocation(self) -> Relocation | None:
        if self.metadata.has_parent:
            return None
        from .relocation import VhdxRelocation

        return VhdxRelocation(self)

    @property
    def next_state(self) -> bytes:
        """The data write GUID that the image has once a guest's data is changed."""
        return self.headers.current.data_write_guid if self._begun else self.headers.planned()

    def changing(self) -> None:
        """The table is about to change."""
        self._begin()

    def cut(self, end: int, free: list[int]) -> None:
        """End the file at *end*; the places *free* before that are nobody's. The table on disk says so."""
        self.flush()
        self.log.clear()
        self._end, self._free = -(-end // MIB) * MIB, free
        if end < self.file.size:
            self.file.truncate(end)
        self._known_end = self.file.size

    def flush(self) -> None:
        if self.readonly:
            return
        self.file.flush()
        if self.table.dirty:
            self.log.write(self.table.pending())
            self.table.clean()

    def reopen(self, *, readonly: bool) -> None:
        if readonly:
            self.flush()
            self.log.clear()
            self._begun = False
        else:
            pending = self.log.pending()
            if pending:
                self.log.replay(pending)
            self._prepare_writing()
        self.readonly = readonly

    def close(self) -> None:
        if not self.readonly:
            self.flush()
            self.log.clear()

    def check(self, *, repair: str = "") -> dict[str, Any]:
        from .check import check

        return check(self)

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .create import create

        create(file, size, options)


def _append(found: list[Mapping], run: Mapping) -> None:
    """Add a run, to the one before where it goes on."""
    if found:
        last = found[-1]
        if last.kind is run.kind and (run.host < 0 or last.host + last.length == run.host):
            found[-1] = last._replace(length=last.length + run.length)
            return
    found.append(run)


def _dirty_log(name: str) -> ImageError:
    text = f"VHDX image file '{name}' opened read-only, but contains a log that needs to be replayed"
    return ImageError(
        name,
        f"{text}: vm-img check -r all '{name}' does that, as does opening it for writing",
        peer=f"{text}\nTo replay the log, run:\nqemu-img check -r all '{name}'",
    )
