"""QCOW2's part in converting images in place (``vm_core.block.inplace``).

As a target: version 3, refcounts of 16 bits. The L2 tables go to the free space as they fill, then the L1 table, the
refcount blocks and the refcount table; every cluster that is used has refcount one and the bit COPIED, all others are
free, whatever they held before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.inplace import SECTOR, Contents, Extra, HeaderPlan, Source, Space, Target, place_beside
from vm_core.block.tables import dump
from vm_core.errors import ImageError

from . import extensions, features
from .entries import make_run
from .extensions import Extension
from .geometry import COPIED, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MIN_CLUSTER_BITS, ZERO
from .header import MAX_BACKING_NAME, NEW_V3_LENGTH, Header

if TYPE_CHECKING:
    from .image import Qcow2

REFCOUNT_BITS = 16
#: Extensions that are made anew, and those that stand for something of which there is another sign too.
_KNOWN_EXTENSIONS = (
    extensions.BACKING_FORMAT,
    extensions.FEATURE_NAME_TABLE,
    extensions.BITMAPS,
    extensions.ENCRYPTION_HEADER,
    extensions.DATA_FILE_NAME,
)


class Qcow2Source(Source):
    """An image to be converted to something else."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.contents = Contents(image.size, image.cluster_size, image.backing_reference)

    def extras(self) -> list[Extra]:
        image, header = self.image, self.image.header
        found: list[Extra] = []

        def add(word: str, name: str, remedy: str = "") -> None:
            found.append(Extra(word, name, remedy))

        mask = header.incompatible_features
        if mask & features.DIRTY:
            add("dirty", "its having not been closed", "vm-img check -r all FILE mends it")
        if mask & features.CORRUPT:
            add("corrupt", "its being marked as corrupt", "vm-img check -r all FILE mends what can be mended")
        if mask & features.DATA_FILE:
            add("data-file", "its external data file", "vm-img convert makes an image without one")
        if mask & features.EXTENDED_L2:
            add("subclusters", "its extended L2 entries (subclusters)", "vm-img convert makes an image without them")
        if header.crypt_method:
            add("encryption", "its encryption", "vm-img convert makes an image without it")
        for snapshot in image.snapshot_table.entries[:1]:
            more = f" and {count} more" if (count := len(image.snapshot_table.entries) - 1) else ""
            add(
                "snapshots",
                f"its internal snapshot '{snapshot.name}'{more}",
                f"vm-img snapshot -d '{snapshot.name}' FILE",
            )
        for data in list(image.bitmaps())[:1]:
            more = f" and {count} more" if (count := len(image.bitmaps()) - 1) else ""
            add("bitmaps", f"its dirty bitmap '{data['name']}'{more}", f"vm-img bitmap --remove FILE '{data['name']}'")
        for one in image.extensions:
            if one.type not in _KNOWN_EXTENSIONS:
                add(f"extension-{one.type:x}", f"its header extension {one.type:#010x}, which is not known")
        compatible = header.compatible_features & ~features.KNOWN_COMPATIBLE
        if compatible:
            names = extensions.parse_feature_names(extensions.find(image.extensions, extensions.FEATURE_NAME_TABLE))
            add("features", f"its features {features.describe(1, compatible, names)}, which are not known")
        if any(image.tables.l1[image.geometry.l1_entries_for(image.size) :]):
            add("vmstate", "its saved machine state", "vm-img convert leaves it out")
        if not mask & (features.DATA_FILE | features.EXTENDED_L2) and self._compressed():
            add("compression", "its compressed clusters", "vm-img convert makes an image without them")
        return found

    def _compressed(self) -> bool:
        from vm_core.block.mapping import Kind

        step = 1 << 34
        size = self.image.size
        return any(
            run.kind is Kind.SPECIAL
            for offset in range(0, size, step)
            for run in self.image.map(offset, min(step, size - offset))
        )

    def header_ranges(self) -> list[tuple[int, int]]:
        header = self.image.header
        end = header.header_length + len(extensions.pack_extensions(self.image.extensions))
        name = header.backing_file_offset
        return [(0, end), (name, name + header.backing_file_size)]


