"""Cylinders, heads and sectors: the addressing of disks before LBA (ATA/ATAPI-5 clause 6.2 and annex C)."""

from __future__ import annotations

from typing import NamedTuple

#: What words 1, 3 and 6 of IDENTIFY can say: 16,514,064 sectors are all that CHS reaches.
MAX_CYLINDERS = 16383


class Geometry(NamedTuple):
    """A translation between CHS and LBA."""

    cylinders: int
    heads: int
    sectors: int

    @classmethod
    def of(cls, total: int) -> Geometry:
        """The geometry that a disk of *total* sectors reports: 16 heads, 63 sectors, at most 16383 cylinders."""
        return cls(max(2, min(total // (16 * 63), MAX_CYLINDERS)), 16, 63)

    @classmethod
    def current(cls, total: int, heads: int, sectors: int) -> Geometry:
        """What INITIALIZE DEVICE PARAMETERS with *heads* and *sectors* makes of *total* sectors."""
        return cls(min(total // (heads * sectors), 65535), heads, sectors)

    @property
    def capacity(self) -> int:
        """Sectors that CHS addresses reach."""
        return self.cylinders * self.heads * self.sectors

    def to_lba(self, cylinder: int, head: int, sector: int) -> int | None:
        """The LBA of a CHS address, None for one that the geometry does not have. Sectors count from 1."""
        if not 1 <= sector <= self.sectors or head >= self.heads:
            return None
        return (cylinder * self.heads + head) * self.sectors + sector - 1

    def to_chs(self, lba: int) -> tuple[int, int, int]:
        """Cylinder, head and sector of *lba*."""
        track, sector = divmod(lba, self.sectors)
        cylinder, head = divmod(track, self.heads)
        return cylinder, head, sector + 1
