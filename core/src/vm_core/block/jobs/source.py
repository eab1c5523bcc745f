"""What a copy reads: one or several images behind each other, planned as requests of bounded size.

Theory of operation. :meth:`Source.runs` turns the extents of the images into runs of data, zeroes and what is left to
the target's backing image. :func:`requests` cuts runs of data into requests of at most :data:`STEP` bytes, each with
the segments that fill it, rounded out to the target's clusters so that no cluster is written twice. Nothing is read
for zeroes, and where the graph holds no filters the segments name the storage itself, so that reading one is a system
call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ..extents import Extent, walk
from ..formatnode import FormatNode
from ..mapping import Kind, Mapping
from ..node import SECTOR, Node, Protocol, sectors_up
from ..raw import RawNode
from ..vectors import fill

#: Bytes a request has at most: what the reference implementation moves at a time, so that space is set aside alike.
STEP = 2 * 1024 * 1024
#: Bytes that are looked up at once where errors are expected.
SALVAGE_STEP = 64 * 1024 * 1024
#: Beyond every image.
_ENDLESS = 1 << 63


#: Told about what was given up.
Warn = Callable[[str], None]


class Segment(NamedTuple):
    """Bytes of a request: *length* of them at *at*. *node* None: zeroes; *special*: that *node* transforms this run."""

    at: int
    length: int
    node: Node | None
    host: int
    special: Mapping | None = None

    def part(self, start: int, length: int) -> Segment:
        """*length* bytes from its byte *start* on, to the beginning of a buffer."""
        special = self.special and self.special._replace(offset=self.special.offset + start, length=length)
        return Segment(0, length, self.node, self.host + start, special)


class Run(NamedTuple):
    """A run of guest bytes: DATA (read from *node* at *host*, or *special*), ZERO, or UNALLOCATED: leave it alone."""

    kind: Kind
    offset: int
    length: int
    node: Node | None = None
    host: int = -1
    special: Mapping | None = None


class Request(NamedTuple):
    """Work for the pipeline: DATA with the segments to read, or ZERO."""

    number: int
    kind: Kind
    offset: int
    length: int
    segments: list[Segment]

    def read_runs(self) -> list[tuple[int, int]]:
        """(start, end) of what is read, relative to the request: all but known zeroes."""
        runs: list[tuple[int, int]] = []
        for segment in self.segments:
            if segment.node is None:
                continue
            start, end = segment.at, segment.at + segment.length
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, end))
        return runs


class Source:
    """Images behind each other."""

    def __init__(self, nodes: Sequence[Node], base: Node | None = None) -> None:
        """*base*: what only this image of the chain and those below it hold is not looked at."""
        self.nodes = list(nodes)
        self._base = base
        self.starts: list[int] = []
        position = 0
        for node in self.nodes:
            self.starts.append(position)
            position += sectors_up(node.size)
        #: Bytes of all images, each rounded up to sectors.
        self.size = position

    def runs(
        self, *, backing: int = -1, fresh: bool = True, trust_zeroes: bool = True, salvage: Warn | None = None
    ) -> Iterator[Run]:
        """All runs in order.

        *backing*: the target has the same backing images, of that many bytes; what only they hold is UNALLOCATED, and
        what nobody holds behind their end too if the target is *fresh*. -1: it has none. Without *trust_zeroes* known
        zeroes are DATA. With *salvage* sectors whose place cannot be found are told to it, and are DATA.
        """
        for node, start in zip(self.nodes, self.starts, strict=True):
            base = self._base or (node.backing if backing >= 0 else None)
            straight = is_direct(node)
            found = walk(node, base=base) if salvage is None else _walk_damaged(node, base, start, salvage)
            for extent in found:
                if backing < 0 or extent.allocated:
                    yield _run(node, start, extent, straight, trust_zeroes)
                    continue
                held, ended = _held(extent)
                if held:
                    yield from self._below(start + extent.offset, held, _ENDLESS if fresh else backing)
                if ended:
                    yield Run(Kind.ZERO, start + extent.offset + held, ended)
            size = node.size
            rest = sectors_up(size) - size
            if rest:
                yield Run(Kind.ZERO, start + size, rest)

    @staticmethod
    def segment(extent: Extent, offset: int, length: int) -> Segment:
        """A part of *extent*, of data, to be read on its own. The image is direct (:func:`is_direct`)."""
        if extent.kind is Kind.SPECIAL:
            special = Mapping(extent.kind, offset, length, extent.storage, extent.host, False, extent.token)
            return Segment(0, length, extent.owner, offset, special)
        return Segment(0, length, extent.storage, extent.host + offset - extent.offset)

    def _below(self, offset: int, length: int, backing: int) -> Iterator[Run]:
        """A run that the target's backing image of *backing* bytes answers for; zeroes from its end on."""
        inside = max(0, min(length, backing - offset))
        if inside:
            yield Run(Kind.UNALLOCATED, offset, inside)
        if inside < length:
            yield Run(Kind.ZERO, offset + inside, length - inside)


