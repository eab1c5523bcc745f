"""New images, dynamic, fixed and differencing."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from vm_core.block.node import Node
from vm_core.errors import ImageError, UsageError

from .footer import (
    COOKIE,
    DYNAMIC,
    EPOCH,
    FIXED,
    FOOTER_LENGTH,
    HEADER_COOKIE,
    HEADER_LENGTH,
    NOWHERE,
    SECTOR,
    DynamicHeader,
    Footer,
    seal,
)
from .geometry import LARGEST, LARGEST_SECTORS, MAX_SECTORS, QEMU, QEMU_BY_SIZE, Geometry, geometry_for

if TYPE_CHECKING:
    from .overlay import Parent

BLOCK_SIZE = 2 << 20
#: Bytes of the table that are written at a time.
_STEP = 1 << 20


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Write an empty image of at least *size* bytes, popping *options*. Raises UsageError."""
    kind = options.pop("subformat", None) or "dynamic"
    if kind not in ("dynamic", "fixed"):
        raise UsageError(f"Parameter 'subformat' does not accept value '{kind}'")
    exact = bool(options.pop("force_size", None))
    backing, _ = options.pop("backing_file", None), options.pop("backing_fmt", None)
    if backing:
        if kind == "fixed":
            raise UsageError("subformat=fixed: an image with a backing file is a differencing one, which grows")
        if exact:
            raise UsageError("force_size: an image with a backing file has that one's size and geometry")
        from .overlay import create_overlay

        create_overlay(file, size, backing)
        return
    sectors = -(-size // SECTOR)
    if sectors > MAX_SECTORS:
        raise UsageError("The image size is too large for file format 'vpc'")
    if exact:
        geometry = Geometry(*LARGEST)
    else:
        geometry = geometry_for(sectors)
        if geometry.total < LARGEST_SECTORS:
            sectors = geometry.total
    footer = Footer(
        cookie=COOKIE,
        data_offset=NOWHERE if kind == "fixed" else FOOTER_LENGTH,
        timestamp=stamp(time.time()),
        creator=QEMU_BY_SIZE if exact else QEMU,
        creator_version=0x00050003,
        creator_os=b"Wi2k",
        original_size=sectors * SECTOR,
        current_size=sectors * SECTOR,
        cylinders=geometry.cylinders,
        heads=geometry.heads,
        sectors=geometry.sectors,
        disk_type=FIXED if kind == "fixed" else DYNAMIC,
        uuid=new_uuid(),
    )
    if kind == "fixed":
        try:
            file.truncate(sectors * SECTOR)  # a new file's first block is on the disk at once, as with qemu-img
            file.pwrite(sectors * SECTOR, seal(footer))
        except OSError as error:
            raise ImageError(file.filename, f"Unable to write VHD header: {error.strerror}") from error
    else:
        write_dynamic(file, footer, -(-footer.current_size // BLOCK_SIZE))
    file.flush()


def new_uuid() -> bytes:
    """A random UUID (RFC 4122, version 4)."""
    uuid = bytearray(os.urandom(16))
    uuid[6] = uuid[6] & 0x0F | 0x40
    uuid[8] = uuid[8] & 0x3F | 0x80
    return bytes(uuid)


def stamp(seconds: float) -> int:
    """A moment, in seconds of the UNIX epoch, as the format counts it."""
    return (int(seconds) - EPOCH) & 0xFFFFFFFF


def write_dynamic(file: Node, footer: Footer, entries: int, parent: Parent | None = None) -> None:
    """Write an image of *entries* blocks, none of which is there; with a *parent* a differencing one."""
    header = DynamicHeader(
        cookie=HEADER_COOKIE,
        table_offset=FOOTER_LENGTH + HEADER_LENGTH,
        max_table_entries=entries,
        block_size=BLOCK_SIZE,
    )
    end = header.table_offset + -(-4 * entries // SECTOR) * SECTOR
    for start in range(header.table_offset, end, _STEP):
        file.pwrite(start, b"\xff" * min(_STEP, end - start))
    head = seal(header)
    if parent is not None:
        head, names = parent.describe(header, end)
        file.pwrite(end, names)
        end += len(names)
    file.pwrite(end, seal(footer))
    file.pwrite(FOOTER_LENGTH, head)
    if parent is not None:
        file.flush()
    # The copy at the start last: before it is there, this is no image at all.
    file.pwrite(0, seal(footer))
