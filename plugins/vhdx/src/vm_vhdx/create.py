"""New images, dynamic, fixed and differencing."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING, Any

from vm_core.block.crc32c import crc32c
from vm_core.block.node import Node
from vm_core.block.tables import dump
from vm_core.errors import UsageError

from . import guids, metadata, regions
from .headers import KIB, MIB, PLACES, SIGNATURE, Header
from .metadata import HAS_PARENT, IS_REQUIRED, IS_VIRTUAL_DISK, LEAVE_ALLOCATED, MAX_BLOCK, MAX_DISK_SIZE, MIN_BLOCK
from .table import FULLY_PRESENT, ZERO, entry_count

if TYPE_CHECKING:
    from .overlay import Parent

_CREATOR = "vm-vhdx"
_SECTOR = 512
#: From which disk size on blocks are so large.
_BLOCK_SIZES = ((32 << 40, 64 * MIB), (100 << 30, 32 * MIB), (1 << 30, 16 * MIB), (-1, 8 * MIB))
#: Bytes left free between the metadata and the first block.
_GAP = 4 * MIB
#: Entries of the block allocation table that are written at a time.
_STEP = 1 << 17


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Write an empty image of *size* bytes, rounded up to 512, popping *options*. Raises UsageError."""
    size = -(-size // _SECTOR) * _SECTOR
    log_length = options.pop("log_size", None)
    block = options.pop("block_size", None) or 0
    zero = options.pop("block_state_zero", None)
    kind = options.pop("subformat", None) or "dynamic"
    if kind not in ("dynamic", "fixed"):
        raise UsageError(f"Parameter 'subformat' does not accept value '{kind}'")
    if size > MAX_DISK_SIZE:
        raise UsageError("Image size too large; max of 64TB")
    backing, _ = options.pop("backing_file", None), options.pop("backing_fmt", None)
    parent: Parent | None = None
    if backing:
        if kind == "fixed":
            raise UsageError("subformat=fixed: an image with a backing file is a differencing one, which grows")
        if zero:
            raise UsageError("block_state_zero=on: blocks of zeroes would hide the backing file")
        from .overlay import look_at

        parent, zero = look_at(backing, file.filename, size), False
    sector = _SECTOR if parent is None else parent.sector_size
    size = -(-size // sector) * sector
    log_length = MIB if log_length is None else -(-log_length // MIB) * MIB
    if log_length >= 1 << 32:
        raise UsageError("Log size must be smaller than 4 GB")
    if not log_length:
        raise UsageError("Log size must be a multiple of 1 MB")
    if not block:
        block = next(value for above, value in _BLOCK_SIZES if size > above)
    block = min(max(-(-block // MIB) * MIB, MIN_BLOCK), MAX_BLOCK)
    if block & (block - 1):
        raise UsageError("Block size must be a power of two")

    blocks = -(-size // block)
    ratio = (1 << 23) * sector // block
    # For a disk of no size this is what 32 bits make of it, here as in QEMU.
    count = blocks + (blocks - 1 & 0xFFFFFFFF) // ratio if parent is None else entry_count(blocks, ratio, True)
    bat = regions.Region("block allocation table", MIB + log_length, max(-(-8 * count // MIB), 1) * MIB)
    where = regions.Region("metadata", bat.end, MIB)
    data = where.end + _GAP

    file.truncate(data + (size if kind == "fixed" else 0))
    # As with QEMU, blocks of a fixed image are in place from the start only with block_state_zero=off.
    _write_table(file, bat, blocks, ratio, block, data, kind == "fixed", zero is None or bool(zero))
    flags = LEAVE_ALLOCATED if kind == "fixed" else HAS_PARENT if parent is not None else 0
    locator = b"" if parent is None else metadata.build_locator(parent.locator)
    file.pwrite(where.offset, _metadata_table(len(locator)))
    file.pwrite(where.offset + metadata.TABLE_LENGTH, _items(block, size, flags, sector) + locator)
    table = _region_table(bat, where)
    for place in regions.PLACES:
        file.pwrite(place, table)
    header = Header(
        sequence=int.from_bytes(os.urandom(4), "little"),
        file_write_guid=guids.new(),
        data_write_guid=guids.new(),
        log_length=log_length,
        log_offset=MIB,
    )
    for place in PLACES:
        file.pwrite(place, header.seal())
        header.sequence += 1
    if parent is not None:
        file.flush()
    # The file's type last: before it is there, this is no image at all.
    file.pwrite(0, (SIGNATURE + _CREATOR.encode("utf-16-le")).ljust(64 * KIB, b"\0"))
    file.flush()


def _write_table(
    file: Node, bat: regions.Region, blocks: int, ratio: int, block: int, data: int, fixed: bool, zero: bool
) -> None:
    if not (fixed or zero):
        return  # NOT_PRESENT, which is zero
    chunk = ratio + 1
    start = 0
    while start < blocks:
        count = min(ratio - start % ratio, blocks - start, _STEP)
        if not zero:
            first = data + start * block | FULLY_PRESENT
            entries = array("Q", range(first, first + count * block, block))
        else:
            entries = array("Q", (ZERO,)) * count
        index = start // ratio * chunk + start % ratio
        file.pwrite(bat.offset + 8 * index, dump(entries, "little"))
        start += count


def _region_table(bat: regions.Region, where: regions.Region) -> bytes:
    entries = [
        regions.Entry(guid=guid, offset=one.offset, length=one.length).pack()
        for guid, one in ((guids.BAT, bat), (guids.METADATA, where))
    ]
    table = bytearray((b"regi" + bytes(4) + (2).to_bytes(8, "little") + b"".join(entries)).ljust(64 * KIB, b"\0"))
    table[4:8] = crc32c(table).to_bytes(4, "little")
    return bytes(table)


#: Items of the metadata: GUID, bytes, flags.
_ITEMS = (
    (guids.FILE_PARAMETERS, 8, IS_REQUIRED),
    (guids.DISK_SIZE, 8, IS_REQUIRED | IS_VIRTUAL_DISK),
    (guids.DISK_ID, 16, IS_REQUIRED | IS_VIRTUAL_DISK),
    (guids.LOGICAL_SECTOR, 4, IS_REQUIRED | IS_VIRTUAL_DISK),
    (guids.PHYSICAL_SECTOR, 4, IS_REQUIRED | IS_VIRTUAL_DISK),
)


def _metadata_table(locator: int) -> bytes:
    """The table of the items, the last of which is a parent locator of so many bytes, if it is there."""
    items = list(_ITEMS)
    if locator:
        items.append((guids.PARENT_LOCATOR, locator, IS_REQUIRED))
    head = b"metadata" + bytes(2) + len(items).to_bytes(2, "little")
    entries, offset = [], metadata.TABLE_LENGTH
    for guid, length, flags in items:
        entry = metadata.Entry(guid=guid, offset=offset, length=length, flags=flags)
        entries.append(entry.pack())
        offset += length
    return head.ljust(metadata.HEADER_LENGTH, b"\0") + b"".join(entries)


def _items(block: int, size: int, flags: int, sector: int) -> bytes:
    parameters = block | flags << 32
    values = (parameters.to_bytes(8, "little"), size.to_bytes(8, "little"), guids.new())
    return b"".join(values) + sector.to_bytes(4, "little") * 2
