"""The footer, the dynamic disk header and parent locators as they lie on the disk. Numbers are big-endian.

A fixed image is the disk and, behind it, the footer. A dynamic or differencing one begins with a copy of the footer,
then come the dynamic disk header, the block allocation table and the blocks, and at the end the footer again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u8, u16, u32, u64

COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
SECTOR = 512
VERSION = 0x00010000
#: Seconds from the UNIX epoch to that of time stamps, 2000-01-01 00:00 UTC.
EPOCH = 946684800
#: ``data_offset`` of what has no next structure.
NOWHERE = (1 << 64) - 1

#: ``disk_type``
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4

#: Platform codes of parent locators: relative and absolute Windows paths in UTF-16, a file URL in UTF-8.
RELATIVE, ABSOLUTE, FILE_URL = b"W2ru", b"W2ku", b"MacX"


class Footer(Record, order="big"):
    """*Hard Disk Footer Format*."""

    cookie: bytes = raw(0, 8, doc="conectix")
    features: int = u32(8, default=2, doc="bit 1 is always set")
    version: int = u32(12, default=VERSION)
    data_offset: int = u64(16, default=NOWHERE, doc="where the dynamic disk header is; all ones in a fixed image")
    timestamp: int = u32(24, doc="seconds since 2000-01-01 UTC")
    creator: bytes = raw(28, 4, doc="which program made the image")
    creator_version: int = u32(32)
    creator_os: bytes = raw(36, 4, doc="Wi2k or Mac ")
    original_size: int = u64(40, doc="bytes of the disk when it was made")
    current_size: int = u64(48, doc="bytes of the disk now")
    cylinders: int = u16(56)
    heads: int = u8(58)
    sectors: int = u8(59, doc="a track")
    disk_type: int = u32(60, doc="2 fixed, 3 dynamic, 4 differencing")
    checksum: int = u32(64, doc="one's complement of the sum of all bytes but these")
    uuid: bytes = raw(68, 16, doc="by which a differencing image knows its parent")
    saved_state: int = u8(84)

    @property
    def recognised(self) -> bool:
        """Whether it is a footer at all."""
        return self.cookie == COOKIE


class DynamicHeader(Record, order="big"):
    """*Dynamic Disk Header Format*; parent locators follow at 576."""

    cookie: bytes = raw(0, 8, doc="cxsparse")
    data_offset: int = u64(8, default=NOWHERE)
    table_offset: int = u64(16, doc="where the block allocation table is, in bytes")
    version: int = u32(24, default=VERSION)
    max_table_entries: int = u32(28, doc="blocks of the disk")
    block_size: int = u32(32, doc="bytes of a block's data, without the bitmap before it")
    checksum: int = u32(36)
    parent_uuid: bytes = raw(40, 16)
    parent_timestamp: int = u32(56, doc="when the parent was last changed")
    parent_name: bytes = raw(64, 512, doc="the parent's name in UTF-16, without a path")


class Locator(Record, order="big"):
    """*Parent Locator*, one of eight."""

    code: bytes = raw(0, 4, doc="what the locator is: see the platform codes")
    space: int = u32(4, doc="sectors set aside for it (some programs store bytes)")
    length: int = u32(8, doc="bytes of it")
    offset: int = u64(16, doc="where it is, in bytes")


FOOTER_LENGTH = 512
HEADER_LENGTH = 1024
LOCATORS = range(576, 576 + 8 * 24, 24)


def checksum(data: bytes | bytearray, at: int) -> int:
    """The check sum of *data*, which is at offset *at* of it and counts as zero itself."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFFFFFF


def seal(record: Footer | DynamicHeader) -> bytes:
    """The bytes of a footer or header with their check sum, as long as they are on disk."""
    length = FOOTER_LENGTH if isinstance(record, Footer) else HEADER_LENGTH
    at = record.field("checksum").offset
    record.checksum = checksum(record.pack(), at)
    return record.pack().ljust(length, b"\0")


def sealed(data: bytes, at: int) -> bool:
    """Whether the check sum at offset *at* of *data* is right."""
    return int.from_bytes(data[at : at + 4], "big") == checksum(data, at)


def footer_at_end(file: Node) -> tuple[int, bytes] | None:
    """Where the footer at the end of *file* is, and its sector; None where there is none.

    Old versions of Virtual PC wrote footers of 511 bytes.
    """
    size = file.size
    for start in (size - 512, size - 511):
        if start >= 0:
            data = file.pread(start, FOOTER_LENGTH)
            if data.startswith(COOKIE):
                return start, data
    return None


def with_locators(header: DynamicHeader, found: Sequence[Locator]) -> bytes:
    """The bytes of a dynamic disk header with its parent locators and its check sum."""
    data = bytearray(header.pack().ljust(HEADER_LENGTH, b"\0"))
    for at, locator in zip(LOCATORS, found, strict=False):
        data[at : at + Locator.LENGTH] = locator.pack()
    at = header.field("checksum").offset
    header.checksum = checksum(data, at)
    data[at : at + 4] = header.checksum.to_bytes(4, "big")
    return bytes(data)


def locators(header: bytes) -> Iterator[Locator]:
    """The parent locators of a differencing image, of which *header* is the dynamic disk header."""
    for at in LOCATORS:
        locator = Locator.parse(header, at)
        if locator.length:
            yield locator
