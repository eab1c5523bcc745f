"""Nodes for tests: one in memory, one that fails on demand, one that remembers everything done to it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from vm_core.block.filter import Filter
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.node import Buffer, Node, Protocol
from vm_core.block.vectors import gather, scatter, total
from vm_core.errors import BlockError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

PAGE = 32768


class MemoryNode(Protocol):
    """Storage in memory, sparse by pages, that behaves as the protocol ``file`` does: writes past its end grow it.

    >>> node = MemoryNode(b"hello")
    >>> node.pread(1, 6)
    b'ello\\x00\\x00'
    """

    driver = "memory"

    def __init__(self, data: bytes | bytearray = b"", *, readonly: bool = False, limit: int = 1 << 63) -> None:
        """Writes beyond *limit* bytes of pages raise ENOSPC."""
        self._pages: dict[int, bytearray] = {}
        self._size = 0
        self._limit = limit
        self._lock = Lock()
        self.filename = "memory"
        self.flushes = 0
        if data:
            self.pwrite(0, data)
        self.readonly = readonly

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Protocol:
        return cls(bytes(options.pop("data", b"")), readonly=context.readonly)

    @property
    def size(self) -> int:
        return self._size

    def data(self) -> bytes:
        """Everything, as bytes."""
        return self.pread(0, self._size)

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = total(buffers)
        data = bytearray(length)
        with self._lock:
            for page, start, count, position in _pages(offset, max(0, min(length, self._size - offset))):
                found = self._pages.get(page)
                if found is not None:
                    data[position : position + count] = found[start : start + count]
        scatter(data, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        data = gather(buffers)
        with self._lock:
            for page, start, count, position in _pages(offset, len(data)):
                found = self._pages.get(page)
                if found is None:
                    if (len(self._pages) + 1) * PAGE > self._limit:
                        raise BlockError.of(errno.ENOSPC)
                    found = self._pages[page] = bytearray(PAGE)
                found[start : start + count] = data[position : position + count]
            self._size = max(self._size, offset + len(data))

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        with self._lock:
            self._clear(offset, length)
            self._size = max(self._size, offset + length)

    def _clear(self, offset: int, length: int) -> None:
        end = offset + length
        for page in [number for number in self._pages if offset < (number + 1) * PAGE and number * PAGE < end]:
            start, stop = max(offset - page * PAGE, 0), min(end - page * PAGE, PAGE)
            if stop - start == PAGE:
                del self._pages[page]
            else:
                self._pages[page][start:stop] = bytes(stop - start)

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        with self._lock:
            self._clear(offset, max(0, min(length, self._size - offset)))

    def truncate(self, size: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        with self._lock:
            if size < self._size:
                self._clear(size, self._size - size)
            self._size = size

    def flush(self) -> None:
        self.flushes += 1

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        end, position = offset + length, offset
        limit = min(end, self._size)
        while position < limit:
            kind = Kind.DATA if position // PAGE in self._pages else Kind.ZERO
            stop = position
            while stop < limit and (stop // PAGE in self._pages) == (kind is Kind.DATA):
                stop = min(limit, (stop // PAGE + 1) * PAGE)
            yield Mapping(kind, position, stop - position, self, position, kind is Kind.DATA and not self.readonly)
            position = stop
        if position < end:
            yield Mapping(Kind.EOF, position, end - position)

    def allocated(self) -> int:
        return len(self._pages) * PAGE

    def close(self) -> None:
        pass


def _pages(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Page number, start in it, bytes of it, position in the request."""
    position = 0
    while position < length:
        page, start = divmod(offset + position, PAGE)
        count = min(PAGE - start, length - position)
        yield page, start, count, position
        position += count


class PassingNode(Filter):
    """Hands everything to another node; tests override what they want to watch or break."""


class FailingNode(PassingNode):
    """Raises an error from chosen requests.

    *decide* is called with the operation (``read``, ``write``, ``flush``, ``zero``, ``discard``, ``reserve``,
    ``truncate``), offset and length before each, and returns an errno, or 0 to let it through.
    """

    def __init__(self, node: Node, decide: Callable[[str, int, int], int]) -> None:
        super().__init__(node)
        self.decide = decide

    def _check(self, operation: str, offset: int = 0, length: int = 0) -> None:
        code = self.decide(operation, offset, length)
        if code:
            raise BlockError.of(code)

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check("read", offset, total(buffers))
        super().read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        self._check("write", offset, total(buffers))
        super().write(offset, buffers, fua=fua)

    def flush(self) -> None:
        self._check("flush")
        super().flush()

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        self._check("zero", offset, length)
        super().zero(offset, length, unmap=unmap, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        self._check("discard", offset, length)
        super().discard(offset, length)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        self._check("reserve", offset, length)
        super().reserve(offset, length, full=full)

    def truncate(self, size: int) -> None:
        self._check("truncate", size)
        super().truncate(size)


class Change(NamedTuple):
    """One thing that was done to a :class:`RecordingNode`.

    *begin* and *end* are moments of the recorder's clock, which ticks with every begin, end and mark.
    """

    #: ``write``, ``zero``, ``discard``, ``truncate`` or ``flush``.
    operation: str
    begin: int
    end: int
    #: The new size for ``truncate``.
    offset: int = 0
    length: int = 0
    data: bytes = b""
    #: Stable by itself.
    fua: bool = False


class RecordingNode(PassingNode):
    """Remembers every change, so that :mod:`vm_core.testing.replay` can tell what a power cut would have left."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        #: What was there when recording began.
        self.base = node.pread(0, node.size)
        self.changes: list[Change] = []
        self.marks: list[tuple[int, Any]] = []
        self._clock = 0
        self._lock = Lock()

    def now(self) -> int:
        """The moment that the next tick begins."""
        with self._lock:
            self._clock += 1
            return self._clock

    def mark(self, what: Any) -> None:
        """Note that from now on *what* holds after a power cut: a copy of the model at a completed flush."""
        moment = self.now()
        self.marks.append((moment, what))

    def _record(
        self, operation: str, begin: int, offset: int = 0, length: int = 0, data: bytes = b"", fua: bool = False
    ) -> None:
        change = Change(operation, begin, self.now(), offset, length, data, fua)
        with self._lock:
            self.changes.append(change)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        data = gather(buffers)
        begin = self.now()
        super().write(offset, buffers, fua=fua)
        self._record("write", begin, offset, len(data), data, fua)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        begin = self.now()
        super().zero(offset, length, unmap=unmap, fua=fua)
        self._record("zero", begin, offset, length, fua=fua)

    def discard(self, offset: int, length: int) -> None:
        begin = self.now()
        super().discard(offset, length)
        self._record("discard", begin, offset, length)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        begin, before = self.now(), self.size
        super().reserve(offset, length, full=full)
        if full:
            self._record("zero", begin, offset, length)
        elif self.size > before:
            self._record("truncate", begin, self.size)

    def truncate(self, size: int) -> None:
        begin = self.now()
        super().truncate(size)
        self._record("truncate", begin, size)

    def flush(self) -> None:
        begin = self.now()
        super().flush()
        self._record("flush", begin)
