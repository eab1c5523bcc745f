"""The header (*Header* in the specification), and what is checked before anything else of an image is believed."""

from __future__ import annotations

from vm_core.block.node import Node
from vm_core.block.structs import Record, u8, u32, u64
from vm_core.errors import ImageError

MAGIC = b"QFI\xfb"
#: Bytes of a version 2 header, and of the shortest version 3 header.
V2_LENGTH = 72
V3_LENGTH = 104
#: What new version 3 images get: up to and with the compression type, padded to a multiple of 8.
NEW_V3_LENGTH = 112
MAX_BACKING_NAME = 1023


class Header(Record, order="big"):
    """The fields at the start of an image. Version 2 ends before ``incompatible_features``; the rest has defaults."""

    magic: int = u32(0, default=int.from_bytes(MAGIC, "big"), doc='"QFI\\xfb"')
    version: int = u32(4, default=3, doc="2 or 3")
    backing_file_offset: int = u64(8, doc="where the name of the backing file is; 0 without one")
    backing_file_size: int = u32(16, doc="bytes of that name, at most 1023, not null-terminated")
    cluster_bits: int = u32(20, default=16, doc="log2 of the cluster size, at least 9")
    size: int = u64(24, doc="virtual disk size in bytes")
    crypt_method: int = u32(32, doc="0 none, 1 AES, 2 LUKS")
    l1_size: int = u32(36, doc="entries of the active L1 table")
    l1_table_offset: int = u64(40, doc="where the active L1 table is; cluster-aligned")
    refcount_table_offset: int = u64(48, doc="where the refcount table is; cluster-aligned")
    refcount_table_clusters: int = u32(56, doc="clusters that the refcount table takes")
    nb_snapshots: int = u32(60, doc="internal snapshots in the image")
    snapshots_offset: int = u64(64, doc="where the snapshot table is; cluster-aligned")
    # Version 3
    incompatible_features: int = u64(72, doc="bits that must all be understood to open the image")
    compatible_features: int = u64(80, doc="bits that can be ignored")
    autoclear_features: int = u64(88, doc="bits that whoever does not understand them clears before writing")
    refcount_order: int = u32(96, default=4, doc="log2 of the bits of a refcount, at most 6; version 2: 4")
    header_length: int = u32(100, default=V2_LENGTH, doc="bytes of the header; version 2: 72")
    # Additional fields
    compression_type: int = u8(104, doc="0 zlib, 1 zstd; not 0 only with the incompatible bit 3")


def read_header(file: Node, name: str) -> Header:
    """Read the header of *file* and check each field on its own, in QEMU's order and words. Raises ImageError.

    What the fields point at is checked where it is read (``store.py``).
    """
    size = file.size
    head = file.pread(0, min(size, 512))
    if head[:4] != MAGIC:
        raise ImageError(name, "Image is not in qcow2 format")
    if len(head) < V2_LENGTH:
        raise ImageError(name, f"truncated: {size} bytes are too few for a qcow2 header", peer=_NOT_READ)
    version = int.from_bytes(head[4:8], "big")
    if version not in (2, 3):
        raise ImageError(name, f"Unsupported qcow2 version {version}")
    if version == 2:
        header = Header.parse(head[:V2_LENGTH])
    else:
        if len(head) < V3_LENGTH:
            text = f"truncated: {size} bytes are too few for a qcow2 version 3 header"
            raise ImageError(name, text, peer=_NOT_READ)
        header = Header.parse(head[: max(V3_LENGTH, Header.parse(head).header_length)])
    if not 9 <= header.cluster_bits <= 21:
        raise ImageError(name, f"Unsupported cluster size: 2^{header.cluster_bits}")
    cluster_size = 1 << header.cluster_bits
    if version == 3:
        if header.header_length < V3_LENGTH:
            raise ImageError(name, "qcow2 header too short")
        if header.header_length > cluster_size:
            raise ImageError(name, "qcow2 header exceeds cluster size")
    if header.backing_file_offset > cluster_size:
        raise ImageError(name, "Invalid backing file offset")
    return header


#: QEMU reads a whole header at once.
_NOT_READ = "Could not read qcow2 header: Input/output error"


def check_table(name: str, header: Header, offset: int, entries: int, width: int, most: int, what: str) -> None:
    """Raise ImageError unless a table of *entries* entries of *width* bytes, *most* bytes in all, can be at *offset*.

    *what* names the table in the message.
    """
    if entries > most // width:
        raise ImageError(name, f"{what} too large")
    if offset & (1 << header.cluster_bits) - 1 or offset + entries * width >= 1 << 63:
        raise ImageError(name, f"{what} offset invalid")
