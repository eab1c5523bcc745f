"""The driver.

Source: the keramics project's description "Universal Disk Image Format" (keramics.github.io/udif.html). All numbers are
big-endian. The file ends with the *koly* trailer, which points to an XML property list; its ``resource-fork`` →
``blkx`` holds a *mish* table a partition, whose entries say for runs of sectors where and how they are stored.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from vm_core.block.format import Format
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.structs import Record, raw, u32, u64
from vm_core.errors import BlockError, ImageError

from . import adc

if TYPE_CHECKING:
    from collections.abc import Callable

    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext

SECTOR = 512
TRAILER = 512
MAX_PLIST = 64 << 20
#: One chunk is decompressed at a time, in memory.
MAX_CHUNK = 64 << 20
MAX_CHUNKS = 4 << 20


class Koly(Record):
    """The trailer."""

    signature: bytes = raw(0, 4, doc="koly")
    version: int = u32(4, doc="4")
    data_fork_offset: int = u64(24, doc="what the offsets of chunks are relative to")
    data_fork_length: int = u64(32)
    segments: int = u32(60, doc="files that the image is split into; 0 and 1: this one")
    plist_offset: int = u64(216)
    plist_length: int = u64(224)
    sectors: int = u64(492, doc="sectors of the disk")


class Mish(Record):
    """Head of a block table."""

    signature: bytes = raw(0, 4, doc="mish")
    first_sector: int = u64(8, doc="guest sector that the entries' sectors are relative to")
    sectors: int = u64(16)
    data_offset: int = u64(24, doc="added to the entries' offsets")
    entries: int = u32(200)


class Entry(Record):
    """One run of sectors in a block table."""

    type: int = u32(0)
    sector: int = u64(8)
    sectors: int = u64(16)
    offset: int = u64(24)
    length: int = u64(32)


def _unzlib(data: bytes, length: int) -> bytes:
    return zlib.decompressobj().decompress(data, length)


def _unbzip(data: bytes, length: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, length)


def _unlzma(data: bytes, length: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=256 << 20).decompress(data, length)


ZERO, RAW, IGNORE, COMMENT, END = 0, 1, 2, 0x7FFFFFFE, 0xFFFFFFFF
CODECS: dict[int, tuple[str, Callable[[bytes, int], bytes] | None]] = {
    0x80000004: ("ADC", adc.decompress),
    0x80000005: ("zlib", _unzlib),
    0x80000006: ("bzip2", _unbzip),
    0x80000007: ("LZFSE", None),
    0x80000008: ("LZMA", _unlzma),
}


class Chunk(NamedTuple):
    """*length* guest bytes from *start* on, stored as *type* in *stored* bytes at *host*."""

    start: int
    length: int
    type: int
    host: int
    stored: int


class Dmg(Format):
    """One open image; ``_chunks`` in guest order, gaps read as zeroes."""

    tells_clusters = False
    peer_maps = False

    readonly = True

    def __init__(self, file: Node, size: int, chunks: list[Chunk]) -> None:
        self.file = file
        self._size = size
        self._chunks = chunks
        self._starts = [chunk.start for chunk in chunks]
        # A partial read wants a whole chunk, and chunks differ in length: the largest, so that hulls hold whole ones.
        self.special_unit = max((chunk.length for chunk in chunks if chunk.type in CODECS), default=SECTOR)

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Dmg:
        def bad(reason: str) -> ImageError:
            return ImageError(context.filename, reason)

        size = file.size
        koly = Koly.parse(file.pread(max(0, size - TRAILER), TRAILER))
        if size < TRAILER or koly.signature != b"koly" or koly.version != 4:
            raise bad("Could not locate UDIF trailer in dmg file")
        if koly.segments > 1:
            raise bad(f"the image is split into {koly.segments} files; only whole ones are read")
        if not koly.plist_length:
            raise bad("the image has a resource fork and no property list; such old images are not read")
        if koly.plist_length > MAX_PLIST or koly.plist_offset + koly.plist_length > size:
            raise bad(f"the property list at {koly.plist_offset:#x} lies outside the file ({size} bytes)")
        chunks: list[Chunk] = []
        for table in _tables(file.pread(koly.plist_offset, koly.plist_length), bad):
            chunks += _chunks(table, koly.data_fork_offset, size, bad)
            if len(chunks) > MAX_CHUNKS:
                raise bad(f"more than {MAX_CHUNKS} chunks")
        chunks.sort()
        position = 0
        for chunk in chunks:
            if chunk.start < position:
                raise bad(f"chunks overlap at guest sector {chunk.start // SECTOR}")
            position = chunk.start + chunk.length
        total = max(koly.sectors * SECTOR, position)
        if total >= 1 << 63:
            raise bad(f"{koly.sectors} sectors are too many")
        return cls(file, total, chunks)

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        end = offset + length
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            chunk = self._chunks[index] if index < len(self._chunks) else None
            if chunk is not None and chunk.start + chunk.length <= offset:
                index += 1
                continue
            if chunk is None or chunk.start > offset:
                run = min(end, self._size if chunk is None else chunk.start) - offset
                yield Mapping(Kind.ZERO, offset, run)
            else:
                run = min(end, chunk.start + chunk.length) - offset
                if chunk.type == RAW:
                    yield Mapping(Kind.DATA, offset, run, self.file, chunk.host + offset - chunk.start)
                else:
                    yield Mapping(Kind.SPECIAL, offset, run, token=chunk)
                index += 1
            offset += run

    def read_special(self, mapping: Mapping) -> bytes:
        chunk: Chunk = mapping.token
        name, decode = CODECS[chunk.type]
        assert decode is not None
        try:
            data = decode(self.file.pread(chunk.host, chunk.stored), chunk.length)
        except (zlib.error, OSError, EOFError, lzma.LZMAError, ValueError) as error:
            raise BlockError(5, f"{name} chunk at {chunk.host:#x}: {error}") from None
        if len(data) != chunk.length:
            raise BlockError(5, f"{name} chunk at {chunk.host:#x}: {len(data)} bytes instead of {chunk.length}")
        within = mapping.offset - chunk.start
        return data[within : within + mapping.length]


def _tables(text: bytes, bad: Callable[[str], ImageError]) -> list[bytes]:
    """The *mish* tables of the property list."""
    import plistlib

    try:
        listed = plistlib.loads(text, fmt=plistlib.FMT_XML)["resource-fork"]["blkx"]
        tables = [entry["Data"] for entry in listed]
    except Exception as error:  # expat, plistlib and what is not there raise a dozen kinds
        raise bad(f"the property list has no block tables: {' '.join(str(error).split())}") from None
    for table in tables:
        if not isinstance(table, bytes) or not table.startswith(b"mish"):
            raise bad("a block table of the property list does not begin with 'mish'")
    return tables


def _chunks(table: bytes, base: int, size: int, bad: Callable[[str], ImageError]) -> Iterator[Chunk]:
    """The chunks of one table that are stored somewhere."""
    head = Mish.parse(table)
    if Mish.LENGTH + head.entries * Entry.LENGTH > len(table):
        raise bad(f"a block table of {len(table)} bytes cannot hold {head.entries} entries")
    for number in range(head.entries):
        entry = Entry.parse(table, Mish.LENGTH + number * Entry.LENGTH)
        kind = entry.type
        if kind in (ZERO, IGNORE, COMMENT, END) or not entry.sectors:
            continue
        if kind != RAW and (kind not in CODECS or CODECS[kind][1] is None):
            name = CODECS[kind][0] if kind in CODECS else f"type {kind:#x}"
            raise bad(f"chunks compressed with {name} are not supported (zlib, bzip2, LZMA and ADC are)")
        if entry.sectors > (MAX_CHUNK // SECTOR if kind != RAW else 1 << 54):
            raise bad(f"a chunk of {entry.sectors} sectors: at most {MAX_CHUNK // SECTOR} are supported")
        if head.first_sector + entry.sector + entry.sectors > 1 << 54:
            raise bad(f"a chunk at sector {head.first_sector + entry.sector} is out of range")
        host = base + head.data_offset + entry.offset
        stored = entry.sectors * SECTOR if kind == RAW else entry.length
        if host + stored > size or (stored > 2 * MAX_CHUNK and kind != RAW):
            raise bad(
                f"the chunk of guest sector {head.first_sector + entry.sector} at {host:#x} lies outside the file"
            )
        yield Chunk((head.first_sector + entry.sector) * SECTOR, entry.sectors * SECTOR, kind, host, stored)
