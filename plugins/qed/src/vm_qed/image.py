"""The driver.

Sources: "QED Image Format Specification". New clusters and tables go to the end of the file, in whole clusters. The
order of :mod:`vm_qed.tables` keeps the tables right at every instant; what a power cut can leave behind is space at the
end that nothing refers to. The feature bit *NEED_CHECK* stands while that may be so, and whoever opens such an image
for writing checks it first, as QEMU does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vm_core.block.format import BackingReference, Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.errors import BlockError, ImageError, UsageError

from . import header as headers
from .header import Header
from .tables import UNALLOCATED, ZERO, Tables

if TYPE_CHECKING:
    from vm_core.block.inplace import Source, Target
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext
    from vm_core.block.relocation import Relocation


class Qed(Format):
    """One open image."""

    zero_parts = False

    def __init__(self, file: Node, header: Header, name: str, readonly: bool) -> None:
        self.file = file
        self.readonly = readonly
        self.cluster_size = header.cluster_size
        self.header = header
        self.name = name
        self.tables = Tables(file, header)
        self._damaged = False
        #: Clusters that lie last were given back: the file may be cut off there.
        self._shorter = False
        #: L2 tables that were made for allocations that are not committed yet, by where their clusters are.
        self._made: dict[int, int] = {}

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Qed:
        header = headers.read(file, context.filename)
        self = cls(file, header, context.filename, context.readonly)
        if header.features & headers.BACKING_FILE:
            name = file.pread(header.backing_filename_offset, header.backing_filename_size)
            self.backing_reference = BackingReference(
                name.decode("utf-8", "surrogateescape"),
                "raw" if header.features & headers.BACKING_FORMAT_NO_PROBE else None,
            )
        if not context.readonly:
            self._prepare(check=not context.check)
        return self

    def _prepare(self, *, check: bool) -> None:
        """Make the image one that may be written to."""
        header = self.header
        if header.autoclear_features & ~headers.AUTOCLEAR:
            header.autoclear_features &= headers.AUTOCLEAR
            self._write_header("autoclear_features")
        if check and header.features & headers.NEED_CHECK:
            from .check import check as run

            found = run(self, fix=True)
            # What is wrong still, a cluster in use twice, stays marked, and is opened all the same, as by the peer.
            self._damaged = bool(found.get("corruptions"))
            if not self._damaged:
                self.mark(False)

    @property
    def size(self) -> int:
        return int(self.header.image_size)

    def info(self) -> dict[str, Any]:
        return {}

    # Reading

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        size, tables, file = self.cluster_size, self.tables, self.file
        entries, page_entries = self.header.entries, tables.page_entries
        end, writable = offset + length, not self.readonly
        limit = max(tables.end, file.size)
        while offset < end:
            cluster = offset // size
            number, index = divmod(cluster, entries)
            page, within = divmod(index, page_entries)
            table = tables.page(number, page)
            if table is None:
                stop = min(end, (number + 1) * entries * size)
                yield Mapping(Kind.UNALLOCATED, offset, stop - offset)
                offset = stop
                continue
            most = min(page_entries - within, -(-(end - cluster * size) // size))
            entry = table[within]
            count, step = 1, size if entry > ZERO else 0
            expected = entry + step
            while count < most and table[within + count] == expected:
                count += 1
                expected += step
            stop = min(end, (cluster + count) * size)
            if entry == UNALLOCATED:
                yield Mapping(Kind.UNALLOCATED, offset, stop - offset)
            elif entry == ZERO:
                yield Mapping(Kind.ZERO, offset, stop - offset)
            else:
                if not tables.valid_cluster(entry, limit) or entry + (count - 1) * size >= limit:
                    raise BlockError(errno.EINVAL, f"cluster {cluster} at {entry:#x} lies outside the image file")
                yield Mapping(Kind.DATA, offset, stop - offset, file, entry + offset - cluster * size, writable)
            offset = stop

    # Writing

    def _take(self, length: int) -> int:
        start = self.tables.end
        self.tables.end += length
        return start

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        found: list[Allocation] = []
        size, entries = self.cluster_size, self.header.entries
        for run in list(self.map(offset, length)):
            if run.kind is Kind.DATA:
                found.append(Allocation(run.offset, run.length, self.file, run.host, fresh=False))
                continue
            position = run.offset - run.offset % size
            stop = -(-(run.offset + run.length) // size) * size
            while position < stop:
                # Clusters before their table, as the peer lays an image out.
                border = (position // size // entries + 1) * entries * size
                span = min(stop, border) - position
                old = self.file.size
                host = self._take(span)
                found.append(Allocation(position, span, self.file, host, fresh=True, zeroed=host >= old))
                number = position // size // entries
                if self.tables.l1[number] == UNALLOCATED:
                    self._made[host] = number
                self._need_table(number)
                position += span
        return found

    def _need_table(self, number: int) -> None:
        self._mark_changing()
        if self.tables.l1[number] == UNALLOCATED:
            length = self.header.table_length
            where = self._take(length)
            if where < self.file.size:  # a device: what lies there is not zero of itself
                self.file.zero(where, min(length, self.file.size - where))
            self.tables.add_table(number, where)

    def commit(self, allocations: Sequence[Allocation]) -> None:
        size = self.cluster_size
        for allocation in allocations:
            if allocation.fresh:
                self._made.pop(allocation.host, None)
                self.tables.set(allocation.offset // size, allocation.length // size, allocation.host, size)
        if self.tables.many_waiting:
            self._write_back()

    def abort(self, allocations: Sequence[Allocation]) -> None:
        # Nothing says what is free: only what lies last can be given back.
        tables = self.tables
        for one in reversed(allocations):
            number = self._made.pop(one.host, None)
            if number is not None and tables.l1[number] + self.header.table_length == tables.end:
                tables.forget_table(number)
            if one.fresh and one.host + one.length == tables.end:
                tables.end = one.host
                self._shorter = True

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        size = self.cluster_size
        for run in list(self.map(offset, length)):
            if run.kind is Kind.DATA:
                # There is no way to give one cluster back, so its space stays, as zeroes.
                self.file.zero(run.host, run.length, unmap=unmap)
            elif run.kind is Kind.UNALLOCATED:
                position, stop = run.offset // size, -(-(run.offset + run.length) // size)
                while position < stop:
                    number = position // self.header.entries
                    count = min(stop, (number + 1) * self.header.entries) - position
                    self._need_table(number)
                    self.tables.set(position, count, ZERO, 0)
                    position += count
        if self.tables.many_waiting:
            self._write_back()
        return True

    def flush(self) -> None:
        if self.tables.waiting:
            self._write_back()
        self.file.flush()

    def _write_back(self) -> None:
        if self.file.size < self.tables.end:
            # The last cluster counts only if all of it is there.
            self.file.truncate(self.tables.end)
        self.tables.write_back()

    def _mark_changing(self) -> None:
        if not self.header.features & headers.NEED_CHECK:
            self.mark(True)

    def mark(self, changing: bool) -> None:
        """Set or clear the mark of an image that is to be checked before it is used."""
        if changing:
            self.header.features |= headers.NEED_CHECK
        else:
            self.header.features &= ~headers.NEED_CHECK
        self._write_header("features")

    def _write_header(self, first: str, last: str = "") -> None:
        self.file.pwrite(*self.header.pack_fields(first, last))

    def relocation(self) -> Relocation:
        from .relocation import QedRelocation

        return QedRelocation(self)

    def changing(self) -> None:
        """The tables are about to change: let whoever opens the image after a power cut check it."""
        if not self.header.features & headers.NEED_CHECK:
            self.mark(True)
            self.file.flush()

    def cut(self, end: int) -> None:
        """Nothing lies at *end* or behind it: end the file there."""
        self.flush()
        if end < self.file.size:
            self.file.truncate(end)
        self.tables.end = end

    def truncate(self, size: int) -> None:
        header = self.header
        if size < header.image_size:
            raise UsageError("Shrinking images is currently not supported")
        if not headers.is_image_size(size, header.cluster_size, header.table_size):
            raise UsageError("Invalid image size specified")
        self.tables.grow(size)
        header.image_size = size
        self._write_header("image_size")

    def change_backing(self, filename: str | None, format: str | None) -> None:
        header = self.header
        if header.compat_features:
            raise ImageError(self.name, "the image has unknown compatible features; its header is not changed")
        features = header.features & ~(headers.BACKING_FILE | headers.BACKING_FORMAT_NO_PROBE)
        name = (filename or "").encode("utf-8", "surrogateescape")
        room = min(header.cluster_size * header.header_size - Header.LENGTH, headers.MAX_BACKING_NAME)
        if len(name) > room:
            raise BlockError.of(errno.ENOSPC)
        if name:
            features |= headers.BACKING_FILE
            if format == "raw":
                features |= headers.BACKING_FORMAT_NO_PROBE
        header.features = features
        header.backing_filename_offset = Header.LENGTH
        header.backing_filename_size = len(name)
        # One write, so that name and bits change together.
        self.file.pwrite(0, header.pack() + name)
        self.file.flush()
        self.backing_reference = BackingReference(str(filename), format) if name else None

    def inplace_source(self) -> Source:
        from .inplace import QedSource

        return QedSource(self)

    @classmethod
    def inplace_target(cls) -> type[Target]:
        from .inplace import QedTarget

        return QedTarget

    def check(self, *, repair: str = "") -> dict[str, Any]:
        from .check import check

        if repair and not self.readonly:
            self.flush()
        found = check(self, fix=bool(repair))
        if repair and not found.get("corruptions") and self.header.features & headers.NEED_CHECK:
            self.mark(False)
            self.file.flush()
        return found

    def close(self) -> None:
        if not self.readonly:
            self._settle()

    def _settle(self) -> None:
        self.flush()
        if self._shorter and self.tables.end < self.file.size:
            with suppress(OSError):  # the space is kept then
                self.file.truncate(self.tables.end)
        if self.header.features & headers.NEED_CHECK and not self._damaged:
            self.mark(False)
            self.file.flush()

    def reopen(self, *, readonly: bool) -> None:
        if readonly and not self.readonly:
            self._settle()
        elif not readonly and self.readonly:
            self._prepare(check=True)
        self.readonly = readonly

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .create import create

        create(file, size, options)
