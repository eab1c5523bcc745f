"""New images, dynamic, static and differencing."""

from __future__ import annotations

import os
from array import array
from typing import Any

from vm_core.block.node import Node
from vm_core.block.tables import dump
from vm_core.errors import UsageError

from .header import (
    BLOCK_SIZE,
    DIFFERENCING,
    DYNAMIC,
    MAX_DISK_SIZE,
    NO_UUID,
    SECTOR,
    SIGNATURE,
    STATIC,
    UNALLOCATED,
    VERSION_1_1,
    Header,
)

_TEXT = b"<<< QEMU VM Virtual Disk Image >>>\n"
#: Bytes of the header from its field ``header_size`` on, up to the sector's last 56.
_HEADER_SIZE = 0x180
#: Entries of the block map that are written at a time.
_STEP = 1 << 18


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Write an empty image of *size* bytes, rounded up to 512, popping *options*. Raises UsageError."""
    static = bool(options.pop("static", None))
    if size > MAX_DISK_SIZE:
        raise UsageError(f"Unsupported VDI image size (size is {size:#x}, max supported is {MAX_DISK_SIZE:#x})")
    size = -(-size // SECTOR) * SECTOR
    backing, _ = options.pop("backing_file", None), options.pop("backing_fmt", None)
    link = parent = NO_UUID
    if backing:
        if static:
            raise UsageError("static: an image with a backing file is a differencing one, which grows")
        from .parents import look_at

        below, whole = look_at(backing, file.filename)
        if size < whole:
            raise UsageError(f"'{backing}' has {whole} bytes: a VDI image is no smaller than the one below it")
        link, parent = below.uuid_image, below.uuid_last_snap
    count = -(-size // BLOCK_SIZE)
    header = Header(
        text=_TEXT,
        signature=SIGNATURE,
        version=VERSION_1_1,
        header_size=_HEADER_SIZE,
        image_type=STATIC if static else DIFFERENCING if backing else DYNAMIC,
        offset_bmap=SECTOR,
        offset_data=SECTOR + -(-4 * count // SECTOR) * SECTOR,
        sector_size=SECTOR,
        disk_size=size,
        block_size=BLOCK_SIZE,
        blocks_in_image=count,
        blocks_allocated=count if static else 0,
        uuid_image=_new_uuid(),
        uuid_last_snap=_new_uuid(),
        uuid_link=link,
        uuid_parent=parent,
    )
    for first in range(0, count, _STEP):
        some = min(_STEP, count - first)
        entries = array("I", range(first, first + some)) if static else array("I", (UNALLOCATED,)) * some
        file.pwrite(SECTOR + 4 * first, dump(entries, "little"))
    file.truncate(header.offset_data + (count * BLOCK_SIZE if static else 0))
    if backing:
        file.flush()
    # The header last: before it is there, this is no image at all.
    file.pwrite(0, header.pack().ljust(SECTOR, b"\0"))
    file.flush()


def _new_uuid() -> bytes:
    """A random UUID (RFC 4122, version 4), its first three fields little-endian."""
    data = bytearray(os.urandom(16))
    data[7] = data[7] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)
