"""The metadata: sizes of disk, blocks and sectors; the parent locator (2.6)."""

from __future__ import annotations

from typing import NamedTuple

from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u16, u32
from vm_core.errors import ImageError

from . import guids
from .headers import KIB, MIB, invalid, unsupported
from .regions import Region

#: What the log writes at a time.
SECTOR = 4 * KIB
TABLE_LENGTH = 64 * KIB
MAX_ENTRIES = 2047
HEADER_LENGTH = 32
#: Items are at most this long (2.6.1.2).
MAX_ITEM = MIB
MAX_DISK_SIZE = 64 << 40
MIN_BLOCK, MAX_BLOCK = MIB, 256 * MIB

#: Flags of an entry.
IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4
#: Flags of the file parameters.
LEAVE_ALLOCATED, HAS_PARENT = 1, 2


class Entry(Record, order="little"):
    """One item (2.6.1.2)."""

    guid: bytes = raw(0, 16)
    offset: int = u32(16, doc="from the start of the region")
    length: int = u32(20)
    flags: int = u32(24)
    reserved: int = u32(28)


class LocatorHeader(Record, order="little"):
    """The start of a parent locator (2.6.2.6.1)."""

    kind: bytes = raw(0, 16)
    count: int = u16(18, doc="pairs of key and value")


class LocatorEntry(Record, order="little"):
    """One pair, both in UTF-16; offsets are from the start of the locator (2.6.2.6.2)."""

    key_offset: int = u32(0)
    value_offset: int = u32(4)
    key_length: int = u16(8)
    value_length: int = u16(10)


class Metadata(NamedTuple):
    """What is known of the disk."""

    block_size: int
    disk_size: int
    sector_size: int
    has_parent: bool
    #: Keys and values of the parent locator.
    locator: dict[str, str]


_KNOWN = {
    guids.FILE_PARAMETERS: "file parameters",
    guids.DISK_SIZE: "virtual disk size",
    guids.DISK_ID: "virtual disk id",
    guids.LOGICAL_SECTOR: "logical sector size",
    guids.PHYSICAL_SECTOR: "physical sector size",
    guids.PARENT_LOCATOR: "parent locator",
}
_MUST = (
    guids.FILE_PARAMETERS,
    guids.DISK_SIZE,
    guids.DISK_ID,
    guids.LOGICAL_SECTOR,
    guids.PHYSICAL_SECTOR,
)


