"""The header: its fields, and what is checked before anything is believed.

Numbers are little-endian. The header takes the first sector; after it, at ``offset_bmap``, comes the block map, one
32-bit number a block, and at ``offset_data`` the blocks.
"""

from __future__ import annotations

from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u32, u64
from vm_core.errors import ImageError

SIGNATURE = 0xBEDA107F
VERSION_1_1 = 0x00010001
SECTOR = 512

#: ``image_type``
DYNAMIC, STATIC, UNDO, DIFFERENCING = 1, 2, 3, 4

#: Entries of the block map that are no block numbers: nothing there (the parent answers), and zeroes.
UNALLOCATED = 0xFFFFFFFF
ZERO = 0xFFFFFFFE

#: Block size of new images, and the only one that QEMU takes.
BLOCK_SIZE = 1 << 20
#: The most entries that a block map has: it lies below 2 GiB.
MAX_BLOCKS = ((1 << 31) - SECTOR) // 4
MAX_DISK_SIZE = MAX_BLOCKS * BLOCK_SIZE
#: Larger blocks are surely nonsense.
MAX_BLOCK_SIZE = 1 << 30

NO_UUID = bytes(16)


class Header(Record, order="little"):
    """The header of version 1.1. UUIDs are stored with their first three fields little-endian."""

    text: bytes = raw(0, 64, doc="who made the image, for people")
    signature: int = u32(64, doc="0xbeda107f")
    version: int = u32(68, doc="major number << 16 | minor number")
    header_size: int = u32(72, doc="bytes of the header from here on")
    image_type: int = u32(76, doc="1 dynamic, 2 static, 3 undo, 4 differencing")
    image_flags: int = u32(80)
    description: bytes = raw(84, 256, doc="for people")
    offset_bmap: int = u32(340, doc="where the block map is, in bytes")
    offset_data: int = u32(344, doc="where block 0 is, in bytes")
    cylinders: int = u32(348)
    heads: int = u32(352)
    sectors: int = u32(356)
    sector_size: int = u32(360, doc="512")
    unused: int = u32(364)
    disk_size: int = u64(368, doc="virtual size in bytes")
    block_size: int = u32(376, doc="bytes a block")
    block_extra: int = u32(380, doc="bytes before the data of each block")
    blocks_in_image: int = u32(384, doc="entries of the block map")
    blocks_allocated: int = u32(388, doc="blocks in the file; the next one gets this number")
    uuid_image: bytes = raw(392, 16)
    uuid_last_snap: bytes = raw(408, 16, doc="new with each change of the contents")
    uuid_link: bytes = raw(424, 16, doc="differencing: uuid_image of the parent")
    uuid_parent: bytes = raw(440, 16, doc="differencing: uuid_last_snap of the parent when this image was made")

    @property
    def differencing(self) -> bool:
        """Whether blocks that are not here are a parent's."""
        return self.uuid_link != NO_UUID or self.uuid_parent != NO_UUID

    def misplaced(self) -> str:
        """What lies where something else is, empty if nothing does: such an image is only read."""
        end = self.offset_bmap + 4 * self.blocks_in_image
        if self.blocks_in_image and self.offset_bmap < SECTOR:
            return f"the block map at {self.offset_bmap:#x} lies in the header"
        if self.blocks_in_image and end > self.offset_data:
            return f"the data at {self.offset_data:#x} begins before the block map's end at {end:#x}"
        return ""


def show_uuid(uuid: bytes) -> str:
    """A stored UUID as people write it."""
    parts = uuid[3::-1], uuid[5:3:-1], uuid[7:5:-1], uuid[8:10], uuid[10:]
    return "-".join(part.hex() for part in parts)


def read_header(file: Node, name: str) -> Header:
    """Read the header of *file* and check it. ``disk_size`` comes back in whole sectors. Raises ImageError."""
    header = Header.parse(file.pread(0, SECTOR))
    if header.disk_size > MAX_DISK_SIZE:
        raise ImageError(
            name,
            f"Unsupported VDI image size (size is {header.disk_size:#x}, max supported is {MAX_DISK_SIZE:#x})",
        )
    header.disk_size = -(-header.disk_size // SECTOR) * SECTOR
    reason = _fault(header)
    if reason:
        raise ImageError(name, reason)
    count = header.blocks_in_image
    if header.disk_size > count * header.block_size:
        raise ImageError(
            name,
            f"unsupported VDI image (disk size {header.disk_size}, image bitmap has room for "
            f"{count * header.block_size})",
        )
    if count > MAX_BLOCKS:
        raise ImageError(name, f"unsupported VDI image (too many blocks {count}, max is {MAX_BLOCKS})")
    return header


def _fault(header: Header) -> str:
    """What keeps an image with these fields from being read, in QEMU's order and words; empty if nothing."""
    if header.signature != SIGNATURE:
        return f"Image not in VDI format (bad signature {header.signature:08x})"
    if header.version != VERSION_1_1:
        return f"unsupported VDI image (version {header.version >> 16}.{header.version & 0xFFFF})"
    if header.offset_bmap % SECTOR:
        return f"unsupported VDI image (unaligned block map offset {header.offset_bmap:#x})"
    if header.offset_data % SECTOR:
        return f"unsupported VDI image (unaligned data offset {header.offset_data:#x})"
    if header.sector_size != SECTOR:
        return f"unsupported VDI image (sector size {header.sector_size} is not {SECTOR})"
    size = header.block_size
    if size < SECTOR or size > MAX_BLOCK_SIZE or size & (size - 1):
        return f"unsupported VDI image (block size {size} is not {BLOCK_SIZE})"
    if header.block_extra:
        return f"unsupported VDI image ({header.block_extra} extra bytes before each block are not 0)"
    return ""
