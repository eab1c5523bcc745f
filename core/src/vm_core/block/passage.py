"""Where on the host a request's bytes are moved, for engines that move them themselves.

Theory of operation. :meth:`Node.host_spans` resolves a read, or a write in place, into spans of plain files – only
where that is known without any I/O and without waiting for anybody. On the way it takes what keeps the answer true, the
same shared range locks that a read or write through the node would hold: an allocating write, a zeroing, a discard, a
resize or a snapshot of the range waits until the passage is finished. Whoever has a passage moves the bytes and calls
:meth:`Passage.finish` once, from any thread.

Whatever cannot be resolved so – clusters to be allocated, compressed or encrypted ones, tables that are not in memory,
parts of blocks under O_DIRECT, filters, storage that is no file – has no passage and is carried out by the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .file import FileProtocol
    from .rangelock import RangeLock


class Span(NamedTuple):
    """*length* bytes at *host* in *file*; zeroes where *file* is None. Spans follow each other in guest order."""

    file: FileProtocol | None
    host: int
    length: int


#: A range lock and the ticket that is held of it.
Hold = tuple["RangeLock", int]


class Passage:
    """The spans of one request, and the locks that keep them valid."""

    __slots__ = ("_holds", "spans", "stable", "write")

    def __init__(self, spans: Sequence[Span], holds: Sequence[Hold], write: bool, stable: bool) -> None:
        self.spans = spans
        self.write = write
        #: Each write has to be on stable storage when it completes (RWF_DSYNC).
        self.stable = stable
        self._holds = holds

    def finish(self, failed: bool = False) -> None:
        """The bytes have been moved, or some of them could not be: tell the files, give the locks back."""
        try:
            if self.write:
                for file, host, length in self.spans:
                    if file is not None:
                        file.moved(host, length, stable=self.stable, failed=failed)
        finally:
            release(self._holds)


def release(holds: Sequence[Hold]) -> None:
    """Give locks back."""
    for ranges, ticket in holds:
        ranges.release(ticket)
