"""The header (section *Header* of the specification). All numbers are little-endian."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vm_core.block.structs import Record, raw, u32, u64
from vm_core.errors import ImageError

if TYPE_CHECKING:
    from vm_core.block.node import Node

MAGIC = b"QED\0"

#: Feature bits. An image with any other is not opened.
BACKING_FILE = 1
NEED_CHECK = 2
BACKING_FORMAT_NO_PROBE = 4
FEATURES = BACKING_FILE | NEED_CHECK | BACKING_FORMAT_NO_PROBE
#: No compatible and no autoclear feature is defined.
AUTOCLEAR = 0

CLUSTER_MIN, CLUSTER_MAX = 1 << 12, 1 << 26
TABLE_MIN, TABLE_MAX = 1, 16
SECTOR = 512
#: Bytes in the name of a backing file; longer ones are no path on any host.
MAX_BACKING_NAME = 4095


class Header(Record, order="little"):
    """The first 64 bytes of the image."""

    magic: bytes = raw(0, 4, default=MAGIC)
    cluster_size: int = u32(4, default=65536, doc="in bytes")
    table_size: int = u32(8, default=4, doc="for L1 and L2 tables, in clusters")
    header_size: int = u32(12, default=1, doc="in clusters")
    features: int = u64(16, doc="format feature bits")
    compat_features: int = u64(24, doc="compatible feature bits")
    autoclear_features: int = u64(32, doc="self-resetting feature bits")
    l1_table_offset: int = u64(40, doc="in bytes")
    image_size: int = u64(48, doc="total logical image size, in bytes")
    backing_filename_offset: int = u32(56, doc="in bytes from start of header")
    backing_filename_size: int = u32(60, doc="in bytes")

    @property
    def table_length(self) -> int:
        """Bytes of a table."""
        return self.table_size * self.cluster_size

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return self.table_length // 8


def is_cluster_size(size: int) -> bool:
    """Whether clusters may have *size* bytes."""
    return CLUSTER_MIN <= size <= CLUSTER_MAX and not size & (size - 1)


def is_table_size(size: int) -> bool:
    """Whether tables may have *size* clusters."""
    return TABLE_MIN <= size <= TABLE_MAX and not size & (size - 1)


def max_image_size(cluster_size: int, table_size: int) -> int:
    """Bytes that two levels of tables can address."""
    entries = cluster_size * table_size // 8
    return min(entries * entries * cluster_size, (1 << 63) - 1)


def is_image_size(size: int, cluster_size: int, table_size: int) -> bool:
    """Whether an image may have *size* bytes."""
    return size % SECTOR == 0 and size <= max_image_size(cluster_size, table_size)


def read(file: Node, name: str) -> Header:
    """The header of the image in *file*. Raises ImageError in the peer's words for one that cannot be believed."""
    header = Header.parse(file.pread(0, Header.LENGTH))
    if header.magic != MAGIC:
        raise ImageError(name, "Image not in QED format")
    unknown = header.features & ~FEATURES
    if unknown:
        raise ImageError(name, f"Unsupported QED features: {unknown:x}")
    if not is_cluster_size(header.cluster_size):
        raise ImageError(name, "QED cluster size is invalid")
    if not is_table_size(header.table_size):
        raise ImageError(name, "QED table size is invalid")
    if not is_image_size(header.image_size, header.cluster_size, header.table_size):
        raise ImageError(name, "QED image size is invalid")
    size = file.size
    start, end = header.l1_table_offset, header.l1_table_offset + header.table_length
    if start % header.cluster_size or start < header.header_size * header.cluster_size or not start or end > size:
        raise ImageError(name, "QED table offset is invalid")
    if header.features & BACKING_FILE:
        last = header.backing_filename_offset + header.backing_filename_size
        if last > header.cluster_size * header.header_size or last > size:
            raise ImageError(name, "QED backing filename offset is invalid")
        if header.backing_filename_size > MAX_BACKING_NAME:
            raise ImageError(
                name,
                f"the name of the backing file has {header.backing_filename_size} bytes; "
                f"{MAX_BACKING_NAME} are possible",
                peer="Failed to read backing filename",
            )
    return header
