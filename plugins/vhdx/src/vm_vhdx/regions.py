"""The region table, of which there are two copies: where the other structures are (2.2.3)."""

from __future__ import annotations

from typing import NamedTuple

from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u32, u64

from . import guids
from .headers import KIB, MIB, invalid, sealed, unsupported

#: Where the copies are.
PLACES = (192 * KIB, 256 * KIB)
LENGTH = 64 * KIB
MAX_ENTRIES = 2047
HEADER_LENGTH = 16


class Entry(Record, order="little"):
    """One region."""

    guid: bytes = raw(0, 16)
    offset: int = u64(16, doc="multiple of 1 MiB")
    length: int = u32(24, doc="multiple of 1 MiB")
    required: int = u32(28, doc="1: who does not know the region must not open the file")


class Region(NamedTuple):
    """A place in the file, in bytes."""

    name: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def read_regions(file: Node, name: str) -> dict[bytes, Region]:
    """The two regions that are known, by GUID. Raises ImageError for one that is missing, or required and unknown."""
    for place in PLACES:
        data = file.pread(place, LENGTH)
        if data.startswith(b"regi") and sealed(data):
            break
    else:
        raise invalid(name, "neither copy of the region table is sound")
    count = int.from_bytes(data[8:12], "little")
    if count > MAX_ENTRIES:
        raise invalid(name, f"a region table of {count} entries; {MAX_ENTRIES} are the most")
    found: dict[bytes, Region] = {}
    for index in range(count):
        entry = Entry.parse(data, HEADER_LENGTH + index * Entry.LENGTH)
        what = {guids.BAT: "block allocation table", guids.METADATA: "metadata"}.get(entry.guid)
        if what is None:
            if entry.required & 1:
                raise unsupported(name, f"a required region of unknown kind: {guids.show(entry.guid)}")
            continue
        if entry.guid in found:
            raise invalid(name, f"two regions of the {what}")
        if entry.offset < MIB or entry.offset % MIB or not entry.length:
            raise invalid(name, f"the {what} at {entry.offset:#x}, {entry.length} bytes, is no region")
        if entry.offset >= file.size:
            raise invalid(name, f"the {what} at {entry.offset:#x} lies outside the file")
        found[entry.guid] = Region(what, entry.offset, entry.length)
    for wanted, what in ((guids.BAT, "block allocation table"), (guids.METADATA, "metadata")):
        if wanted not in found:
            raise invalid(name, f"the region of the {what} is missing")
    return found


def check_overlaps(regions: list[Region], name: str) -> None:
    """Raise ImageError where a region lies on one before it in the list."""
    for index, one in enumerate(regions):
        for other in reversed(regions[:index]):
            if one.offset < other.end and other.offset < one.end:
                raise invalid(name, overlap_text(one.offset, one.length, other))


def overlap_text(offset: int, length: int, other: Region) -> str:
    """QEMU's sentence about two places that overlap."""
    return f"VHDX region {offset}-{offset + length} overlaps with region {other.offset}-{other.end}"