class Qcow2Target(Target):
    """An image that something else is to become."""

    def __init__(self, name: str, contents: Contents, space: Space) -> None:
        bits = contents.cluster_size.bit_length() - 1
        if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            raise ImageError(
                name,
                f"has clusters of {contents.cluster_size} bytes; a qcow2 image has {1 << MIN_CLUSTER_BITS} to "
                f"{1 << MAX_CLUSTER_BITS}",
            )
        self.name = name
        self.contents = contents
        self.space = space
        self._bits = bits
        self._size = contents.cluster_size
        self._l2_bits = bits - 3
        entries = -(-contents.size >> bits + self._l2_bits)
        if entries * 8 > MAX_L1_BYTES:
            limit = (MAX_L1_BYTES // 8) << bits + self._l2_bits
            raise ImageError(
                name,
                f"has {contents.size} bytes; with clusters of {self._size} bytes a qcow2 image has at most {limit}",
            )
        backing = contents.backing
        if backing is not None and len(_bytes(backing.filename)) > MAX_BACKING_NAME:
            raise ImageError(name, f"the name of its backing file is longer than {MAX_BACKING_NAME} bytes")
        self._l1 = array("Q", bytes(8 * entries))
        #: The L2 table that is being filled, and its number.
        self._table: array[int] | None = None
        self._number = -1

    def data(self, offset: int, length: int, host: int) -> None:
        self._enter(offset, length, host)

    def zeroes(self, offset: int, length: int) -> None:
        self._enter(offset, length, None)

    def _enter(self, offset: int, length: int, host: int | None) -> None:
        cluster, count = offset >> self._bits, -(-length >> self._bits)
        while count:
            number, index = divmod(cluster, 1 << self._l2_bits)
            if number != self._number:
                self._write_table()
                self._number, self._table = number, array("Q", bytes(self._size))
            assert self._table is not None
            step = min(count, (1 << self._l2_bits) - index)
            if host is None:
                values = array("Q", (ZERO,)) * step
            else:
                values = make_run(host, step, self._size)
                host += step << self._bits
            self._table[index : index + step] = values
            cluster += step
            count -= step

    def _write_table(self) -> None:
        if self._table is not None:
            offset = self.space.take(self._size)
            self.space.write(offset, dump(self._table, "big"))
            self._l1[self._number] = offset | COPIED
            self._table = None

    def finish(self, kept: Sequence[tuple[int, int]]) -> HeaderPlan:
        space = self.space
        self._write_table()
        l1 = space.take(max(8, len(self._l1) * 8))
        l1_size = len(self._l1)
        space.write(l1, dump(self._l1, "big"))
        table, clusters = self._write_refcounts()
        header = Header(
            cluster_bits=self._bits,
            size=self.contents.size,
            l1_size=l1_size,
            l1_table_offset=l1,
            refcount_table_offset=table,
            refcount_table_clusters=clusters,
            refcount_order=REFCOUNT_BITS.bit_length() - 1,
            header_length=NEW_V3_LENGTH,
        )
        return self._plan(header, kept)

    def _write_refcounts(self) -> tuple[int, int]:
        """Refcount blocks and table; returns offset and clusters of the table."""
        space, size = self.space, self._size
        per_block = size * 8 // REFCOUNT_BITS
        before = space.end >> self._bits
        blocks = table_clusters = 0
        while True:
            total = before + blocks + table_clusters
            need = -(-total // per_block)
            if need == blocks and -(-need * 8 // size) == table_clusters:
                break
            blocks, table_clusters = need, -(-need * 8 // size)
        if table_clusters * size > MAX_REFTABLE_BYTES:
            raise ImageError(self.name, f"has {total} clusters, more than a qcow2 image of this cluster size can count")
        first = space.take(blocks * size)
        table = space.take(table_clusters * size)
        for number in range(blocks):
            start = number * per_block
            counts = array("H", (1,)) * per_block
            for gap, count in space.used.gaps(start, start + per_block):
                counts[gap - start : gap - start + count] = array("H", bytes(2 * count))
            counts.byteswap() if _LITTLE else None
            space.write(first + number * size, counts.tobytes())
        entries = array("Q", range(first, first + blocks * size, size))
        space.write(table, dump(entries, "big"))
        return table, table_clusters

    def _plan(self, header: Header, kept: Sequence[tuple[int, int]]) -> HeaderPlan:
        """Header and extensions in the first sector; the backing file's name there too, or wherever there is room."""
        backing = self.contents.backing
        found: list[Extension] = []
        name = b""
        if backing is not None:
            name = _bytes(backing.filename)
            if backing.format:
                found.append(Extension(extensions.BACKING_FORMAT, backing.format.encode()))
        names = Extension(extensions.FEATURE_NAME_TABLE, extensions.pack_feature_names(features.FEATURE_NAMES))
        area = extensions.pack_extensions([*found, names])
        if header.header_length + len(area) > SECTOR:
            area = extensions.pack_extensions(found)
        parts: list[tuple[int, bytes]] = []
        inside = header.header_length + len(area)
        if name:
            header.backing_file_size = len(name)
            if inside + len(name) <= SECTOR:
                header.backing_file_offset = inside
            else:
                place = place_beside(len(name), self._size, kept)
                if place is None:
                    raise ImageError(self.name, "the name of its backing file finds no room beside the old header")
                header.backing_file_offset = place
                parts.append((place, name))
                name = b""
        return HeaderPlan(header.pack().ljust(header.header_length, b"\0") + area + name, parts)


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


_LITTLE = array("H", (1,)).tobytes() == b"\1\0"
