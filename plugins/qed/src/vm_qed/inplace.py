"""QED's part in converting images in place (``vm_core.block.inplace``).

As a target: the tables go to the free space, tables of four clusters (more where the image needs larger ones). The
format knows no free clusters: each that nobody uses is a leak. So once the file is one of this format, the clusters
that only the former one used are given to guest offsets past the end of the image, where no guest sees them; they read
as zeroes, which is what the image shall hold there should it grow.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.inplace import SECTOR, Contents, Extra, HeaderPlan, Source, Space, Target, place_beside
from vm_core.block.tables import dump
from vm_core.errors import ImageError

from . import header as headers
from .header import Header
from .tables import ZERO

if TYPE_CHECKING:
    from vm_core.block.node import Node

    from .image import Qed

#: Clusters of a table, in the order in which they are tried. QEMU opens no image with tables of one, and none whose
#: tables could map 2^64 bytes or more.
_TABLE_SIZES = (4, 8, 16, 2)
_MAX_BACKING_NAME = 1023


class QedSource(Source):
    """An image to be converted to something else."""

    def __init__(self, image: Qed) -> None:
        self.image = image
        self.contents = Contents(image.size, image.cluster_size, image.backing_reference)

    def extras(self) -> list[Extra]:
        header = self.image.header
        found: list[Extra] = []
        if header.features & headers.NEED_CHECK:
            found.append(Extra("dirty", "its having not been closed", "vm-img check -r all FILE mends it"))
        if header.compat_features:
            found.append(Extra("features", f"its features {header.compat_features:#x}, which are not known", ""))
        return found

    def header_ranges(self) -> list[tuple[int, int]]:
        header = self.image.header
        ranges = [(0, Header.LENGTH)]
        if header.features & headers.BACKING_FILE:
            start = header.backing_filename_offset
            ranges.append((start, start + header.backing_filename_size))
        return ranges


class QedTarget(Target):
    """An image that something else is to become."""

    def __init__(self, name: str, contents: Contents, space: Space) -> None:
        size = contents.cluster_size
        if not headers.is_cluster_size(size):
            raise ImageError(
                name,
                f"has clusters of {size} bytes; a qed image has {headers.CLUSTER_MIN} to {headers.CLUSTER_MAX}",
            )
        possible = [one for one in _TABLE_SIZES if (size * one // 8) ** 2 * size < 1 << 64]
        table_size = next((one for one in possible if contents.size <= headers.max_image_size(size, one)), None)
        if table_size is None:
            limit = max((headers.max_image_size(size, one) for one in possible), default=0)
            raise ImageError(
                name, f"has {contents.size} bytes; with clusters of {size} bytes a qed image has at most {limit}"
            )
        if contents.size % headers.SECTOR:
            raise ImageError(name, f"has {contents.size} bytes, which are no multiple of {headers.SECTOR}")
        backing = contents.backing
        if backing is not None and len(_bytes(backing.filename)) > _MAX_BACKING_NAME:
            raise ImageError(name, f"the name of its backing file is longer than {_MAX_BACKING_NAME} bytes")
        self.name = name
        self.contents = contents
        self.space = space
        self.header = Header(cluster_size=size, table_size=table_size, image_size=contents.size)
        self._entries = self.header.entries
        self._l1: dict[int, int] = {}
        #: The L2 table that is being filled, and its number.
        self._table: array[int] | None = None
        self._number = -1

    @classmethod
    def records(cls, backing_format: str) -> bool:
        return backing_format == "raw"

    def data(self, offset: int, length: int, host: int) -> None:
        self._enter(offset, length, host, self.header.cluster_size)

    def zeroes(self, offset: int, length: int) -> None:
        self._enter(offset, length, ZERO, 0)

    def _enter(self, offset: int, length: int, entry: int, step: int) -> None:
        size = self.header.cluster_size
        cluster, count = offset // size, -(-length // size)
        while count:
            number, index = divmod(cluster, self._entries)
            if number != self._number:
                self._write_table()
                self._number, self._table = number, array("Q", bytes(8 * self._entries))
            assert self._table is not None
            run = min(count, self._entries - index)
            values = range(entry, entry + run * step, step) if step else (entry,) * run
            self._table[index : index + run] = array("Q", values)
            cluster, count, entry = cluster + run, count - run, entry + run * step

    def _write_table(self) -> None:
        if self._table is not None:
            offset = self.space.take(self.header.table_length)
            self.space.write(offset, dump(self._table, "little"))
            self._l1[self._number] = offset
            self._table = None

    def finish(self, kept: Sequence[tuple[int, int]]) -> HeaderPlan:
        header, space = self.header, self.space
        self._write_table()
        header.l1_table_offset = l1 = space.take(header.table_length)
        numbers = sorted(self._l1)
        if numbers:
            entries = array("Q", bytes(8 * (numbers[-1] + 1)))
            for number in numbers:
                entries[number] = self._l1[number]
            space.write(l1, dump(entries, "little"))
        backing = self.contents.backing
        parts: list[tuple[int, bytes]] = []
        name = b""
        if backing is not None:
            name = _bytes(backing.filename)
            header.features |= headers.BACKING_FILE
            if backing.format == "raw":
                header.features |= headers.BACKING_FORMAT_NO_PROBE
            header.backing_filename_offset, header.backing_filename_size = Header.LENGTH, len(name)
            if Header.LENGTH + len(name) > SECTOR:
                place = place_beside(len(name), header.cluster_size, kept)
                if place is None:
                    raise ImageError(self.name, "the name of its backing file finds no room beside the old header")
                header.backing_filename_offset = place
                parts.append((place, name))
                name = b""
        return HeaderPlan(header.pack() + name, parts)

    # After the switch

    def settle(self, file: Node, unused: Sequence[tuple[int, int]]) -> int:
        size = self.header.cluster_size
        missing = sum(count for _, count in unused)
        waiting = [host for first, count in unused for host in range(first * size, (first + count) * size, size)]
        # The first guest cluster past the end of the image.
        cluster = -(-self.contents.size // size)
        while waiting and cluster < self._entries * self._entries:
            number, index = divmod(cluster, self._entries)
            run = min(self._entries - index, len(waiting))
            table = self._l1.get(number)
            if table is None:
                table = self._new_table(file, number)
            # These entries say nothing yet, and each is stable or not: clusters that nobody uses, or past the end.
            file.pwrite(table + 8 * index, dump(array("Q", waiting[:run]), "little"))
            del waiting[:run]
            missing -= run
            cluster += run
        file.flush()
        return missing

    def _new_table(self, file: Node, number: int) -> int:
        """An empty table at the end of the file for L1 entry *number*."""
        header = self.header
        table = -(-file.size // header.cluster_size) * header.cluster_size
        file.truncate(table + header.table_length)
        file.flush()
        file.pwrite(header.l1_table_offset + 8 * number, table.to_bytes(8, "little"))
        file.flush()
        self._l1[number] = table
        return table


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
