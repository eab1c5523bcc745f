"""Mappings: what a format driver answers instead of moving data.

A mapping says for one run of guest bytes where they are. Runs are maximal: a driver coalesces clusters that are
contiguous both for the guest and on the host, so that a bulk copy is a few large system calls.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .node import Node


class Kind(IntEnum):
    """What a run of guest bytes is."""

    #: Stored verbatim in ``storage`` at ``host``.
    DATA = 0
    #: Reads as zeroes, whatever a backing image holds.
    ZERO = 1
    #: Not present in this image: the backing image's bytes, or zeroes without one.
    UNALLOCATED = 2
    #: Stored in a form that only the driver can turn into bytes (compressed, encrypted): ask ``read_special``.
    SPECIAL = 3
    #: Past the end of the image.
    EOF = 4


class Mapping(NamedTuple):
    """One run: *length* guest bytes from *offset* on. All positions are bytes."""

    kind: Kind
    offset: int
    length: int
    #: The node that holds the bytes (DATA; ZERO where host space is set aside), else None.
    storage: Node | None = None
    #: Where in *storage*; -1 where there is no host space.
    host: int = -1
    #: DATA that may be overwritten where it is (not shared with a snapshot, not read-only).
    writable: bool = False
    #: SPECIAL: whatever the driver needs to find the run again.
    token: Any = None

    def continues(self, other: Mapping) -> bool:
        """Whether *other*, which begins where this run ends, is of the same kind and goes on at the same place."""
        return (
            self.kind is other.kind
            and self.kind is not Kind.SPECIAL
            and self.storage is other.storage
            and (self.host + self.length == other.host if self.host >= 0 else other.host < 0)
            and self.writable == other.writable
        )


class Allocation(NamedTuple):
    """Host space that a format set aside for a write: *length* guest bytes from *offset* on, at *host* in *storage*.

    A fresh allocation is invisible to readers until it is committed and may be longer than the write that asked for it
    (whole clusters): whoever writes fills head and tail with the bytes that the guest saw there before. One that is not
    fresh is data overwritten in place; it needs no commit.
    """

    offset: int
    length: int
    storage: Node
    host: int
    fresh: bool
    #: The host range is known to read as zeroes (it lies past the end of the file, say), so zeroes need not be written.
    zeroed: bool = False
    #: The driver's own.
    token: Any = None
