"""Compare: whether two images hold the same bytes, and where they first differ.

The extents of both are planned side by side: where both are known to be zero nothing is read, where one is only the
other. The rest is read in pieces by several threads and compared by memcmp. The first difference is told by sector, as
if the images had been read from the beginning; so a piece that is done early waits for none before it, but what is told
is the earliest of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import NamedTuple

from ..extents import Extent, walk
from ..mapping import Kind
from ..node import SECTOR, Node, sectors_up
from . import pipeline
from .job import Job
from .memory import page_buffer
from .source import Segment, Source, is_direct, read_segment
from .zeroes import all_zero

#: Bytes that a piece of work has at most, and bytes read of each image at a time: small buffers stay in the cache.
PIECE = 2 * 1024 * 1024
BUFFER = 512 * 1024
SMALL = 4 * 1024 * 1024


class Difference(NamedTuple):
    """What was found first. *kind* is ``content``, ``status`` (strict: allocation), ``size`` (strict) or ``error``."""

    kind: str
    offset: int = -1
    #: For an error: which image (0 or 1), and what happened.
    image: int = 0
    error: OSError | None = None


class Comparison(NamedTuple):
    """The result: no difference where the images hold the same."""

    difference: Difference | None
    #: The images' sizes differ, and one has nothing but zeroes where the other has ended (if there is no difference
    #: before that).
    sizes_differ: bool


def compare(first: Node, second: Node, *, strict: bool = False, job: Job | None = None, workers: int = 8) -> Comparison:
    """Compare what two images hold; the longer one must have zeroes where the other ends.

    *strict*: sizes and allocation must be the same too. Raises Cancelled.
    """
    return _Comparer(first, second, strict, job or Job(), workers).run()


class _Piece(NamedTuple):
    """Work: compare *length* bytes at *offset*; the segments of each side, None where it reads as zeroes."""

    offset: int
    length: int
    sides: tuple[Segment | None, Segment | None]


class _Comparer:
    def __init__(self, first: Node, second: Node, strict: bool, job: Job, workers: int) -> None:
        self.nodes = (first, second)
        self.strict = strict
        self.job = job
        self.workers = workers
        self.straight = (is_direct(first), is_direct(second))
        self.sizes = (sectors_up(first.size), sectors_up(second.size))
        self._lock = Lock()
        self._found: Difference | None = None

    def run(self) -> Comparison:
        differ = self.sizes[0] != self.sizes[1]
        if differ and self.strict:
            return Comparison(Difference("size"), True)
        common = min(self.sizes)
        self.job.start(max(self.sizes))
        self._run(self._pieces(0, common), common)
        if self._found is None and differ:
            longer = 0 if self.sizes[0] > self.sizes[1] else 1
            self._run(self._rest(longer, common), self.sizes[longer] - common)
            return Comparison(self._found, True)
        if self._found is None:
            self.job.finish()
        return Comparison(self._found, differ and (self._found is None or self._found.offset >= common))

    def _run(self, pieces: Iterator[_Piece], length: int) -> None:
        count = 1 if length <= SMALL else pipeline.worker_count(self.workers)
        pipeline.run(
            pieces,
            self._compare,
            workers=count,
            make_state=lambda: (page_buffer(BUFFER, length), page_buffer(BUFFER, length)),
        )

    # Planning

    def _pieces(self, start: int, end: int) -> Iterator[_Piece]:
        walks = [Walk(node, end) for node in self.nodes]
        offset = start
        while offset < end and self._found is None:
            one, two = (each.at(offset) for each in walks)
            if self.strict and walks[0].status(one, self.sizes[0]) != walks[1].status(two, self.sizes[1]):
                self._report(Difference("status", offset))
                return
            length = min(one.end, two.end, end) - offset
            if one.kind is Kind.ZERO and two.kind is Kind.ZERO:
                self.job.advance(length)
                offset += length
                continue
            stop = offset + length
            while offset < stop and self._found is None:
                count = min(PIECE, stop - offset)
                yield _Piece(
                    offset, count, (self._segment(0, one, offset, count), self._segment(1, two, offset, count))
                )
                offset += count

    def _rest(self, longer: int, start: int) -> Iterator[_Piece]:
        """What the longer image has where the other one has ended."""
        end = self.sizes[longer]
        walk_ = Walk(self.nodes[longer], end)
        offset = start
        while offset < end and self._found is None:
            extent = walk_.at(offset)
            if extent.kind is Kind.ZERO:
                self.job.advance(min(extent.end, end) - offset)
                offset = extent.end
                continue
            stop = min(extent.end, end)
            while offset < stop and self._found is None:
                count = min(PIECE, stop - offset)
                segment = self._segment(longer, extent, offset, count)
                yield _Piece(offset, count, (segment, None) if longer == 0 else (None, segment))
                offset += count

    def _segment(self, side: int, extent: Extent, offset: int, length: int) -> Segment | None:
        if extent.kind is Kind.ZERO:
            return None
        if not self.straight[side]:
            return Segment(0, length, self.nodes[side], offset)
        return Source.segment(extent, offset, length)

    # Comparing

    def _compare(self, piece: _Piece, buffers: tuple[bytearray, bytearray]) -> None:
        self.job.check()
        for start in range(0, piece.length, BUFFER):
            if not self._compare_part(piece, start, min(BUFFER, piece.length - start), buffers):
                return
        self.job.advance(piece.length)

    def _compare_part(self, piece: _Piece, start: int, length: int, buffers: tuple[bytearray, bytearray]) -> bool:
        """Compare *length* bytes from *start* of the piece on; False when something was found."""
        for side, (segment, buffer) in enumerate(zip(piece.sides, buffers, strict=True)):
            if segment is None:
                continue
            try:
                with memoryview(buffer) as view:
                    read_segment(segment.part(start, length), view)
            except OSError as error:
                self._report(Difference("error", piece.offset, side, error))
                return False
        one, two = buffers
        if piece.sides[0] is None or piece.sides[1] is None:
            data = two if piece.sides[0] is None else one
            if all_zero(data, 0, length):
                return True
            two, one = bytearray(length), data
        elif one == two if length == BUFFER else one[:length] == two[:length]:
            return True
        for sector in range(0, length, SECTOR):
            stop = min(sector + SECTOR, length)
            if one[sector:stop] != two[sector:stop]:
                self._report(Difference("content", piece.offset + start + sector))
                break
        return False

    def _report(self, difference: Difference) -> None:
        """Keep the earliest."""
        with self._lock:
            if self._found is None or difference.offset < self._found.offset:
                self._found = difference


class Walk:
    """The extents of an image (None: nothing but zeroes), one after the other; past its end zeroes up to *end*."""

    def __init__(self, node: Node | None, end: int) -> None:
        self._end = end
        self._extents: Iterator[Extent] = iter(()) if node is None else walk(node)
        self._nothing = Extent(Kind.ZERO, 0, 0, None, -1, 0, node, False)  # type: ignore[arg-type]
        self._current = self._nothing

    def at(self, offset: int) -> Extent:
        """The extent at *offset*, which only moves forward."""
        while self._current.end <= offset:
            following = next(self._extents, None)
            if following is None:
                start = self._current.end
                following = self._nothing._replace(offset=start, length=max(self._end, offset + 1) - start)
            self._current = following
        return self._current

    def status(self, extent: Extent, size: int) -> tuple[bool, ...]:
        """What strict mode compares: data, allocated, a place on the host, compressed, reaching the end."""
        special = extent.kind is Kind.SPECIAL
        return (
            extent.kind is not Kind.ZERO,
            extent.allocated,
            extent.host >= 0 and not special,
            special,
            extent.end >= size,
        )
