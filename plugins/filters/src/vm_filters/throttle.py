"""``throttle``: requests wait until the limits of a throttle group allow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.filter import Filter
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import total
from vm_core.errors import ImageError

from .groups import READ, WRITE, Group, find, member

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


class Throttle(Filter):
    """Discards and zeroes count as writes, flushes go through."""

    driver = "throttle"

    def __init__(self, file: Node, group: Group | None = None, *, owned: bool = True) -> None:
        super().__init__(file, owned=owned)
        self._group = group or Group({})
        self._member = member(self)

    def configure(self, options: dict[str, Any], context: OpenContext) -> None:
        name = options.pop("throttle-group", None)
        if name is None:
            raise ImageError("", "Please specify a throttle group")
        self._group = find(name)

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return False

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._group.pass_through(self._member, READ, total(buffers))
        super().read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        self._group.pass_through(self._member, WRITE, total(buffers))
        super().write(offset, buffers, fua=fua)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        self._group.pass_through(self._member, WRITE, length)
        super().zero(offset, length, unmap=unmap, fua=fua)

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        self._group.pass_through(self._member, WRITE, length)
        return super().zero_fast(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._group.pass_through(self._member, WRITE, length)
        super().discard(offset, length)
