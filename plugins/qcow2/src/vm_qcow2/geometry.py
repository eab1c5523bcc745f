"""Numbers that follow from the cluster size, the width of a refcount and the version, and the limits of sane images."""

from __future__ import annotations

from . import features
from .header import Header

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
#: Limits that QEMU has too, so that no image which it makes is refused here.
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = 64 << 20
#: Host offsets have 56 bits (*Cluster mapping*).
MAX_HOST_OFFSET = 1 << 56

#: L1 and L2 entries: bits 9-55, the host offset of a table or cluster.
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
#: Bit 63: the refcount is exactly one, so that the table or cluster may be written where it is.
COPIED = 1 << 63
#: Bit 62 of an L2 entry: a compressed cluster.
COMPRESSED = 1 << 62
#: Bit 0 of an L2 entry (version 3): reads as zeroes.
ZERO = 1
#: Subclusters of a cluster, in images with extended L2 entries.
SUBCLUSTERS = 32
#: What must be zero in an L1 entry, and in a standard L2 entry of version 3.
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE


class Geometry:
    """Of one image; see the attributes. Sizes are bytes."""

    __slots__ = (
        "cluster_bits",
        "cluster_size",
        "compressed_offset_mask",
        "compressed_sectors_shift",
        "extended",
        "external",
        "guest_bits",
        "l2_bits",
        "l2_entries",
        "refblock_bits",
        "refblock_entries",
        "refcount_bits",
        "refcount_max",
        "unit_bits",
        "units",
        "version",
    )

    def __init__(self, header: Header) -> None:
        self.version = header.version
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << header.cluster_bits
        #: *Extended L2 Entries*: 128 bits each.
        self.extended = bool(header.incompatible_features & features.EXTENDED_L2)
        #: Guest data is in an external data file.
        self.external = bool(header.incompatible_features & features.DATA_FILE)
        #: Entries of an L2 table.
        self.l2_bits = header.cluster_bits - 3 - self.extended
        self.l2_entries = 1 << self.l2_bits
        #: What is mapped on its own, subclusters or whole clusters: log2 of its bytes, and how many a cluster has.
        self.unit_bits = header.cluster_bits - 5 if self.extended else header.cluster_bits
        self.units = SUBCLUSTERS if self.extended else 1
        #: log2 of the guest bytes under one L2 table.
        self.guest_bits = self.cluster_bits + self.l2_bits
        self.refcount_bits = 1 << header.refcount_order
        self.refcount_max = (1 << self.refcount_bits) - 1
        #: Entries of a refcount block.
        self.refblock_bits = header.cluster_bits + 3 - header.refcount_order
        self.refblock_entries = 1 << self.refblock_bits
        #: *Compressed Clusters Descriptor*: x = 62 - (cluster_bits - 8).
        self.compressed_sectors_shift = 62 - (header.cluster_bits - 8)
        self.compressed_offset_mask = (1 << self.compressed_sectors_shift) - 1

    def l1_entries_for(self, size: int) -> int:
        """Entries of an L1 table that covers *size* guest bytes."""
        return -(-size >> self.guest_bits)

    def compressed_extent(self, entry: int) -> tuple[int, int]:
        """Host offset and length of what a compressed cluster's L2 *entry* points at.

        The length reaches to the end of the last 512-byte sector; the compressed data may end before.
        """
        offset = entry & self.compressed_offset_mask
        sectors = ((entry & (COMPRESSED - 1)) >> self.compressed_sectors_shift) + 1
        return offset, sectors * 512 - (offset & 511)
