"""Images made by hand, from the descriptions of the formats: what no program at hand writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

SECTOR = 512

DESCRIPTOR = """# Disk DescriptorFile
version=1
CID={cid}
parentCID={parent_cid}
createType="{kind}"
{more}
# Extent description
{extents}

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.adapterType = "lsilogic"
"""


def describe(
    extents: str,
    *,
    kind: str = "twoGbMaxExtentFlat",
    cid: str = "12345678",
    parent_cid: str = "ffffffff",
    more: str = "",
) -> str:
    """The text of a descriptor."""
    return DESCRIPTOR.format(extents=extents, kind=kind, cid=cid, parent_cid=parent_cid, more=more)


def cowd(path: Path, sectors: int, grains: Mapping[int, bytes], grain_sectors: int = 1) -> None:
    """An ESXi host sparse extent (vmfsSparse): header, grain directory at sector 4, tables and grains as they come."""
    tables = -(-sectors // (4096 * grain_sectors))
    directory = [0] * tables
    place = 4 + -(-tables * 4 // SECTOR)
    pieces: dict[int, bytes] = {}
    entries: dict[int, list[int]] = {}
    for number, data in grains.items():
        table = number // 4096
        if table not in entries:
            directory[table] = place
            entries[table] = [0] * 4096
            place += 32
        entries[table][number % 4096] = place
        pieces[place] = data.ljust(grain_sectors * SECTOR, b"\0")
        place += grain_sectors
    header = struct.pack("<4s7I", b"COWD", 1, 3, sectors, grain_sectors, 4, tables, place)
    image = bytearray(place * SECTOR)
    image[: len(header)] = header
    image[4 * SECTOR : 4 * SECTOR + tables * 4] = struct.pack(f"<{tables}I", *directory)
    for table, values in entries.items():
        start = directory[table] * SECTOR
        image[start : start + 4096 * 4] = struct.pack("<4096I", *values)
    for where, data in pieces.items():
        image[where * SECTOR : where * SECTOR + len(data)] = data
    path.write_bytes(image)


#: Types of seSparse table entries.
UNMAPPED, ZEROED = 1, 2


def sesparse(path: Path, sectors: int, grains: Mapping[int, bytes | int]) -> None:
    """A space-efficient sparse extent: *grains* of 4 KiB by number, or the type of an entry without data."""
    span = 4096
    tables = -(-sectors // (span * 8))
    directory = [0] * tables
    entries: dict[int, list[int]] = {}
    data: list[bytes] = []
    for number, content in grains.items():
        table = number // span
        if table not in entries:
            directory[table] = 0x1000000000000000 | len(entries)
            entries[table] = [0] * span
        if isinstance(content, int):
            entries[table][number % span] = content << 60
        else:
            place = len(data)
            data.append(content.ljust(4096, b"\0"))
            entries[table][number % span] = 0x3000000000000000 | (place & 0xFFF) << 48 | place >> 12
    volatile, gd = 1, 2
    gd_size = -(-tables * 8 // SECTOR)
    first_table = gd + gd_size
    first_grain = first_table + len(entries) * 64
    fields = [0xCAFEBABE, 0x0000000200000001, sectors, 8, 64, 0, 0, 0, 0, 0, volatile, 1, 0, 0, 0, 0]
    fields += [gd, gd_size, first_table, len(entries) * 64, 0, 0, 0, 0, first_grain, len(data) * 8]
    image = bytearray(first_grain * SECTOR)
    image[:208] = struct.pack("<26Q", *fields)
    image[SECTOR : SECTOR + 32] = struct.pack("<4Q", 0xCAFECAFE, 0, 0, 0)
    image[gd * SECTOR : gd * SECTOR + tables * 8] = struct.pack(f"<{tables}Q", *directory)
    for number, values in enumerate(entries.values()):
        start = (first_table + number * 64) * SECTOR
        image[start : start + span * 8] = struct.pack(f"<{span}Q", *values)
    path.write_bytes(bytes(image) + b"".join(data))


def stream(path: Path, sectors: int, grains: Mapping[int, bytes], *, version: int = 3, name: str = "d.vmdk") -> None:
    """A stream-optimized image as VMware writes it: tables behind their grains, directory and footer at the end."""
    grain, entries = 128, 512
    text = describe(f'RDONLY {sectors} SPARSE "{name}"', kind="streamOptimized").encode().ljust(20 * SECTOR, b"\0")
    image = bytearray(SECTOR) + text
    image += bytes(-len(image) % (grain * SECTOR))
    tables = -(-sectors // (grain * entries))
    directory = [0] * tables

    def pad() -> None:
        image.extend(bytes(-len(image) % SECTOR))

    for table in range(tables):
        values = [0] * entries
        for number in sorted(grains):
            if number // entries != table:
                continue
            values[number % entries] = len(image) // SECTOR
            packed = zlib.compress(grains[number])
            image += struct.pack("<QI", number * grain, len(packed)) + packed
            pad()
        if any(values):
            image += struct.pack("<QII", 4, 0, 1).ljust(SECTOR, b"\0")
            directory[table] = len(image) // SECTOR
            image += struct.pack(f"<{entries}I", *values)
    size = -(-tables * 4 // SECTOR)
    image += struct.pack("<QII", size, 0, 2).ljust(SECTOR, b"\0")
    place = len(image) // SECTOR
    image += struct.pack(f"<{tables}I", *directory)
    pad()
    image += struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\0")

    def header(gd: int) -> bytes:
        flags = 1 | 1 << 16 | 1 << 17
        fields = struct.pack(
            "<4sIIQQQQIQQQB4sH", b"KDMV", version, flags, sectors, grain, 1, 20, entries, 0, gd, 128, 0, b"\n \r\n", 1
        )
        return fields.ljust(SECTOR, b"\0")

    image += header(place) + bytes(SECTOR)
    image[:SECTOR] = header((1 << 64) - 1)
    path.write_bytes(image)
