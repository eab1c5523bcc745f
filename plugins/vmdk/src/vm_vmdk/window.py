"""Part of a file as storage of its own: from an offset on, growing with the file or of a fixed length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vm_core.block.filter import Filter
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import cut, fill, total


class Window(Filter):
    """The bytes of *file* from *offset* on; *length* of them, or all there are where that is None."""

    driver = "window"

    def __init__(self, file: Node, offset: int, length: int | None = None) -> None:
        super().__init__(file, owned=False)
        self.offset = offset
        self.length = length
        # An image in it is called by the file's name.
        self.is_protocol = file.is_protocol
        self.full_options = file.full_options

    @property
    def size(self) -> int:
        return max(0, self.file.size - self.offset) if self.length is None else self.length

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        inside = max(0, min(total(buffers), self.size - offset))
        fill(cut(buffers, inside, total(buffers) - inside))
        if inside:
            self.file.read(self.offset + offset, cut(buffers, 0, inside))

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly or self.length is not None:
            raise self.read_only_error()
        self.file.write(self.offset + offset, buffers, fua=fua)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly or self.length is not None:
            raise self.read_only_error()
        self.file.zero(self.offset + offset, length, unmap=unmap, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        if self.readonly or self.length is not None:
            raise self.read_only_error()
        self.file.discard(self.offset + offset, length)

    def truncate(self, size: int) -> None:
        if self.readonly or self.length is not None:
            raise self.read_only_error()
        self.file.truncate(self.offset + size)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        self.file.reserve(self.offset + offset, length, full=full)

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        inside = max(0, min(length, self.size - offset))
        if inside:
            yield Mapping(Kind.DATA, offset, inside, self.file, self.offset + offset, not self.readonly)
        if inside < length:
            yield Mapping(Kind.EOF, offset + inside, length - inside)
