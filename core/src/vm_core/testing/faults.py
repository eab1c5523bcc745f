"""Storage whose k-th change fails: a full disk, one bad moment, or a disk that is gone from then on.

    for disk in faults(image, "full"):              # k = 1, 2, 3, …, until nothing fails any more
        with suppress(OSError, VmError):
            with open_node({"driver": "qcow2", "file": disk.node}, readonly=False) as node:
                change(node)
        check(disk.data(), disk.failed)

What fails, by mode:

* ``once``: the k-th change alone, with EIO;
* ``full``: from the k-th change on whatever needs space that the file did not have by then, with ENOSPC;
* ``dead``: from the k-th change on all of them, with EIO.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from .nodes import FailingNode, MemoryNode

MODES = ("once", "full", "dead")
#: What changes the storage. A flush counts too: it may be what tells that a write has failed.
_CHANGES = ("write", "zero", "reserve", "flush", "truncate")


class Disk:
    """One storage in memory with *data*, whose *at*-th change fails."""

    def __init__(self, data: bytes, mode: str, at: int) -> None:
        self._memory = MemoryNode(data)
        self._mode = mode
        self._at = at
        self._count = 0
        self._room = 0
        #: Something has failed.
        self.failed = False
        self.node = FailingNode(self._memory, self._decide)

    def data(self) -> bytes:
        """All that is there now."""
        return self._memory.data()

    def _decide(self, operation: str, offset: int, length: int) -> int:
        if operation not in _CHANGES:
            return 0
        if self._mode == "full" and operation in ("flush", "truncate"):
            return 0  # these need no space
        self._count += 1
        if self._count == self._at:
            self._room = self._memory.size
        if self._count < self._at or (self._mode == "once" and self._count > self._at):
            return 0
        if self._mode == "full" and offset + length <= self._room:
            return 0
        self.failed = True
        return errno.ENOSPC if self._mode == "full" else errno.EIO


def faults(data: bytes, mode: str, *, limit: int = 0) -> Iterator[Disk]:
    """Disks with *data* of which the first, the second … change fails, until one is in vain; use each to its end.

    With *limit* at most about so many, the first ones all and later ones at growing distances.
    """
    at, tried = 1, 0
    last = False
    while not last:
        disk = Disk(data, mode, at)
        yield disk
        # On a full disk changes go well where the room lasts, and there may still be others behind them.
        last = not disk.failed and disk._count < at
        tried += 1
        at += 1 if not limit or tried < limit // 2 else max(1, tried * 2 // limit * 3)
