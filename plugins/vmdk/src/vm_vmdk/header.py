"""On-disk structures of VMware's sparse extents: *Virtual Disk Format 5.0*, sections "Simple Extents" (hosted sparse),
"ESXi Host Sparse Extents" (COWD) and "Stream-Optimized Compressed". Everything is little-endian; offsets and sizes are
in sectors of 512 bytes unless a field says otherwise.
"""

from __future__ import annotations

from vm_core.block.structs import Record, raw, u8, u16, u32, u64

SECTOR = 512

MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"

#: ``flags`` of hosted sparse extents.
FLAG_NEWLINES = 1 << 0
FLAG_REDUNDANT = 1 << 1
FLAG_ZEROED = 1 << 2
FLAG_COMPRESSED = 1 << 16
FLAG_MARKERS = 1 << 17

#: ``gd_offset`` of a header whose true values stand in the footer.
GD_AT_END = (1 << 64) - 1

#: ``compress_algorithm``.
COMPRESSION_NONE = 0
COMPRESSION_DEFLATE = 1

#: The line ends of ``newlines``: a transfer as text changes them.
NEWLINES = b"\n \r\n"

#: An entry of a grain table, where the header allows it: the grain is zeroes and takes no space.
GTE_ZEROED = 1

#: ``type`` of markers without data.
MARKER_EOS = 0
MARKER_TABLE = 1
MARKER_DIRECTORY = 2
MARKER_FOOTER = 3

#: Entries of a COWD grain table; it is as long as its directory's first sector is far from the file's start.
COWD_TABLE_ENTRIES = 4096


class SparseHeader(Record, order="little"):
    """``SparseExtentHeader``, and the footer of a stream: the first of 512 bytes."""

    magic: bytes = raw(0, 4, default=MAGIC, doc='"KDMV"')
    version: int = u32(4, default=1, doc="1; 2 with zeroed grains; 3 with change tracking, and for streams")
    flags: int = u32(8, default=FLAG_NEWLINES | FLAG_REDUNDANT, doc="FLAG_…")
    capacity: int = u64(12, doc="the extent's size")
    grain_size: int = u64(20, default=128, doc="a power of two, at least 8")
    descriptor_offset: int = u64(28, doc="the embedded descriptor; 0 without one")
    descriptor_size: int = u64(36, doc="its size")
    table_entries: int = u32(44, default=512, doc="entries of a grain table")
    rgd_offset: int = u64(48, doc="the redundant grain directory")
    gd_offset: int = u64(56, doc="the grain directory; GD_AT_END: see the footer")
    overhead: int = u64(64, doc="sectors of metadata before the first grain")
    unclean: int = u8(72, doc="not 0 while the extent is open for writing")
    newlines: bytes = raw(73, 4, default=NEWLINES, doc="line ends, to notice transfers as text")
    compress_algorithm: int = u16(77, doc="0 none, 1 deflate")
    padding: bytes = raw(79, 433, doc="zeroes")


class Marker(Record, order="little"):
    """``Marker`` of streams: before each grain (*size* bytes of data follow at once) and before metadata (*size* 0)."""

    value: int = u64(0, doc="the grain's first sector in the extent; for metadata its sectors")
    size: int = u32(8, doc="bytes of compressed data, 0 for metadata")
    type: int = u32(12, doc="MARKER_…, only where size is 0")


#: Bytes of a marker before a grain's data.
GRAIN_MARKER = 12


class CowdHeader(Record, order="little"):
    """``COWDisk_Header``: an ESXi host sparse extent, 2048 bytes."""

    magic: bytes = raw(0, 4, default=COWD_MAGIC, doc='"COWD"')
    version: int = u32(4, default=1, doc="1")
    flags: int = u32(8, default=3, doc="3")
    sectors: int = u32(12, doc="the extent's size")
    grain_size: int = u32(16, default=1, doc="sectors of a grain")
    gd_offset: int = u32(20, default=4, doc="the grain directory")
    gd_entries: int = u32(24, doc="its entries")
    free_sector: int = u32(28, doc="the next sector to allocate")
    # Of a root disk: cylinders, heads, sectors; of a child: the parent's name (1024 bytes) and generation.
    unclean: int = u32(1648, doc="not 0 while the extent is open for writing")


class SeSparseHeader(Record, order="little"):
    """The constant header of a space-efficient sparse extent (seSparse, ESXi 6.5): the first sector of the file."""

    magic: int = u64(0, default=0xCAFEBABE, doc="0xCAFEBABE")
    version: int = u64(8, default=0x0000000200000001, doc="2.1")
    capacity: int = u64(16, doc="the extent's size")
    grain_size: int = u64(24, default=8, doc="sectors of a grain: 8")
    table_size: int = u64(32, default=64, doc="sectors of a grain table: 64")
    flags: int = u64(40, doc="0")
    reserved1: int = u64(48)
    reserved2: int = u64(56)
    reserved3: int = u64(64)
    reserved4: int = u64(72)
    volatile_header_offset: int = u64(80)
    volatile_header_size: int = u64(88)
    journal_header_offset: int = u64(96)
    journal_header_size: int = u64(104)
    journal_offset: int = u64(112)
    journal_size: int = u64(120)
    gd_offset: int = u64(128, doc="the grain directory")
    gd_size: int = u64(136)
    tables_offset: int = u64(144, doc="all grain tables, one behind the other")
    tables_size: int = u64(152)
    free_bitmap_offset: int = u64(160)
    free_bitmap_size: int = u64(168)
    backmap_offset: int = u64(176)
    backmap_size: int = u64(184)
    grains_offset: int = u64(192, doc="all grains, one behind the other")
    grains_size: int = u64(200)
    padding: bytes = raw(208, 304, doc="zeroes")


class SeSparseVolatileHeader(Record, order="little"):
    """The volatile header of a seSparse extent."""

    magic: int = u64(0, default=0xCAFECAFE, doc="0xCAFECAFE")
    free_table_number: int = u64(8)
    next_transaction: int = u64(16)
    replay_journal: int = u64(24, doc="not 0: the journal has changes that are not in the tables yet")
    padding: bytes = raw(32, 480, doc="zeroes")
