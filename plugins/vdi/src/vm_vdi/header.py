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

#: Block size of new images, and the one that QEMU takes.
BLOCK_SIZE = 1 << 20
#: The largest block map that QEMU handles has this many entries: with its header's sector below 2 GiB.
MAX_BLOCKS = (0x7FFFFFFF - SECTOR) // 4 - 2 * SECTOR // 4 + 257
MAX_BLOCKS = 536870784
MAX_DISK_SIZE = MAX_BLOCKS * BLOCK_SIZE
#: Larger blocks are surely nonsense.
MAX_BLOCK_SIZE = 1 << 30
