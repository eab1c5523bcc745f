"""``copy-on-read``: what is read from backing images is kept in the image itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.filter import Filter
from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import total
from vm_core.errors import ImageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


class CopyOnRead(Filter):
    """Clusters that the image below lacks become its own when they are read.

    With a *bottom* only what the nodes down to it hold is copied; what lies below is just read.
    """

    driver = "copy-on-read"

    def __init__(self, file: Node, *, owned: bool = True) -> None:
        super().__init__(file, owned=owned)
        self._bottom: Node | None = None

    def configure(self, options: dict[str, Any], context: OpenContext) -> None:
        if self.readonly:
            raise ImageError("", "Block node is read-only")
        name = options.pop("bottom", None)
        if name is None:
            return
        bottom = context.graph.get(name)
        if bottom is None:
            raise ImageError("", f"Bottom node '{name}' not found")
        if bottom.transparent and not isinstance(bottom, FormatNode):
            raise ImageError("", f"Bottom node '{name}' is a filter")
        if not any(node is bottom for node in _chain(self.file)):
            raise ImageError("", f"Bottom node '{name}' is not in the chain of the image")
        self._bottom = bottom

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._copy(offset, total(buffers))
        self.file.read(offset, buffers)

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return False

    def _copy(self, offset: int, length: int) -> None:
        node = self.file
        if not isinstance(node, FormatNode):
            return
        length = min(length, node.size - offset)
        if self._bottom is None:
            node.copy_up(offset, length)
            return
        from vm_core.block.extents import walk

        unit = node.cluster_size
        start, end = offset - offset % unit, min(-(-(offset + length) // unit) * unit, node.size)
        for extent in walk(node, start, end - start, base=self._bottom.backing, holes=False):
            if extent.depth and extent.allocated:
                node.copy_up(extent.offset, extent.length)


def _chain(node: Node) -> list[Node]:
    found: list[Node] = []
    current: Node | None = node
    while current is not None:
        found.append(current)
        current = current.backing
    return found
