"""Compact: give back the host space that an image holds for nothing, and make its file as short as that allows.

Theory of operation. In place, four things happen one after the other; at every moment the image holds what it held:

1. The metadata is checked. Damage stops everything (what it calls free may not be); leaks are mended.
2. Data that is nothing but zeroes is read through and turned into zeroes by metadata, cluster by cluster: the driver
   frees what held it. Space set aside for zeroes is freed too. In raw images holes are punched.
3. Everything is made stable. What lies at the end of the file is moved into free places before it, in portions: the
   driver says what to copy where and then lets the image use the copies (``relocation.py``); the file is cut off.
4. The driver gives back what its metadata calls free (:meth:`Format.reclaim`): holes are punched and the end of the
   file is cut off.

What only a backing image holds is not touched, nor what is compressed. Nobody else writes to the image meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...errors import ImageError, UsageError
from ..extents import walk
from ..formatnode import FormatNode
from ..mapping import Kind
from ..node import Node
from ..relocation import Move
from . import pipeline
from .convert import CopyError
from .job import Cancelled, Job
from .memory import page_buffer
from .zeroes import all_zero, data_runs

if TYPE_CHECKING:
    from ..format import Format
    from ..relocation import Relocation

#: Zeroes in raw images are given back in blocks of this many bytes: what file systems punch.
BLOCK = 4096
#: Bytes that are moved between two looks at whether to go on, and bytes copied at a time.
PORTION = 64 << 20
PIECE = 1 << 20
#: Bytes that are looked through for zeroes at a time, if clusters are no larger.
STEP = 2 << 20


class Compacted(NamedTuple):
    """What was done, or would be. Bytes."""

    #: Data that turned out to be zeroes, and zeroes that had space set aside.
    zeroes: int
    #: Host space that image and data files took before and after.
    before: int
    after: int
    #: What was moved within the file; None where the format's driver does not move anything.
    moved: int | None = None
    #: The files' lengths before and after.
    length_before: int = 0
    length_after: int = 0


def compact(node: Node, *, job: Job | None = None, workers: int = 8, dry_run: bool = False) -> Compacted:
    """Compact the image *node*, open for writing, in place.

    *dry_run* changes nothing and needs no writing: it tells what would be moved, and about what the length and the
    space would be. Raises ImageError where its metadata is damaged, CopyError, Cancelled (both leave a good image),
    BlockError.
    """
    job = job or Job()
    before, length = node.allocated(), _length(node)
    relocation: Relocation | None = None
    if isinstance(node, FormatNode):
        check(node, mend=not dry_run)
        with node.quiesce() as driver:
            if not dry_run:
                node.flush()
            relocation = driver.relocation()
    search = _Zeroes(node, job, workers, relocation, dry_run)
    zeroes = search.run()
    if dry_run:
        return _estimate(node, relocation, zeroes, before, length, 0 if search.noted else zeroes)
    node.flush()
    moved: int | None = None
    if isinstance(node, FormatNode):
        with node.quiesce() as driver:
            if relocation is not None:
                moved = _Mover(driver, relocation, job, workers).run()
            driver.reclaim()
            driver.flush()
    job.finish()
    return Compacted(zeroes, before, node.allocated(), moved, length, _length(node))


def _length(node: Node) -> int:
    """The length of all files that the image itself is in."""
    if isinstance(node, FormatNode):
        return sum(child.size for role, child in node.children().items() if role != "backing")
    return node.size


def _estimate(
    node: Node, relocation: Relocation | None, zeroes: int, before: int, length: int, unknown: int
) -> Compacted:
    """What compacting would come to; *unknown* bytes of zeroes the driver has not heard of.

    How much of what is free has no host space already is not known, so *after* is a guess.
    """
    after = max(0, before - zeroes)
    if relocation is None:
        return Compacted(zeroes, before, after, None, length, length)
    assert isinstance(node, FormatNode)
    with node.quiesce():
        moved, gained = relocation.plan()
    shorter = max(0, length - gained - unknown)
    return Compacted(zeroes, before, min(after, shorter), max(0, moved - unknown), length, shorter)


def check(node: FormatNode, *, mend: bool = True) -> None:
    """Refuse an image whose metadata is damaged; mend leaks. Formats that cannot be checked pass."""
    with node.quiesce() as driver:
        try:
            found = driver.check()
            if mend and found.get("leaks") and not found.get("corruptions"):
                found = _mend(driver, found)
        except UsageError:
            return
    if found.get("corruptions") or found.get("check-errors"):
        raise ImageError(
            node.filename, "the image is damaged and was not compacted: repair it first (vm-img check -r all)"
        )


def _mend(driver: Format, found: dict[str, object]) -> dict[str, object]:
    try:
        return driver.check(repair="leaks")
    except UsageError:  # leaks are no damage, and moving finds them by itself
        return found


class _Zeroes:
    """The search for data that is zeroes."""

    def __init__(self, node: Node, job: Job, workers: int, relocation: Relocation | None, dry_run: bool) -> None:
        self.node = node
        self.job = job
        self.workers = workers
        self.relocation = relocation
        self.dry_run = dry_run
        self.grain = node.cluster_size if isinstance(node, FormatNode) else BLOCK
        self.found: list[int] = []
        #: The relocation takes care of them.
        self.noted = False
        #: What a snapshot shares would stay where it is, and making it zeroes would cost tables.
        self.shared = isinstance(node, FormatNode) and bool(node.format.snapshots())

    def run(self) -> int:
        if self.job.watched:
            self.job.start(sum(length for _, length in self._pieces()))
        self._free_reserved()
        step = max(STEP, self.grain)
        pipeline.run(
            self._pieces(),
            self._work,
            workers=pipeline.worker_count(self.workers),
            make_state=lambda: page_buffer(
                min(step, -(-max(self.node.size, 1) // self.grain) * self.grain), self.node.size
            ),
        )
        return sum(self.found)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of whole clusters in which the image itself has data; each is told once."""
        start = end = 0
        for extent in walk(self.node, base=self.node.backing):
            if extent.kind is Kind.DATA and extent.allocated and (extent.writable or not self.shared):
                low, high = extent.offset - extent.offset % self.grain, -(-extent.end // self.grain) * self.grain
                if low > end:
                    yield from self._cut(start, end)
                    start = low
                end = max(end, high)
        yield from self._cut(start, end)

    def _cut(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        end = min(end, self.node.size)
        step = max(STEP, self.grain)
        while start < end:
            yield start, min(step, end - start)
            start += step

    def _free_reserved(self) -> None:
        """Zeroes that have host space set aside."""
        node = self.node
        if not isinstance(node, FormatNode) or self.shared:
            return
        for run in node.map(0, node.size):
            if run.kind is Kind.ZERO and run.storage is not None and run.host >= 0:
                self.job.check()
                self._zero(run.offset, run.length)

    def _work(self, piece: tuple[int, int], buffer: bytearray) -> None:
        self.job.check()
        offset, length = piece
        try:
            with memoryview(buffer)[:length] as view:
                # All that the guest sees of these clusters: parts of them may be a backing image's.
                self.node.read(offset, (view,))
        except OSError as error:
            raise CopyError("reading", offset, error) from None
        position = 0
        for begin, stop in [*data_runs(buffer, length, self.grain, 0, offset), (length, length)]:
            if position < begin:
                self._zero(offset + position, begin - position)
            position = stop
        self.job.advance(length)

    def _zero(self, offset: int, length: int) -> None:
        grain, size = self.grain, self.node.size
        start = -(-offset // grain) * grain
        end = offset + length
        if end != size:
            end -= end % grain
        if start >= end:
            return
        node = self.node
        length = end - start
        if self.relocation is not None and self.relocation.unwanted(start, length):
            self.found.append(length)
            self.noted = True
            return
        if self.dry_run:
            self.found.append(length)
            return
        try:
            if isinstance(node, FormatNode) and node.backing is None:
                # Nothing shows through here: what is not there at all is shortest. Some formats do not discard.
                node.discard(start, length)
                if all(run.kind is not Kind.DATA for run in node.map(start, length)):
                    self.found.append(length)
                    return
            if not (isinstance(node, FormatNode) and node.blank(start, length)):
                node.zero(start, length, unmap=True)
        except OSError as error:
            raise CopyError("writing", start, error) from None
        self.found.append(length)


class _Mover:
    """The moving of units into free places, in portions. The image is the caller's alone."""

    def __init__(self, driver: Format, relocation: Relocation, job: Job, workers: int) -> None:
        self.driver = driver
        self.relocation = relocation
        self.job = job
        self.workers = pipeline.worker_count(workers)

    def run(self) -> int:
        """Move all that can be moved; returns the bytes."""
        relocation, job = self.relocation, self.job
        if job.watched:
            job.start(job.done + relocation.plan()[0])
        moved = 0
        try:
            while True:
                job.check()
                moves = relocation.prepare(PORTION)
                if not moves:
                    return moved
                interrupted = self._copy_all(moves)
                relocation.complete()
                if interrupted:
                    raise KeyboardInterrupt
                length = sum(move.length for move in moves)
                moved += length
                job.advance(length)
        except (Cancelled, KeyboardInterrupt):
            # What was freed so far is given back.
            self.driver.flush()
            self.driver.reclaim()
            raise

    def _copy_all(self, moves: Sequence[Move]) -> bool:
        """Copy a portion. One that is interrupted is copied once more, to its end; returns whether it was."""
        try:
            try:
                self._copy(moves)
                return False
            except KeyboardInterrupt:
                self._copy(moves)
                return True
        except BaseException:
            self.relocation.abandon()
            raise

    def _copy(self, moves: Sequence[Move]) -> None:
        pieces = (
            Move(move.storage, move.source + at, move.target + at, min(PIECE, move.length - at))
            for move in moves
            for at in range(0, move.length, PIECE)
        )
        length = sum(move.length for move in moves)
        pipeline.run(
            pieces,
            _piece,
            workers=1 if length <= 4 * PIECE else self.workers,
            make_state=lambda: page_buffer(PIECE, length),
        )


def _piece(move: Move, buffer: bytearray) -> None:
    length = move.length
    with memoryview(buffer)[:length] as view:
        try:
            move.storage.read(move.source, (view,))
        except OSError as error:
            raise CopyError("reading", move.source, error) from None
        try:
            if all_zero(buffer, 0, length):
                move.storage.zero(move.target, length, unmap=True)
            else:
                move.storage.write(move.target, (view,))
        except OSError as error:
            raise CopyError("writing", move.target, error) from None
