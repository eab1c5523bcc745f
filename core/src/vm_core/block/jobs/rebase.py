"""Rebase: give an image another backing image without changing what it holds.

What the image does not hold itself is read from both the former and the new backing chain; where they differ, the
former bytes are written into the image. Extents of both chains are planned side by side: where both are known to be
zero, or both lie at one place of one file, nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import ne
from struct import Struct
from typing import NamedTuple

from ..extents import Extent, walk
from ..formatnode import FormatNode
from ..mapping import Kind
from ..node import SECTOR, Node
from . import pipeline
from .compare import SMALL, Walk
from .convert import CopyError
from .job import Job
from .memory import page_buffer
from .source import Segment, Source, is_direct, read_segment

#: Bytes that are written at a time.
PIECE = 2 * 1024 * 1024
#: Bytes of both chains that are read and compared at a time: they stay in the processor's cache.
STEP = 256 * 1024


def rebase(
    image: FormatNode,
    new: Node | None,
    *,
    compressed: bool = False,
    job: Job | None = None,
    workers: int = 8,
) -> None:
    """Write into *image* what would change if *new* (None: nothing) were its backing image.

    Its header is left alone: see :meth:`Format.change_backing`. With *compressed* whole clusters are written, encoded.
    Raises CopyError, Cancelled.
    """
    _Rebase(image, new, compressed, job or Job(), workers).run()


class _Piece(NamedTuple):
    number: int
    offset: int
    length: int
    old: Segment | None
    new: Segment | None
    #: There is no former backing image here, or it has ended.
    ended: bool


class _Change(NamedTuple):
    """Bytes from *start* to *end* of a piece that differ: what they were, in parts."""

    start: int
    end: int
    data: list[bytes]


class _Rebase:
    def __init__(self, image: FormatNode, new: Node | None, compressed: bool, job: Job, workers: int) -> None:
        self.image = image
        self.old = image.backing
        self.new = new
        self.compressed = compressed
        self.job = job
        self.workers = workers
        self.turns = pipeline.Turns()
        #: Where the bytes go that were not written yet because the next piece may go on there; and they.
        self.held_at = 0
        self.held: list[bytes] = []

    def run(self) -> None:
        size = self.image.size
        self.job.start(size)
        workers = 1 if size <= SMALL else pipeline.worker_count(self.workers)
        pipeline.run(
            self._pieces(),
            self._work,
            workers=workers,
            make_state=lambda: (page_buffer(STEP, size), page_buffer(STEP, size)),
            turns=self.turns,
        )
        self._release()
        try:
            # What was written has to be part of the image before another backing image is.
            self.image.flush()
        except OSError as error:
            raise CopyError("writing", size, error) from error
        self.job.finish()

    # Planning

    def _pieces(self) -> Iterator[_Piece]:
        """What is not in the image and may differ."""
        old, new = self._walk(self.old), self._walk(self.new)
        number = done = 0
        for first, end in self._missing():
            offset = first
            while offset < end:
                one, two = old.at(offset), new.at(offset)
                stop = min(end, one.end, two.end)
                if not _same(one, two):
                    # Pieces end at clusters, so that one is written by one piece.
                    stop = min(stop, offset + PIECE - offset % PIECE)
                    if self.old is not None and offset < self.old.size:
                        stop = min(stop, max(self.old.size, offset + SECTOR))
                    if self.compressed:
                        # Runs of the chains end anywhere; what is written are whole clusters.
                        stop = self._cluster_end(offset, end)
                        offset = max(first, offset - offset % self.image.cluster_size)
                    self.job.advance(offset - done)
                    done = offset
                    yield _Piece(
                        number,
                        offset,
                        stop - offset,
                        self._segment(self.old, one, offset, stop),
                        self._segment(self.new, two, offset, stop),
                        self.old is None or offset >= self.old.size,
                    )
                    number += 1
                offset = stop

    def _cluster_end(self, offset: int, end: int) -> int:
        """Where a piece of whole clusters from *offset* on ends."""
        cluster = self.image.cluster_size
        return min(end, offset - offset % cluster + max(cluster, PIECE // cluster * cluster))

    def _missing(self) -> Iterator[tuple[int, int]]:
        """The (start, end) of what the image leaves to its backing image."""
        image = self.image
        for extent in walk(image, base=image.backing):
            if not extent.allocated:
                yield extent.offset, extent.end

    def _walk(self, node: Node | None) -> Walk:
        return Walk(node, self.image.size)

    def _segment(self, node: Node | None, extent: Extent, offset: int, stop: int) -> Segment | None:
        if self.compressed and node is not None and not extent.offset <= offset < stop <= extent.end:
            return Segment(0, stop - offset, node, offset)
        if extent.kind is Kind.ZERO or node is None:
            return None
        if not is_direct(node):
            return Segment(0, stop - offset, node, offset)
        return Source.segment(extent, offset, stop - offset)

    # Working

    def _work(self, piece: _Piece, buffers: tuple[bytearray, bytearray]) -> None:
        self.job.check()
        changes: list[_Change] = []
        for start in range(0, piece.length, STEP):
            length = min(STEP, piece.length - start)
            for buffer, segment in zip(buffers, (piece.old, piece.new), strict=True):
                _read(buffer, segment, piece.offset, start, length)
            old, new = buffers
            for begin, end in _differing(old, new, length):
                if changes and changes[-1].end == start + begin:
                    changes[-1].data.append(bytes(old[begin:end]))
                    changes[-1] = changes[-1]._replace(end=start + end)
                else:
                    changes.append(_Change(start + begin, start + end, [bytes(old[begin:end])]))
        self.turns.wait(piece.number)
        if changes:
            self.job.throttle(piece.length)
            if self.compressed:
                self._encode(piece, changes)
            else:
                self._write(piece, changes)
        self.turns.done()

    def _write(self, piece: _Piece, changes: list[_Change]) -> None:
        """Write the changes of one piece; what adjoins, within :data:`PIECE` bytes, is one request."""
        for change in changes:
            start = piece.offset + change.start
            end = self.held_at + sum([len(data) for data in self.held])
            if piece.ended or start != end or start % PIECE == 0:
                self._release()
            if piece.ended:
                try:
                    self.image.zero(start, change.end - change.start)
                except OSError as error:
                    raise CopyError("writing", start, error) from None
                continue
            if not self.held:
                self.held_at = start
            self.held += change.data

    def _release(self) -> None:
        """Write what was held back."""
        if self.held:
            try:
                self.image.write(self.held_at, [memoryview(data) for data in self.held])
            except OSError as error:
                raise CopyError("writing", self.held_at, error) from None
            self.held = []

    def _encode(self, piece: _Piece, changes: list[_Change]) -> None:
        """Write the clusters in which something differs."""
        cluster, size = self.image.cluster_size, self.image.size
        buffer = bytearray(cluster)
        start = 0
        while start < piece.length:
            offset = piece.offset + start
            stop = min(start + cluster - offset % cluster, piece.length)
            if any(change.start < stop and start < change.end for change in changes):
                _read(buffer, piece.old, piece.offset, start, stop - start)
                # A cluster of which the image holds a part already (subclusters) cannot be compressed.
                whole = stop - start == cluster or (not offset % cluster and piece.offset + stop == size)
                write = self.image.write_compressed if whole else self.image.write
                try:
                    with memoryview(buffer) as view:
                        write(offset, (view[: stop - start],))
                except OSError as error:
                    raise CopyError("writing", offset, error) from None
            start = stop


def _read(buffer: bytearray, segment: Segment | None, offset: int, start: int, length: int) -> None:
    """Fill the beginning of *buffer* with *length* bytes from byte *start* of a piece at *offset* on; None: zeroes."""
    part = Segment(0, length, None, -1) if segment is None else segment.part(start, length)
    with memoryview(buffer) as view:
        try:
            read_segment(part, view)
        except OSError as error:
            raise CopyError("reading", offset + start, error) from None


def _same(one: Extent, two: Extent) -> bool:
    """Whether two runs are known to hold the same bytes, wherever they begin to overlap."""
    if one.kind is Kind.ZERO or two.kind is Kind.ZERO:
        return one.kind is two.kind
    if one.kind is not two.kind or one.storage is None or two.storage is None:
        return False
    mark = one.storage.identity()
    if mark is None or mark != two.storage.identity():
        return False
    if one.kind is Kind.SPECIAL:
        return False
    return one.host - one.offset == two.host - two.offset and one.owner.driver == two.owner.driver


#: The sectors of a block, taken apart in one call.
_SECTORS = Struct("512s" * 64)


def _differing(old: bytearray, new: bytearray, length: int) -> list[tuple[int, int]]:
    """The (start, end) of runs of sectors in which the first *length* bytes differ."""
    if old[:length] == new[:length] if length != len(old) or len(old) != len(new) else old == new:
        return []
    runs: list[tuple[int, int]] = []
    step = _SECTORS.size
    for block in range(0, length, step):
        one, two = old[block : min(block + step, length)], new[block : min(block + step, length)]
        if one == two:
            continue
        if len(one) == step:
            unlike = list(map(ne, _SECTORS.unpack(one), _SECTORS.unpack(two)))
            if all(unlike):
                _join(runs, block, block + step)
                continue
        else:
            unlike = [one[at : at + SECTOR] != two[at : at + SECTOR] for at in range(0, len(one), SECTOR)]
        for start, differs in zip(range(block, length, SECTOR), unlike, strict=False):
            if differs:
                _join(runs, start, min(start + SECTOR, length))
    return runs


def _join(runs: list[tuple[int, int]], start: int, end: int) -> None:
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], end)
    else:
        runs.append((start, end))