def read_metadata(file: Node, region: Region, name: str) -> Metadata:
    """Read and check the metadata. Raises ImageError, by name for what is not understood."""
    data = file.pread(region.offset, TABLE_LENGTH)
    if not data.startswith(b"metadata"):
        raise invalid(name, f"the metadata table at {region.offset:#x} has no signature")
    count = int.from_bytes(data[10:12], "little")
    if count > MAX_ENTRIES:
        raise invalid(name, f"a metadata table of {count} entries; {MAX_ENTRIES} are the most")
    entries: dict[bytes, Entry] = {}
    for index in range(count):
        entry = Entry.parse(data, HEADER_LENGTH + index * Entry.LENGTH)
        what = _KNOWN.get(entry.guid)
        if what is None or entry.flags & IS_USER:
            if entry.flags & IS_REQUIRED:
                raise unsupported(name, f"a required metadata item of unknown kind: {guids.show(entry.guid)}")
            continue
        if entry.guid in entries:
            raise invalid(name, f"two metadata items {what!r}")
        if entry.offset < TABLE_LENGTH or entry.length > MAX_ITEM or entry.offset + entry.length > region.length:
            raise invalid(name, f"the metadata item {what!r} at {entry.offset:#x} lies outside the metadata")
        entries[entry.guid] = entry
    for item in _MUST:
        if item not in entries:
            raise unsupported(name, f"the metadata item {_KNOWN[item]!r} is missing")

    def number(item: bytes, at: int, length: int) -> int:
        where = region.offset + entries[item].offset + at
        return int.from_bytes(file.pread(where, length), "little")

    block = number(guids.FILE_PARAMETERS, 0, 4)
    flags = number(guids.FILE_PARAMETERS, 4, 4)
    size = number(guids.DISK_SIZE, 0, 8)
    sector = number(guids.LOGICAL_SECTOR, 0, 4)
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise invalid(name, f"a block size of {block} bytes; a power of two from 1 MiB to 256 MiB is needed")
    if sector not in (512, 4096):
        raise unsupported(name, f"logical sectors of {sector} bytes are not supported; 512 and 4096 are")
    if size > MAX_DISK_SIZE:
        raise invalid(name, f"a disk of {size} bytes; 64 TiB are the most")
    has_parent = bool(flags & HAS_PARENT)
    locator: dict[str, str] = {}
    if has_parent:
        if guids.PARENT_LOCATOR not in entries:
            raise invalid(name, "a differencing image without a parent locator")
        entry = entries[guids.PARENT_LOCATOR]
        locator = read_locator(file.pread(region.offset + entry.offset, entry.length), name)
    return Metadata(block, size // 512 * 512, sector, has_parent, locator)


def read_locator(data: bytes, name: str) -> dict[str, str]:
    """Keys and values of a parent locator. Raises ImageError."""
    header = LocatorHeader.parse(data)
    if header.kind != guids.VHDX_LOCATOR:
        raise unsupported(name, f"a parent locator of unknown type: {guids.show(header.kind)}")
    found: dict[str, str] = {}
    room = len(data)
    for index in range(header.count):
        at = LocatorHeader.LENGTH + index * LocatorEntry.LENGTH
        if at + LocatorEntry.LENGTH > len(data):
            raise invalid(name, f"a parent locator of {header.count} entries does not fit its {len(data)} bytes")
        entry = LocatorEntry.parse(data, at)
        room -= LocatorEntry.LENGTH + entry.key_length + entry.value_length
        if room < 0:
            raise invalid(name, f"keys and values of a parent locator of {len(data)} bytes lie on one another")
        key = data[entry.key_offset : entry.key_offset + entry.key_length]
        value = data[entry.value_offset : entry.value_offset + entry.value_length]
        found[key.decode("utf-16-le", "replace")] = value.decode("utf-16-le", "replace")
    return found


def build_locator(pairs: dict[str, str]) -> bytes:
    """The bytes of a parent locator with these keys and values."""
    position = LocatorHeader.LENGTH + len(pairs) * LocatorEntry.LENGTH
    entries: list[bytes] = []
    texts: list[bytes] = []
    for key, value in pairs.items():
        stored = key.encode("utf-16-le"), value.encode("utf-16-le")
        entry = LocatorEntry(
            key_offset=position,
            value_offset=position + len(stored[0]),
            key_length=len(stored[0]),
            value_length=len(stored[1]),
        )
        entries.append(entry.pack())
        texts += stored
        position += len(stored[0]) + len(stored[1])
    head = LocatorHeader(kind=guids.VHDX_LOCATOR, count=len(pairs)).pack()
    return b"".join([head, *entries, *texts])


def replace_locator(file: Node, region: Region, name: str, data: bytes) -> list[tuple[int, bytes]]:
    """What has to be written to have *data* as the parent locator: sectors of 4 KiB, as (offset, contents).

    They belong together. Raises ImageError where there is no room for them.
    """
    table = bytearray(file.pread(region.offset, TABLE_LENGTH))
    count = min(int.from_bytes(table[10:12], "little"), MAX_ENTRIES)
    places = [HEADER_LENGTH + index * Entry.LENGTH for index in range(count)]
    entries = [Entry.parse(table, at) for at in places]
    at, own = next((at, one) for at, one in zip(places, entries, strict=True) if one.guid == guids.PARENT_LOCATOR)
    others = [(one.offset, one.offset + one.length) for one in entries if one is not own and one.length]
    if any(start < own.offset + len(data) and own.offset < end for start, end in others):
        # Behind all others.
        own.offset = -(-max(end for _, end in others) // SECTOR) * SECTOR
    if len(data) > MAX_ITEM or own.offset + len(data) > region.length:
        raise ImageError(name, f"the metadata has no room for a parent locator of {len(data)} bytes")
    own.length = len(data)
    table[at : at + Entry.LENGTH] = own.pack()
    sector = at // SECTOR * SECTOR  # entries lie within one
    found = {sector: bytes(table[sector : sector + SECTOR])}
    first, last = own.offset // SECTOR * SECTOR, -(-(own.offset + len(data)) // SECTOR) * SECTOR
    body = bytearray(file.pread(region.offset + first, last - first))
    body[own.offset - first : own.offset - first + len(data)] = data
    found |= {first + start: bytes(body[start : start + SECTOR]) for start in range(0, len(body), SECTOR)}
    return [(region.offset + place, contents) for place, contents in sorted(found.items())]
