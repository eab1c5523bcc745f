"""New images, with every byte where qemu-img puts it: the header's cluster, then the L1 table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.errors import UsageError

from . import header as headers
from .header import Header

if TYPE_CHECKING:
    from vm_core.block.node import Node

DEFAULT_CLUSTER_SIZE = 64 << 10
DEFAULT_TABLE_SIZE = 4


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Write an empty image of *size* bytes into *file*, popping the *options* understood. Raises UsageError."""
    cluster = options.pop("cluster_size", None) or DEFAULT_CLUSTER_SIZE
    table = options.pop("table_size", None) or DEFAULT_TABLE_SIZE
    backing, format = options.pop("backing_file", None), options.pop("backing_fmt", None)
    if not headers.is_cluster_size(cluster):
        raise UsageError(
            f"QED cluster size must be within range [{headers.CLUSTER_MIN}, {headers.CLUSTER_MAX}] and power of 2"
        )
    if not headers.is_table_size(table):
        raise UsageError(
            f"QED table size must be within range [{headers.TABLE_MIN}, {headers.TABLE_MAX}] and power of 2"
        )
    size = -(-size // headers.SECTOR) * headers.SECTOR
    if not headers.is_image_size(size, cluster, table):
        most = headers.max_image_size(cluster, table)
        raise UsageError(f"QED image size must be a non-zero multiple of cluster size and less than {most} bytes")
    header = Header(cluster_size=cluster, table_size=table, image_size=size, l1_table_offset=cluster)
    name = b""
    if backing:
        name = str(backing).encode("utf-8", "surrogateescape")
        header.features |= headers.BACKING_FILE
        header.backing_filename_offset, header.backing_filename_size = Header.LENGTH, len(name)
        if format == "raw":
            header.features |= headers.BACKING_FORMAT_NO_PROBE
        if Header.LENGTH + len(name) > cluster or len(name) > headers.MAX_BACKING_NAME:
            raise UsageError("Backing file name too long")
    file.pwrite(0, header.pack() + name)
    file.truncate(cluster + header.table_length)