def _held(extent: Extent) -> tuple[int, int]:
    """Bytes of a run that was not found above the base: those the base answers for, and those it does not.

    Where a backing image between has ended there are zeroes: images below it do not show through.
    """
    if not extent.depth:
        return extent.length, 0
    held = max(0, min(extent.length, extent.owner.size - extent.offset))
    return held, extent.length - held


def _walk_damaged(node: Node, base: Node | None, start: int, warn: Warn) -> Iterator[Extent]:
    """A walk that gets over errors: ever smaller parts are tried, down to the sector that cannot be looked up."""
    offset, size, length = 0, node.size, SALVAGE_STEP
    while offset < size:
        length = min(length, size - offset)
        try:
            found = list(walk(node, offset, length, base=base))
        except OSError as error:
            if length > SECTOR:
                length = max(SECTOR, length // 2 // SECTOR * SECTOR)
                continue
            warn(f"error while reading block status at offset {start + offset}: {error.strerror or error}")
            found = [Extent(Kind.DATA, offset, length, node, offset, 0, node)]
        yield from found
        offset += length
        length = min(length * 2, SALVAGE_STEP)


def _run(node: Node, start: int, extent: Extent, straight: bool, trust_zeroes: bool) -> Run:
    offset = start + extent.offset
    kind = extent.kind
    if kind is Kind.ZERO and trust_zeroes:
        return Run(Kind.ZERO, offset, extent.length)
    if kind is Kind.ZERO and straight:
        return Run(Kind.DATA, offset, extent.length)
    if not straight:
        return Run(Kind.DATA, offset, extent.length, node, extent.offset)
    if kind is Kind.SPECIAL:
        special = Mapping(kind, extent.offset, extent.length, extent.storage, extent.host, False, extent.token)
        return Run(Kind.DATA, offset, extent.length, extent.owner, extent.offset, special)
    return Run(Kind.DATA, offset, extent.length, extent.storage, extent.host)


def is_direct(top: Node) -> bool:
    """Whether the storage that a walk names may be read without its node's parents noticing: there are no filters."""
    todo = [top]
    while todo:
        node = todo.pop()
        if isinstance(node, Protocol):
            continue
        if isinstance(node, RawNode):
            if isinstance(node.file, FormatNode):  # offsets of special runs would not be those of their image
                return False
        elif not isinstance(node, FormatNode):
            return False
        todo.extend(node.children().values())
    return True


def requests(
    runs: Iterable[Run], size: int, *, grain: int = 1, step: int = STEP, zeroes: bool = False
) -> Iterator[Request]:
    """Requests for *runs* of an image of *size* bytes, in order.

    Data is rounded out to *grain* bytes and cut every *step* (a multiple of *grain*, or a divisor of it) bytes of a run
    of data. With *zeroes* known zeroes come as requests of their own, else they are left out.
    """
    return _Planner(size, grain, step, zeroes).plan(runs)


class _Planner:
    """The state of :func:`requests`: the request being filled, and zeroes not yet told."""

    def __init__(self, size: int, grain: int, step: int, zeroes: bool) -> None:
        self._size = size
        self._grain = grain
        self._step = step
        self._zeroes = zeroes
        self._number = 0
        self._start = self._filled = 0
        self._segments: list[Segment] = []
        self._active = False
        self._zero_from = self._zero_to = 0

    def plan(self, runs: Iterable[Run]) -> Iterator[Request]:
        grain = self._grain
        for run in runs:
            if run.kind is Kind.DATA:
                begin = run.offset - run.offset % grain
                if self._active and self._up() < begin:
                    yield from self._close()
                if not self._active:
                    yield from self._tell_zeroes(begin)
                    self._active = True
                    self._start = self._filled = begin
                if self._filled < run.offset:
                    yield from self._add(run.offset - self._filled, None)
                yield from self._add(run.length, run)
            elif run.kind is Kind.ZERO:
                end = run.offset + run.length
                if self._active:
                    if end <= self._up():
                        continue
                    yield from self._close()
                if self._zero_from >= self._zero_to:
                    self._zero_from = max(self._zero_from, run.offset)
                self._zero_to = end
            else:
                yield from self._close()
                yield from self._tell_zeroes(run.offset)
        yield from self._close()
        yield from self._tell_zeroes(self._size)

    def _up(self) -> int:
        """Where the clusters end that are begun."""
        return min(-(-self._filled // self._grain) * self._grain, self._size)

    def _add(self, length: int, run: Run | None) -> Iterator[Request]:
        """Fill the request with *length* bytes of *run* (None: zeroes), telling each that is full."""
        taken = 0
        while taken < length:
            count = min(length - taken, self._start + self._step - self._filled)
            at = self._filled - self._start
            if run is None or run.node is None:
                self._segments.append(Segment(at, count, None, -1))
            elif run.special is None:
                self._segments.append(Segment(at, count, run.node, run.host + taken))
            else:
                special = run.special
                if count != length:
                    special = special._replace(offset=special.offset + taken, length=count)
                self._segments.append(Segment(at, count, run.node, run.host + taken, special))
            taken += count
            self._filled += count
            if self._filled - self._start == self._step:
                yield self._request(Kind.DATA, self._start, self._filled)
                self._start = self._filled

    def _close(self) -> Iterator[Request]:
        """End the run of data at the end of its last cluster."""
        if not self._active:
            return
        end = self._up()
        if end > self._filled:
            yield from self._add(end - self._filled, None)
        if self._filled > self._start:
            yield self._request(Kind.DATA, self._start, self._filled)
        self._active = False
        self._zero_from = self._zero_to = end

    def _tell_zeroes(self, before: int) -> Iterator[Request]:
        """Known zeroes up to *before*."""
        start, end = self._zero_from, min(self._zero_to, before)
        self._zero_from = self._zero_to = before
        if self._zeroes and start < end:
            yield self._request(Kind.ZERO, start, end)

    def _request(self, kind: Kind, start: int, end: int) -> Request:
        number, self._number = self._number, self._number + 1
        segments, self._segments = self._segments, []
        return Request(number, kind, start, end - start, segments)


def read_request(request: Request, buffer: memoryview) -> None:
    """Fill the beginning of *buffer* with the request's bytes. Raises OSError."""
    segments = request.segments
    number = 0
    while number < len(segments):
        first = segments[number]
        stop = number + 1
        if first.special is None:
            read_segment(first, buffer)
            number = stop
            continue
        # What adjoins may be read at once.
        node, runs = first.node, [first.special]
        while stop < len(segments) and (special := segments[stop].special) is not None and segments[stop].node is node:
            runs.append(special)
            stop += 1
        assert isinstance(node, FormatNode)
        at = first.at
        for data in node.transform_each(runs):
            buffer[at : at + len(data)] = data
            at += len(data)
        number = stop


def read_segment(segment: Segment, buffer: memoryview) -> None:
    """Fill the segment's part of *buffer*. Raises OSError."""
    view = buffer[segment.at : segment.at + segment.length]
    node = segment.node
    if node is None:
        fill((view,))
    elif segment.special is None:
        node.read(segment.host, (view,))
    else:
        assert isinstance(node, FormatNode)
        view[:] = node.transform(segment.special)
