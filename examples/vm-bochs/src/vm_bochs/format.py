"""Bochs' growing images: a header, a catalog of extents, and extents that each begin with a bitmap of their sectors.

Source: the "redolog" structures of the Bochs user manual, section "Disk image modes". All numbers are little-endian.
"""

from array import array
from struct import Struct

from vm_core.block.format import Format
from vm_core.block.mapping import Kind, Mapping
from vm_core.errors import ImageError

SECTOR = 512
ABSENT = 0xFFFFFFFF
#     magic, type, subtype, version, header size | catalog entries, bitmap bytes, extent bytes, timestamp, disk bytes
HEADER = Struct("<32s16s16sII IIIIQ")
#     the same before version 2, which had no timestamp
HEADER_V1 = Struct("<32s16s16sII IIIQ")


class Bochs(Format):
    """One open image. ``_catalog[n]`` is the number of the extent that holds guest extent *n*."""

    readonly = True
    tells_clusters = peer_maps = False

    @classmethod
    def open(cls, file, options, context):
        self = cls()
        self.file = file
        head = file.pread(0, SECTOR)
        _, kind, subtype, version, header, entries, bitmap, extent, *_, disk = HEADER.unpack_from(head)
        if version == 0x10000:
            disk = HEADER_V1.unpack_from(head)[-1]
        elif version != 0x20000:
            raise ImageError(context.filename, f"Bochs image version {version:#x} is not supported (1.0 and 2.0 are)")
        if kind.rstrip(b"\0") != b"Redolog" or subtype.rstrip(b"\0") != b"Growing":
            raise ImageError(context.filename, "only growing Bochs images are supported")
        if entries > 0x1FFFFFFF or header + 4 * entries > max(file.size, header + 4):
            raise ImageError(context.filename, "Catalog size is too large")
        if extent < SECTOR:
            raise ImageError(context.filename, f"Extent size must be at least {SECTOR}")
        if extent & (extent - 1):
            raise ImageError(context.filename, f"Extent size {extent} is not a power of two")
        if extent > 1 << 23:
            raise ImageError(context.filename, f"Extent size {extent} is too large")
        if entries < -(-disk // extent):
            raise ImageError(context.filename, "Catalog size is too small for this disk size")
        if bitmap * 8 * SECTOR < extent or bitmap > 1 << 16:
            raise ImageError(context.filename, f"a bitmap of {bitmap} bytes does not go with extents of {extent}")
        self._catalog = array("I", file.pread(header, 4 * entries))
        self._bitmap, self._extent, self._disk = bitmap, extent, disk
        self._start, self._name = header + 4 * entries, context.filename
        return self

    @property
    def size(self):
        return self._disk

    def map(self, offset, length):
        end = offset + length
        while offset < end:
            number, within = divmod(offset, self._extent)
            run = min(end - offset, self._extent - within)
            if self._catalog[number] == ABSENT:
                yield Mapping(Kind.ZERO, offset, run)
            else:
                yield from self._extent_runs(self._catalog[number], offset, within, run)
            offset += run

    def _extent_runs(self, number, offset, within, length):
        """Runs of written (DATA) and never written (ZERO) sectors inside one extent."""
        bitmap_area = -(-self._bitmap // SECTOR) * SECTOR
        base = self._start + number * (bitmap_area + self._extent)
        if base + bitmap_area + self._extent > self.file.size:
            raise ImageError(self._name, f"extent {number} at {base:#x} lies outside the file")
        bitmap = self.file.pread(base, self._bitmap)
        end = within + length
        while within < end:
            written = bitmap[within // SECTOR // 8] >> (within // SECTOR % 8) & 1
            stop = (within // SECTOR + 1) * SECTOR
            while stop < end and bitmap[stop // SECTOR // 8] >> (stop // SECTOR % 8) & 1 == written:
                stop += SECTOR
            run = min(stop, end) - within
            if written:
                yield Mapping(Kind.DATA, offset, run, self.file, base + bitmap_area + within)
            else:
                yield Mapping(Kind.ZERO, offset, run)
            within, offset = within + run, offset + run
