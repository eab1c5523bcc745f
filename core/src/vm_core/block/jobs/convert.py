"""Convert: the bytes of one or several images into another image.

Theory of operation. The source's extents are planned as requests (``source.py``); known zeroes are never read. Workers
take requests side by side; each reads its data, finds the zeroes in it, and writes the rest:

* to bare storage and raw images, straight away: nothing depends on the order;
* to an image format, in two halves. Host space is set aside in turns, in the order of guest offsets, so that the image
  is laid out as if one thread had written it; the data itself moves side by side.
* compressed, clusters are encoded side by side and placed in turns.

Zeroes are found in blocks as small as ``sparse`` says. What a target can leave out may be larger: whole clusters.
Within clusters that hold data too, zeroes are not written where the place reads as zeroes already (a hole at the end of
the file, or all of a new image whose clusters have their places), so that the file is as sparse as the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from ...errors import VmError
from ..file import FileProtocol
from ..formatnode import HOLES_LEAST, FormatNode, Holes, WriteTicket
from ..mapping import Kind
from ..node import SECTOR, Node, sectors_up
from ..raw import RawNode
from . import pipeline
from .job import Job
from .memory import page_buffer, trim
from .source import STEP, Request, Run, Source, Warn, read_request, read_segment, requests
from .zeroes import all_zero, data_runs

#: The run of zeroes that is left out of the target (``-S``) where nothing else is asked for.
SPARSE = 4096
#: Bytes that are compressed as one piece of work.
ENCODE_STEP = 512 * 1024
#: Pieces of work after which the codecs' memory is given back.
TRIM_EVERY = 32
#: Images smaller than this are not worth a second thread.
SMALL = 4 * 1024 * 1024

_T = TypeVar("_T")


class CopyError(VmError):
    """Data could not be read or written; the message says where and why."""

    def __init__(self, what: str, offset: int, error: OSError) -> None:
        self.what = what
        self.text = error.strerror or str(error)
        self.offset = offset
        super().__init__(f"error while {what} at byte {offset}: {self.text}")
        self.errno = error.errno


class ConvertOptions(NamedTuple):
    """How to convert."""

    #: Zeroes in data at least this long become holes; 0: data is written as it is, and zeroes as data.
    sparse: int = SPARSE
    #: At most this many threads.
    workers: int = 8
    #: Space is set aside in the order of guest offsets; else as the data comes.
    in_order: bool = True
    compressed: bool = False
    #: The host's file system copies (``copy_file_range``) where it can, zeroes included.
    copy_range: bool = False
    #: Unreadable sectors are told and become zeroes.
    salvage: bool = False
    #: The target has backing images of this many bytes with the same contents as the source's; -1: none.
    backing: int = -1
    #: The target is known to read as zeroes. None: found out.
    zero_init: bool | None = None
    #: Data is searched for zeroes.
    detect: bool = True


def convert(
    sources: Sequence[Node],
    target: Node,
    options: ConvertOptions = ConvertOptions(),  # noqa: B008 - it never changes
    *,
    base: Node | None = None,
    job: Job | None = None,
    warn: Warn | None = None,
) -> None:
    """Copy what *sources* hold, one behind the other, into *target*, which is at least as large.

    With ``options.backing`` what only *base* (None: the backing image) and images below it hold is left alone. *warn*
    is told what ``salvage`` gave up. Raises CopyError, Cancelled, BlockError.
    """
    _Conversion(Source(sources, base), target, options, job or Job(), warn or (lambda text: None)).run()


def reads_as_zeroes(target: Node) -> bool:
    """Whether a *target* that has just been created, with whatever preallocation, holds nothing but zeroes."""
    node = target
    while True:
        if node.opaque:
            return False
        if isinstance(node, FormatNode):
            if not node.size:
                return True
            first = next(iter(node.map(0, min(node.size, node.cluster_size))), None)
            if first is None or first.kind is not Kind.DATA or first.storage is None:
                return True
            node = first.storage
        elif "file" in node.children():
            node = node.children()["file"]
        else:
            return type(node) is FileProtocol


def make_zero(target: Node) -> bool:
    """Make all of *target* read as zeroes if that is quick, giving space back."""
    if not target.size:
        return True
    if isinstance(target, FormatNode):
        with target.quiesce() as driver:
            try:
                return driver.emptied_first and driver.blank(0, target.size)
            except NotImplementedError:
                return False
    if isinstance(target, RawNode) and type(target.file) is FileProtocol:
        target.zero(0, target.size, unmap=True)
        return True
    return False


def _copies_ranges(node: Node) -> bool:
    """Whether the host is to copy from or to it where that is asked for."""
    return not isinstance(node, FormatNode) or node.format.copies_ranges


def _in_place(image: FormatNode) -> bool:
    """Whether clusters have their places before anything is written to them."""
    return any(run.kind is Kind.DATA for run in image.map(0, min(image.size, image.cluster_size)))


class _Conversion:
    """One run of :func:`convert`."""

    def __init__(self, source: Source, target: Node, options: ConvertOptions, job: Job, warn: Warn) -> None:
        self.source = source
        self.target = target
        self.options = options
        self.job = job
        self.warn = warn
        image = target if isinstance(target, FormatNode) else None
        if image is not None and image.format.compressed_only:
            options = self.options = options._replace(compressed=True)
        self.image = image
        #: Bytes that the target can leave out or must write at once.
        self.cluster = image.cluster_size if image is not None else 1
        zero_init = options.zero_init
        if zero_init is None:
            zero_init = options.backing < 0 and reads_as_zeroes(target)
        self.zero_init = zero_init and options.backing < 0
        #: Zeroes within the target's clusters are looked for.
        self.leaves_holes = False
        self.turns: pipeline.Turns | None = None
        #: The host shares blocks; the host copies.
        self.sharing = bool(options.sparse) and not options.compressed and self._find_sharing()
        self.copying = options.copy_range and all(map(_copies_ranges, [*source.nodes, target]))

    def run(self) -> None:
        options = self.options
        if not self.zero_init and options.backing < 0 and options.sparse:
            self.zero_init = make_zero(self.target)
        if self.image is not None and options.backing < 0:
            self.leaves_holes = self.cluster >= HOLES_LEAST or (self.zero_init and _in_place(self.image))
        if self.job.watched or options.salvage:  # a damaged image is looked through before anything is written
            self.job.start(sum(run.length for run in self._runs() if run.kind is Kind.DATA))
        if options.compressed:
            assert self.image is not None
            grain, step = self.cluster, max(ENCODE_STEP, self.cluster)
            work = self._encode
        else:
            # With a backing image parts of clusters are the driver's business: what is not written shows through.
            grain = 1 if options.backing >= 0 else min(self.cluster, STEP)
            step = self._step(grain)
            work = self._copy
        small = self.source.size <= SMALL
        # One by one what is lost is told in order.
        alone = options.salvage or (small and not options.compressed)
        workers = 1 if alone else pipeline.worker_count(options.workers)
        if self.image is not None and (options.in_order or options.compressed) and workers > 1:
            self.turns = pipeline.Turns()
        planned = requests(
            self._runs(), self.target_size, grain=grain, step=step, zeroes=not self.zero_init or not options.sparse
        )
        if not small and not options.compressed and options.backing < 0:
            for storage in _storage([self.target]):
                if type(storage) is FileProtocol:
                    storage.expect_much()
        buffer_size = min(step, sectors_up(self.target_size) or SECTOR)
        pipeline.run(
            planned,
            work,
            workers=workers,
            make_state=lambda: page_buffer(buffer_size, self.source.size),
            turns=self.turns,
        )
        try:
            if options.compressed:
                assert self.image is not None
                self.image.end_encoded()
            # What the target has only in memory may not fit on the disk any more.
            self.target.flush()
        except OSError as error:
            raise CopyError("writing", self.source.size, error) from error
        self.job.finish()

    def _step(self, grain: int) -> int:
        """Bytes of a request at most: whole clusters of the target, and what a source's format asks for."""
        asked = [node.format.copy_step for node in self.source.nodes if isinstance(node, FormatNode)]
        if len(asked) < len(self.source.nodes):
            return STEP
        return min(STEP, max([one or STEP for one in asked] + [grain]))

    @property
    def target_size(self) -> int:
        """Guest bytes that are written: the target may be larger."""
        return self.source.size

    def _runs(self) -> Iterator[Run]:
        options = self.options
        fresh = options.zero_init is not False
        return self.source.runs(
            backing=options.backing,
            fresh=fresh,
            trust_zeroes=bool(options.sparse),
            salvage=self.warn if options.salvage else None,
        )

    # Reading

    def _read(self, request: Request, buffer: bytearray) -> None:
        try:
            with memoryview(buffer) as view:
                read_request(request, view)
        except OSError as error:
            if not self.options.salvage:
                raise self._read_error(request, buffer, error) from None
            self._salvage(request, buffer)

    def _read_error(self, request: Request, buffer: bytearray, error: OSError) -> CopyError:
        """What to say of a request that could not be read, with the part of it that was to blame."""
        where = request.offset
        with memoryview(buffer) as view:
            for segment in request.segments:
                try:
                    read_segment(segment, view)
                except OSError as found:
                    where, error = request.offset + segment.at, found
                    break
        return CopyError("reading", where, error)

    def _salvage(self, request: Request, buffer: bytearray) -> None:
        """Read sector by sector; what cannot be read becomes zeroes."""
        with memoryview(buffer) as view:
            for start in range(0, request.length, SECTOR):
                length = min(SECTOR, request.length - start)
                segments = [
                    segment._replace(
                        at=max(segment.at, start),
                        length=min(segment.at + segment.length, start + length) - max(segment.at, start),
                        host=segment.host + max(0, start - segment.at),
                        special=segment.special
                        and segment.special._replace(
                            offset=segment.special.offset + max(0, start - segment.at),
                            length=min(segment.at + segment.length, start + length) - max(segment.at, start),
                        ),
                    )
                    for segment in request.segments
                    if segment.at < start + length and start < segment.at + segment.length
                ]
                try:
                    read_request(request._replace(segments=segments), view)
                except OSError as error:
                    where = request.offset + start
                    self.warn(f"error while reading offset {where}: {error.strerror or error}")
                    view[start : start + length] = bytes(length)

    # Writing

    def _copy(self, request: Request, buffer: bytearray) -> None:
        self.job.check()
        if request.kind is Kind.ZERO:
            self._in_turn(request, lambda: self._zero(request.offset, request.length))
            return
        by_host = self._blocks(request)
        data = [(0, request.length)]
        if not by_host:
            self._read(request, buffer)
            data = self._data_runs(request, buffer)
        self.job.throttle(request.length)
        image = self.image
        if image is not None and self.options.backing >= 0 and data != [(0, request.length)]:
            # Several parts may share a cluster, and then they have to be written one after the other.
            self._in_turn(request, lambda: self._write_plain(request, buffer, data))
        elif image is None:
            if not by_host or not self._host_write(request):
                if by_host:
                    self._read(request, buffer)
                    data = self._data_runs(request, buffer)
                self._write_plain(request, buffer, data)
        else:
            runs = self._whole_clusters(request, data)
            tickets = self._in_turn(request, lambda: self._begin(image, request, runs))
            if not by_host or not self._host_fill(image, request, tickets):
                if by_host:
                    self._read(request, buffer)
                self._finish(image, request, buffer, tickets, data)
        self._advance(request)

    def _advance(self, request: Request) -> None:
        self.job.advance(sum([segment.length for segment in request.segments if segment.node is not None]))

    def _data_runs(self, request: Request, buffer: bytearray) -> list[tuple[int, int]]:
        """The parts of the request that are not zeroes, relative to it, as fine as is of use."""
        sparse = self.options.sparse
        length = request.length
        if not sparse or not self.options.detect:
            return [(0, length)]
        grain = 1 << sparse.bit_length() - 1
        if grain < SECTOR:
            grain = SECTOR
        if not self.leaves_holes and self.options.backing < 0 and self.cluster > grain:
            grain = min(self.cluster, STEP)
        least, offset = sparse if sparse > grain else 0, request.offset
        read = request.read_runs() if self.leaves_holes else []
        if not read or read == [(0, length)]:
            return data_runs(buffer, length, grain, least, offset)
        return [
            (start + begin, start + end)
            for start, stop in read
            for begin, end in data_runs(buffer[start:stop], stop - start, grain, least, offset + start)
        ]

    def _whole_clusters(self, request: Request, data: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts that are written at least: *data*, out to whole clusters of the target."""
        if data == [(0, request.length)]:
            return data
        grain, origin = min(self.cluster, STEP), request.offset
        runs: list[tuple[int, int]] = []
        for begin, end in data:
            begin = max(0, begin - (origin + begin) % grain)
            end = min(request.length, end + -(origin + end) % grain)
            if runs and begin <= runs[-1][1]:
                runs[-1] = runs[-1][0], end
            else:
                runs.append((begin, end))
        return runs

    def _in_turn(self, request: Request, act: Callable[[], _T]) -> _T:
        turns = self.turns
        try:
            if turns is None:
                return act()
            turns.wait(request.number)
            result = act()
            turns.done()
            return result
        except OSError as error:
            raise CopyError("writing", request.offset, error) from None

    def _zero(self, offset: int, length: int) -> None:
        self.target.zero(offset, min(length, self.target.size - offset), unmap=True)

    def _gaps(self, request: Request, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Zeroes between *runs* that have to be told to the target."""
        if self.zero_init:
            return
        position = 0
        for begin, end in [*runs, (request.length, request.length)]:
            if position < begin:
                yield request.offset + position, begin - position
            position = end

    def _write_plain(self, request: Request, buffer: bytearray, runs: list[tuple[int, int]]) -> None:
        target, offset = self.target, request.offset
        gaps = self._gaps(request, runs)
        try:
            with memoryview(buffer) as view:
                for start, length, zero in sorted(
                    [
                        *[(offset + begin, end - begin, False) for begin, end in runs],
                        *[(start, length, True) for start, length in gaps],
                    ]
                ):
                    if zero:
                        self._zero(start, length)
                    else:
                        target.write(start, (view[start - offset : start - offset + length],))
        except OSError as error:
            raise CopyError("writing", offset, error) from None

    def _begin(self, image: FormatNode, request: Request, runs: list[tuple[int, int]]) -> list[WriteTicket]:
        tickets: list[WriteTicket] = []
        try:
            for start, length in self._gaps(request, runs):
                self._zero(start, length)
            for begin, end in runs:
                tickets.append(image.begin_write(request.offset + begin, end - begin))
        except BaseException:
            for ticket in tickets:
                image.cancel_write(ticket)
            raise
        return tickets

    def _finish(
        self,
        image: FormatNode,
        request: Request,
        buffer: bytearray,
        tickets: list[WriteTicket],
        data: list[tuple[int, int]],
    ) -> None:
        origin = request.offset
        holes = None
        if self.leaves_holes and data != [(0, request.length)]:
            holes = Holes([(origin + begin, origin + end) for begin, end in data], self.zero_init)
        try:
            with memoryview(buffer) as view:
                while tickets:
                    ticket = tickets.pop(0)
                    start = ticket.offset - origin
                    image.finish_write(ticket, (view[start : start + ticket.length],), holes)
        except OSError as error:
            raise CopyError("writing", request.offset, error) from None
        finally:
            for ticket in tickets:
                image.cancel_write(ticket)

    # Compressed

    def _encode(self, request: Request, buffer: bytearray) -> None:
        self.job.check()
        image = self.image
        assert image is not None
        if request.kind is Kind.ZERO:
            self._in_turn(request, lambda: self._zero(request.offset, request.length))
            return
        self._read(request, buffer)
        cluster, length, limit = self.cluster, request.length, self.target.size
        whole = -(-length // cluster) * cluster
        if whole > length:
            buffer.extend(bytes(max(0, whole - len(buffer))))
            buffer[length:whole] = bytes(whole - length)
        encoded: list[tuple[int, bytes | None]] = []
        zero: list[int] = []
        encode = image.format.encode
        with memoryview(buffer) as view:
            for start in range(0, length, cluster):
                if self.options.sparse and all_zero(buffer, start, start + cluster):
                    zero.append(start)
                else:
                    encoded.append((start, encode(request.offset + start, view[start : start + cluster])))

            def place() -> None:
                if not self.zero_init:
                    for start in zero:
                        offset = request.offset + start
                        image.zero(offset, min(cluster, limit - offset), unmap=True)
                self._place(image, request.offset, view, encoded, limit)

            self.job.throttle(length)
            self._in_turn(request, place)
        if request.number % TRIM_EVERY == TRIM_EVERY - 1:
            encoded.clear()
            trim()
        self._advance(request)

    def _place(
        self,
        image: FormatNode,
        offset: int,
        view: memoryview,
        encoded: list[tuple[int, bytes | None]],
        limit: int,
    ) -> None:
        for start, data in encoded:
            where = offset + start
            if data is None:
                image.write(where, (view[start : start + min(self.cluster, limit - where)],))
            else:
                image.write_encoded(where, data)

    # The host copies

    def _find_sharing(self) -> bool:
        """Whether source and target are files whose blocks the host's file system can share."""
        files = [node for node in _storage(self.source.nodes) if type(node) is FileProtocol]
        target = _file_of(self.target)
        if target is None or not files or self.source.size <= SMALL:
            return False
        from ..sharing import can_share

        return all(can_share(node.fileno(), target.filename) for node in files)

    def _blocks(self, request: Request) -> bool:
        """Whether the host may copy all of the request: it is nothing but data of files."""
        if not (self.sharing or self.copying):
            return False
        return all(type(one.node) is FileProtocol and one.special is None for one in request.segments)

    def _host_copy(self, request: Request, start: int, length: int, target: Node, host: int) -> bool:
        """Have the host copy a part of the request to *target* at *host*. False: do it the usual way."""
        if type(target) is not FileProtocol:
            return False
        for segment in request.segments:
            begin = max(segment.at, start)
            count = min(segment.at + segment.length, start + length) - begin
            if count <= 0:
                continue
            source = segment.node
            assert isinstance(source, FileProtocol)
            place = host + begin - start, source, segment.host + begin - segment.at, count
            if self.sharing and target.copy_from(*place, share=True) == count:
                continue
            if self.copying and target.copy_from(*place, share=False) == count:
                continue
            self.copying = False
            return False
        return True

    def _host_write(self, request: Request) -> bool:
        """The whole request by the host, to a target without mappings."""
        target = _file_of(self.target)
        try:
            return target is not None and self._host_copy(
                request, 0, request.length, target, _distance(self.target) + request.offset
            )
        except OSError as error:
            raise CopyError("writing", request.offset, error) from None

    def _host_fill(self, image: FormatNode, request: Request, tickets: list[WriteTicket]) -> bool:
        """The whole request by the host, to where *tickets* have set space aside."""
        try:
            for ticket in tickets:
                for one in ticket.allocations:
                    start = one.offset - request.offset
                    if start < 0 or start + one.length > request.length:
                        return False
                    if not self._host_copy(request, start, one.length, one.storage, one.host):
                        return False
            while tickets:
                image.commit_write(tickets.pop(0))
        except OSError as error:
            for ticket in tickets:
                image.cancel_write(ticket)
            raise CopyError("writing", request.offset, error) from None
        return True


def _storage(nodes: Sequence[Node]) -> list[Node]:
    from ..open import protocols

    return list(protocols(nodes))


def _file_of(target: Node) -> FileProtocol | None:
    """The file below *target*, where nothing but raw images and formats lies between."""
    node = target
    while isinstance(node, (RawNode, FormatNode)):
        if isinstance(node, RawNode) and node.guarded:
            return None
        node = node.children()["file"]
    return node if type(node) is FileProtocol else None


def _distance(target: Node) -> int:
    """How far into its file a raw image begins."""
    distance = 0
    while isinstance(target, RawNode):
        distance += target.offset
        target = target.file
    return distance
