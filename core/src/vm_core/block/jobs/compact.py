"""Compact: give back the host space that an image holds for nothing.

Theory of operation. In place, three things happen one after the other; at every moment the image holds what it
held:

1. The metadata is checked. Damage stops everything (what it calls free may not be); leaks are mended.
2. Data that is nothing but zeroes is read through and turned into zeroes by metadata, cluster by cluster: the driver
   frees what held it. In raw images holes are punched.
3. Everything is made stable; then the driver gives back what its metadata calls free (:meth:`Format.reclaim`): holes
   are punched and the end of the file is cut off.

What only a backing image holds is not touched, nor what is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...errors import ImageError, UsageError
from ..extents import walk
from ..formatnode import FormatNode
from ..mapping import Kind
from ..node import Node
from . import pipeline
from .convert import CopyError
from .job import Job
from .source import Request, Run, read_request, requests, sectors_up
from .zeroes import data_runs

#: Zeroes in raw images are given back in blocks of this many bytes: what file systems punch.
BLOCK = 4096


class Compacted(NamedTuple):
    """What was done. Bytes."""

    #: Data that turned out to be zeroes.
    zeroes: int
    #: Host space that image and data files took before and after.
    before: int
    after: int


def compact(node: Node, *, job: Job | None = None, workers: int = 8) -> Compacted:
    """Compact the image *node*, open for writing, in place.

    Raises ImageError where its metadata is damaged, CopyError, Cancelled (both leave a good image), BlockError.
    """
    job = job or Job()
    before = node.allocated()
    if isinstance(node, FormatNode):
        check(node)
    zeroes = _Zeroes(node, job, workers).run()
    node.flush()
    if isinstance(node, FormatNode):
        with node.quiesce() as driver:
            driver.reclaim()
            driver.flush()
    job.finish()
    return Compacted(zeroes, before, node.allocated())


def check(node: FormatNode) -> None:
    """Refuse an image whose metadata is damaged; mend leaks. Formats that cannot be checked pass."""
    with node.quiesce() as driver:
        try:
            found = driver.check()
            if found.get("leaks") and not found.get("corruptions"):
                found = driver.check(repair="leaks")
        except UsageError:
            return
    if found.get("corruptions") or found.get("check-errors"):
        raise ImageError(
            node.filename, "the image is damaged and was not compacted: repair it first (vm-img check -r all)"
        )


class _Zeroes:
    """The search for data that is zeroes."""

    def __init__(self, node: Node, job: Job, workers: int) -> None:
        self.node = node
        self.job = job
        self.workers = workers
        self.grain = node.cluster_size if isinstance(node, FormatNode) else BLOCK
        self.found: list[int] = []

    def run(self) -> int:
        size = sectors_up(self.node.size)
        if self.job.watched:
            self.job.start(sum(run.length for run in self._runs() if run.kind is Kind.DATA))
        step = max(2 << 20, self.grain)
        pipeline.run(
            requests(self._runs(), size, grain=self.grain if isinstance(self.node, FormatNode) else 1, step=step),
            self._work,
            workers=pipeline.worker_count(self.workers),
            make_state=lambda: bytearray(min(step, max(size, 1))),
        )
        return sum(self.found)

    def _runs(self) -> Iterator[Run]:
        """Data of the image itself."""
        node = self.node
        for extent in walk(node, base=node.backing):
            if extent.kind is Kind.DATA and extent.allocated:
                yield Run(Kind.DATA, extent.offset, extent.length, node, extent.offset)
            else:
                yield Run(Kind.UNALLOCATED, extent.offset, extent.length)

    def _work(self, request: Request, buffer: bytearray) -> None:
        self.job.check()
        try:
            with memoryview(buffer) as view:
                read_request(request, view)
        except OSError as error:
            raise CopyError("reading", request.offset, error) from None
        end = min(request.length, self.node.size - request.offset)
        position = 0
        for begin, stop in [*data_runs(buffer, end, self.grain, 0, request.offset), (end, end)]:
            if position < begin:
                self._zero(request.offset + position, begin - position)
            position = stop
        self.job.advance(request.length)

    def _zero(self, offset: int, length: int) -> None:
        grain, size = self.grain, self.node.size
        start = -(-offset // grain) * grain
        end = offset + length
        if end != size:
            end -= end % grain
        if start >= end:
            return
        node = self.node
        try:
            if isinstance(node, FormatNode) and node.backing is None:
                # Nothing shows through here: what is not there at all is shortest. Some formats do not discard.
                node.discard(start, end - start)
                if all(run.kind is not Kind.DATA for run in node.map(start, end - start)):
                    self.found.append(end - start)
                    return
            node.zero(start, end - start, unmap=True)
        except OSError as error:
            raise CopyError("writing", start, error) from None
        self.found.append(end - start)
