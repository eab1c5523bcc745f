"""Extents: the pieces that an image is made of, each a range of guest bytes kept in one way."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.errors import BlockError

if TYPE_CHECKING:
    from vm_core.block.node import Node


class Extent:
    """*length* guest bytes from *start* on. Offsets in calls are bytes from the extent's start."""

    #: As the descriptor has it; empty for the only extent of an image with an embedded descriptor.
    type: str = ""
    #: Bytes of a grain; 0 where there are none.
    grain: int = 0
    #: Grains are compressed: written once, and never again.
    compressed: bool = False
    #: Grains can be marked as zeroes.
    zeroed: bool = False
    #: No write support, or the descriptor says so.
    readonly: bool = False

    def __init__(self, start: int, length: int, file: Node | None, filename: str) -> None:
        self.start = start
        self.length = length
        self.file = file
        self.filename = filename

    @property
    def end(self) -> int:
        """Where the next extent starts (guest bytes)."""
        return self.start + self.length

    def runs(self, offset: int, stop: int, writable: bool) -> Iterator[Mapping]:
        """Runs that cover the range, in guest offsets. *writable*: what can be overwritten may be."""
        raise NotImplementedError

    def cached(self, offset: int, stop: int) -> bool:
        """Whether :meth:`runs` needs no I/O."""
        return False

    def read_special(self, place: int, index: int) -> bytes:
        """The bytes of the compressed grain *index*, stored at *place*."""
        raise NotImplementedError

    def allocate(self, offset: int, stop: int) -> Iterator[Allocation]:
        """See :meth:`vm_core.block.format.Format.allocate`."""
        raise NotImplementedError

    def commit(self, one: Allocation) -> None:
        """The data of a fresh allocation is there."""
        raise NotImplementedError

    def zero(self, offset: int, stop: int) -> None:
        """Make a range of whole grains zeroes; only where :meth:`can_zero` says that this can be done."""
        raise NotImplementedError

    def can_zero(self, offset: int, stop: int) -> bool:
        """Whether :meth:`zero` does that range."""
        return False

    def blank(self, offset: int, stop: int) -> None:
        """The same with as little space as can be; only where :meth:`can_blank` says that this can be done."""
        self.zero(offset, stop)

    def can_blank(self, offset: int, stop: int) -> bool:
        """Whether :meth:`blank` does that range."""
        return self.can_zero(offset, stop)

    def empty(self) -> None:
        """Forget all data. Raises BlockError where that cannot be."""
        raise BlockError.of(errno.ENOTSUP)

    def grow(self) -> None:
        """Make the file as long as it shall be."""

    def flush(self) -> None:
        """Bring metadata to stable storage, after the data it points to."""

    def load_for_writing(self) -> None:
        """Read what only writing needs. Raises ImageError."""

    def info(self) -> dict[str, Any]:
        """QEMU's ImageInfo for an extent."""
        found: dict[str, Any] = {"filename": self.filename, "format": self.type, "virtual-size": self.length}
        if self.grain:
            found["cluster-size"] = self.grain
        if self.compressed:
            found["compressed"] = True
        return found


class FlatExtent(Extent):
    """Guest bytes as they are, in a file from *offset* on (*Virtual Disk Format 5.0*, "Simple Extents": FLAT, VMFS)."""

    def __init__(
        self, start: int, length: int, file: Node, filename: str, *, type: str, offset: int = 0, readonly: bool = False
    ) -> None:
        super().__init__(start, length, file, filename)
        self.type = type
        self.offset = offset
        self.readonly = readonly

    def runs(self, offset: int, stop: int, writable: bool) -> Iterator[Mapping]:
        yield Mapping(
            Kind.DATA,
            self.start + offset,
            stop - offset,
            self.file,
            self.offset + offset,
            writable and not self.readonly,
        )

    def cached(self, offset: int, stop: int) -> bool:
        return True

    def allocate(self, offset: int, stop: int) -> Iterator[Allocation]:
        assert self.file is not None
        yield Allocation(self.start + offset, stop - offset, self.file, self.offset + offset, False)

    def can_blank(self, offset: int, stop: int) -> bool:
        return not self.readonly

    def blank(self, offset: int, stop: int) -> None:
        assert self.file is not None
        self.file.zero(self.offset + offset, stop - offset, unmap=True)


class ZeroExtent(Extent):
    """Guest bytes that are zeroes and take no file (ZERO). Nothing can be written there."""

    type = "ZERO"
    readonly = True

    def __init__(self, start: int, length: int) -> None:
        super().__init__(start, length, None, "")

    def runs(self, offset: int, stop: int, writable: bool) -> Iterator[Mapping]:
        yield Mapping(Kind.ZERO, self.start + offset, stop - offset)

    def cached(self, offset: int, stop: int) -> bool:
        return True

    def can_zero(self, offset: int, stop: int) -> bool:
        return True

    def zero(self, offset: int, stop: int) -> None:
        """They are."""


class NoAccessExtent(Extent):
    """Guest bytes that the descriptor says are out of reach (NOACCESS)."""

    readonly = True

    def __init__(self, start: int, length: int, type: str) -> None:
        super().__init__(start, length, None, "")
        self.type = type

    def runs(self, offset: int, stop: int, writable: bool) -> Iterator[Mapping]:
        raise BlockError.of(errno.EACCES, "the descriptor allows no access to this extent")


def at(extents: Sequence[Extent], starts: Sequence[int], offset: int, length: int) -> Iterator[tuple[Extent, int, int]]:
    """The extents that a guest range touches, each with the part of it (bytes from the extent's start)."""
    from bisect import bisect_right

    index = bisect_right(starts, offset) - 1
    stop = offset + length
    while offset < stop:
        extent = extents[index]
        upto = min(stop, extent.end)
        if offset < upto:
            yield extent, offset - extent.start, upto - extent.start
        offset = upto
        index += 1
