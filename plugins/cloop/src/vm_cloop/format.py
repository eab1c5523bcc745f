"""The driver. Source: the header of the Linux module *cloop*, version 2 (``compressed_loop.h``); numbers big-endian."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vm_core.block.format import Format
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.structs import Record, u32
from vm_core.block.tables import load
from vm_core.errors import BlockError, ImageError

if TYPE_CHECKING:
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext

SECTOR = 512
MAX_BLOCK = 64 << 20
#: The table of offsets must not take more memory than this.
MAX_OFFSETS = 512 << 20


class Header(Record):
    """After 128 bytes of shell script."""

    block_size: int = u32(128, doc="bytes of a block, decompressed")
    n_blocks: int = u32(132, doc="blocks; one more offset of 64 bits each follows from byte 136 on")


class Cloop(Format):
    """One open image. Block *n* is the zlib stream from ``_offsets[n]`` to ``_offsets[n + 1]``."""

    tells_clusters = False
    peer_maps = False

    readonly = True

    def __init__(self, file: Node, block_size: int, offsets: array[int]) -> None:
        self.file = file
        self.special_unit = block_size
        self._block = block_size
        self._offsets = offsets

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Cloop:
        def bad(reason: str) -> ImageError:
            return ImageError(context.filename, reason)

        head = file.pread(0, Header.LENGTH)
        header = Header.parse(head)
        block, count = header.block_size, header.n_blocks
        if block == 0:
            raise bad("block_size cannot be zero")
        if block % SECTOR:
            raise bad(f"block_size {block} must be a multiple of {SECTOR}")
        if block > MAX_BLOCK:
            raise bad(f"block_size {block} must be {MAX_BLOCK >> 20} MB or less")
        if count > 0xFFFFFFFF // 8:
            raise bad(f"n_blocks {count} must be {0xFFFFFFFF // 8} or less")
        length = (count + 1) * 8
        if length > MAX_OFFSETS:
            raise bad("image requires too many offsets, try increasing block size")
        if Header.LENGTH + length > file.size:
            raise bad(f"the table of {count + 1} offsets does not fit the file ({file.size} bytes)")
        offsets = load("Q", file.pread(Header.LENGTH, length), "big")
        largest = 2 * block  # zlib never expands by more than a thousandth
        for index in range(1, count + 1):
            if offsets[index] < offsets[index - 1]:
                raise bad(f"offsets not monotonically increasing at index {index}, image file is corrupt")
            if offsets[index] - offsets[index - 1] > largest:
                raise bad(f"invalid compressed block size at index {index}, image file is corrupt")
        return cls(file, block, offsets)

    @property
    def size(self) -> int:
        return (len(self._offsets) - 1) * self._block

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        end = offset + length
        while offset < end:
            number, within = divmod(offset, self._block)
            run = min(end - offset, self._block - within)
            yield Mapping(Kind.SPECIAL, offset, run, token=number)
            offset += run

    def read_special(self, mapping: Mapping) -> bytes:
        number = mapping.token
        start, end = self._offsets[number], self._offsets[number + 1]
        try:
            data = zlib.decompressobj().decompress(self.file.pread(start, end - start), self._block)
        except zlib.error as error:
            raise BlockError(5, f"block {number} at {start:#x}: {error}") from None
        if len(data) != self._block:
            raise BlockError(5, f"block {number} at {start:#x} holds {len(data)} bytes instead of {self._block}")
        within = mapping.offset % self._block
        return data[within : within + mapping.length]
