"""The base of filters: nodes that watch, delay, fail or count what passes between their parent and one child.

A filter is a driver of kind ``format`` whose implementation is a subclass of this instead of a
:class:`~vm_core.block.format.Format`. It overrides what it is about:

    class Throttle(Filter):
        driver = "throttle"

        def read(self, offset, buffers):
            self._wait(total(buffers))
            super().read(offset, buffers)

and takes its options in ``configure``. Walks over extents see through it, backing chain of the child included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self

from .mapping import Kind, Mapping
from .node import Buffer, Node

if TYPE_CHECKING:
    from .open import OpenContext


class Filter(Node):
    """Hands everything to the node :attr:`file`."""

    transparent = True

    def __init__(self, file: Node, *, owned: bool = True) -> None:
        """*owned*: close *file* with the filter."""
        self.file = file
        self.driver = type(self).driver or file.driver
        self.filename = file.filename
        self.readonly = file.readonly
        self.request_alignment = file.request_alignment
        self.watched = file.watched
        self._owned = owned
        self._closed = False

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Self:
        """Make one above the storage that the opener has opened, popping the *options* that are understood."""
        file = context.open_file(options)
        owned = bool(context.owned(file))
        try:
            node = cls(file, owned=owned)
            node.readonly = file.readonly or context.readonly
            node.configure(options, context)
        except BaseException:
            if owned:
                file.close()
            raise
        return node

    def configure(self, options: dict[str, Any], context: OpenContext) -> None:
        """Pop and check the filter's own *options*."""

    @property
    def size(self) -> int:
        return self.file.size

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self.file.write(offset, buffers, fua=fua)

    def flush(self) -> None:
        self.file.flush()

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self.file.zero(offset, length, unmap=unmap, fua=fua)

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        if self.readonly:
            raise self.read_only_error()
        return self.file.zero_fast(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        self.file.discard(offset, length)

    def truncate(self, size: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        self.file.truncate(size)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        self.file.reserve(offset, length, full=full)

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        inside = max(0, min(length, self.size - offset))
        if inside:
            yield Mapping(Kind.DATA, offset, inside, self.file, offset, not self.readonly)
        if inside < length:
            yield Mapping(Kind.EOF, offset + inside, length - inside)

    def allocated(self) -> int:
        return self.file.allocated()

    def read_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.file.read_vmstate(offset, buffers)

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.readonly:
            raise self.read_only_error()
        self.file.write_vmstate(offset, buffers)

    def children(self) -> Dict[str, Node]:
        return {"file": self.file}

    def event(self, name: str) -> None:
        self.file.event(name)

    def alone(self) -> AbstractContextManager[None]:
        return self.file.alone()

    def claim(self) -> None:
        self.file.claim()

    def reopen(self, *, readonly: bool) -> None:
        self.file.reopen(readonly=readonly)
        self.readonly = readonly

    def invalidate(self) -> None:
        self.file.invalidate()

    def identity(self) -> tuple[Any, ...] | None:
        return self.file.identity()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._owned:
                self.file.close()
