"""New images, dynamic and fixed."""

from __future__ import annotations

import os
import time
from typing import Any

from vm_core.block.node import Node
from vm_core.errors import UsageError

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

BLOCK_SIZE = 2 << 20
#: Bytes of the table that are written at a time.
_STEP = 1 << 20


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Write an empty image of at least *size* bytes, popping *options*. Raises UsageError."""
    kind = options.pop("subformat", None) or "dynamic"
    if kind not in ("dynamic", "fixed"):
        raise UsageError(f"Parameter 'subformat' does not accept value '{kind}'")
    exact = bool(options.pop("force_size", None))
    sectors = -(-size // SECTOR)
    if sectors > MAX_SECTORS:
        raise UsageError("The image size is too large for file format 'vpc'")
    if exact:
        geometry = Geometry(*LARGEST)
    else:
        geometry = geometry_for(sectors)
        if geometry.total < LARGEST_SECTORS:
            sectors = geometry.total
    uuid = bytearray(os.urandom(16))
    uuid[6] = uuid[6] & 0x0F | 0x40
    uuid[8] = uuid[8] & 0x3F | 0x80
    footer = Footer(
        cookie=COOKIE,
        data_offset=NOWHERE if kind == "fixed" else FOOTER_LENGTH,
        timestamp=(int(time.time()) - EPOCH) & 0xFFFFFFFF,
        creator=QEMU_BY_SIZE if exact else QEMU,
        creator_version=0x00050003,
        creator_os=b"Wi2k",
        original_size=sectors * SECTOR,
        current_size=sectors * SECTOR,
        cylinders=geometry.cylinders,
        heads=geometry.heads,
        sectors=geometry.sectors,
        disk_type=FIXED if kind == "fixed" else DYNAMIC,
        uuid=bytes(uuid),
    )
    if kind == "fixed":
        file.pwrite(sectors * SECTOR, seal(footer))
    else:
        _write_dynamic(file, footer)
    file.flush()


def _write_dynamic(file: Node, footer: Footer) -> None:
    entries = -(-footer.current_size // BLOCK_SIZE)
    header = DynamicHeader(
        cookie=HEADER_COOKIE,
        table_offset=FOOTER_LENGTH + HEADER_LENGTH,
        max_table_entries=entries,
        block_size=BLOCK_SIZE,
    )
    end = header.table_offset + -(-4 * entries // SECTOR) * SECTOR
    for start in range(header.table_offset, end, _STEP):
        file.pwrite(start, b"\xff" * min(_STEP, end - start))
    file.pwrite(end, seal(footer))
    file.pwrite(FOOTER_LENGTH, seal(header))
    # The copy at the start last: before it is there, this is no image at all.
    file.pwrite(0, seal(footer))
