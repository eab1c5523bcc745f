"""Cylinders, heads and sectors; how large a disk is, which is not always what it says.

Virtual PC shows a guest as many sectors as the geometry has, Hyper-V as many as ``current_size`` says. Who made an
image tells which of them to believe; QEMU writes creators of its own for either.
"""

from __future__ import annotations

from typing import NamedTuple

from .footer import SECTOR, Footer

#: The largest geometry; a disk that has it is as large as ``current_size`` says.
LARGEST = (65535, 16, 255)
LARGEST_SECTORS = 65535 * 16 * 255
#: 2040 GiB: what the block allocation table can address with blocks of 2 MiB.
MAX_SECTORS = 0xFF000000

#: Creators whose images are as large as ``current_size`` says: Hyper-V, Disk2vhd, blktap, and QEMU with force_size.
BY_SIZE = (b"win ", b"d2v ", b"tap\0", b"qem2")
#: Creators of images made by QEMU: by geometry, by size.
QEMU, QEMU_BY_SIZE = b"qemu", b"qem2"


class Geometry(NamedTuple):
    """What a BIOS shows."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def total(self) -> int:
        """Sectors of the disk."""
        return self.cylinders * self.heads * self.sectors


def geometry_of(sectors: int) -> Geometry:
    """*Appendix: CHS Calculation*: the geometry of a disk of *sectors*, rounded down."""
    if sectors > LARGEST_SECTORS:
        return Geometry(*LARGEST)
    if sectors >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        cylinders_times_heads = sectors // per_track
    else:
        per_track = 17
        cylinders_times_heads = sectors // per_track
        heads = max((cylinders_times_heads + 1023) // 1024, 4)
        if cylinders_times_heads >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            cylinders_times_heads = sectors // per_track
        if cylinders_times_heads >= heads * 1024:
            per_track, heads = 63, 16
            cylinders_times_heads = sectors // per_track
    return Geometry(cylinders_times_heads // heads, heads, per_track)


def geometry_for(sectors: int) -> Geometry:
    """The smallest geometry by that calculation that has room for *sectors*."""
    if not sectors:
        return Geometry(0, 0, 0)
    wanted = min(sectors, LARGEST_SECTORS)
    found = geometry_of(wanted)
    extra = 1
    while found.total < wanted:
        found = geometry_of(wanted + extra)
        extra += 1
    return found


def disk_sectors(footer: Footer, calculation: str | None) -> int:
    """Sectors that a guest sees. *calculation* is ``chs``, ``current_size``, or None: as the creator would have it."""
    by_geometry = footer.cylinders * footer.heads * footer.sectors
    if calculation is None:
        calculation = "current_size" if footer.creator in BY_SIZE else "chs"
    if calculation == "current_size" or by_geometry == LARGEST_SECTORS:
        return int(footer.current_size) // SECTOR
    return by_geometry
