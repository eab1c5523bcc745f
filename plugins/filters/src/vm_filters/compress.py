"""``compress``: whatever is written goes to the image in compressed form."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from vm_core.block.filter import Filter
from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import total
from vm_core.errors import ImageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


class Compress(Filter):
    """Takes whole clusters: parts of them are filled up with what is there. Clusters are written once.

    As in QEMU, an image whose format cannot replace what a cluster holds already refuses with EIO.
    """

    driver = "compress"

    def __init__(self, file: Node, *, owned: bool = True) -> None:
        super().__init__(file, owned=owned)
        #: Parts of a cluster are read, changed and written one at a time.
        self._parts = Lock()

    def configure(self, options: dict[str, Any], context: OpenContext) -> None:
        file = self.file
        if not isinstance(file, FormatNode) or not file.can_compress:
            raise ImageError("", f"Compression is not supported for underlying format: {file.driver}")

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        file = self.file
        assert isinstance(file, FormatNode)
        length = total(buffers)
        unit, size = file.cluster_size, file.size
        start, end = offset - offset % unit, min(-(-(offset + length) // unit) * unit, size)
        if (start, end) == (offset, offset + length):
            file.write_compressed(offset, buffers)
        else:
            with self._parts:
                head = file.pread(start, offset - start)
                tail = file.pread(offset + length, max(0, end - offset - length))
                pieces = [memoryview(head), *buffers, memoryview(tail)]
                file.write_compressed(start, [piece for piece in pieces if piece.nbytes])
        if fua:
            file.flush()
