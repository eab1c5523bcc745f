"""The node of every format: it moves the data between what a driver maps.

Theory of operation
-------------------
A :class:`~vm_core.block.format.Format` answers where guest bytes are and sets space aside; this node does the rest,
once for all formats. Two kinds of locks make that safe with many threads:

* the *metadata mutex* is held around every call of the driver except ``read_special``. Data is never read or written
  under it (a driver that loads a table does so under it; that is the price of drivers without locks).
* the *range lock* is a ticket on guest bytes, shared or exclusive, taken under the mutex (``rangelock.py``).

Readers and writers in place hold a shared ticket from before they ask the driver for a mapping until their data has
moved. Whatever changes a mapping – an allocating write, zeroing, discard – holds an exclusive ticket on whole clusters
for as long. Why that is enough:

1. *No stale mapping is used.* A mapping that a reader or in-place writer holds is of guest bytes on which it has a
   ticket, and only the holder of an exclusive ticket on those bytes can change it.
2. *No freed cluster is reused under a reader.* A host cluster is given back by a driver call that takes it away from
   some guest range, made under that range's exclusive ticket; every reader that could have the cluster's address was
   on that range and is gone. A cluster shared by several guest ranges (compressed, deduplicated) is given back only
   when the last of them lets go, and the same holds for each.
3. *Copy-on-write sees a stable world.* The head and tail that a fresh cluster needs are read under the exclusive
   ticket, so no in-place write can slip between that copy and ``commit``.
4. *Two writers never allocate the same cluster twice*: the second waits, then finds it in place.
5. *Overlapping in-place writes* are not ordered. Neither are they by a disk.

A *flush* holds a shared ticket on a byte that no request reaches: it keeps nobody waiting, and nobody it, but
:meth:`FormatNode.quiesce`, which waits for all tickets and then keeps the mutex too. Whoever has quiesced the image may
call the driver and the node alike; everybody else stands still, in front of the mutex.

Order: a request takes tickets from the top of the graph downwards and at most one a node and level, so there is no
cycle (see ``rangelock.py`` for the queueing). A ticket is never upgraded; a writer that finds it must allocate drops
its shared ticket and asks anew for an exclusive one.

A write to a fresh allocation is ``allocate`` → data → ``commit``; if the data cannot be written, ``abort``. The
driver owns the order in which metadata becomes stable; :meth:`FormatNode.flush` makes the data stable first, outside
the mutex, so that the driver's own flush of the file usually finds nothing left to do. With ``fua`` a write is
followed by that flush: data in a cluster whose mapping is not on disk is not on disk either.

Runs that only the driver can read (SPECIAL: compressed, encrypted) are transformed without any mutex, under the shared
ticket. A partial read transforms a whole unit; the last few are kept, since guests read sequentially in small pieces.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from ..errors import BlockError, ImageError, VmError
from .extents import Lease, Step, plan
from .format import Format, Progress
from .imagenode import ImageNode
from .mapping import Allocation, Kind, Mapping
from .node import SECTOR, Buffer, Node
from .passage import Span
from .rangelock import EVERYTHING, RangeLock
from .vectors import PIECE, cut, fill, is_zero, scatter, total, zero_views

#: Decompressed runs kept, and the largest kept.
KEPT_RUNS = 16
KEPT_LENGTH = 2 * 1024 * 1024
#: Guest bytes that one step of :meth:`FormatNode.map` asks a driver for, adapted to how many runs come back.
MAP_STEP, MAP_STEP_MIN, MAP_STEP_MAX = 1 << 26, 1 << 20, 1 << 34
MAP_FEW, MAP_MANY = 256, 4096
#: Zeroes that a format cannot express are written in pieces of this many bytes.
ZERO_STEP = 2 * 1024 * 1024
#: Guest bytes that one call of a driver's zero or discard is given.
CHANGE_STEP = 1 << 30
#: Guest bytes that copy-on-read takes at once.
COPY_STEP = 1 << 20
#: What a flush locks: no request reaches so far, so that it keeps nobody waiting who does not want everything.
FLUSHING = (EVERYTHING - 1, EVERYTHING)
#: Zeroes are left out of fresh clusters from this size on: smaller ones are not worth the calls.
HOLES_LEAST = 1024 * 1024
#: Heads and tails of zeroes longer than this are zeroed by the storage instead of written.
ZERO_BY_STORAGE = PIECE

if TYPE_CHECKING:
    from .passage import Hold

P = ParamSpec("P")
T = TypeVar("T")


def _as_block_errors(function: Callable[P, T]) -> Callable[P, T]:
    """Damage that a driver finds on the way is an I/O error to whoever sent the request."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except VmError as error:
            raise BlockError.of(errno.EIO, str(error)) from error
        except BlockError:
            raise
        except OSError as error:
            raise BlockError.of(error.errno or errno.EIO, error.strerror or str(error)) from error

    return wrapper


@_as_block_errors
def _following(found: Iterator[bytes]) -> bytes | None:
    """The next of what a driver generates, if there is one."""
    return next(found, None)


class WriteTicket(NamedTuple):
    """A write that was begun and not finished: its range, its host space and its lock."""

    offset: int
    length: int
    allocations: list[Allocation]
    ticket: int


class Holes(NamedTuple):
    """What a bulk job knows of the zeroes in a write, so that none are written where there are zeroes already."""

    #: (start, end) in the image of what is not zeroes, ascending.
    data: list[tuple[int, int]]
    #: The image reads as zeroes where this write goes: there is nothing to overwrite.
    blank: bool


class FormatNode(ImageNode):
    """An image: a format driver, its storage, and the backing image if there is one."""

    #: The backing image is the user's choice and another one than the image records.
    backing_replaced: bool = False

    def __init__(
        self,
        format: Format,
        *,
        driver: str = "",
        filename: str = "",
        backing: Node | None = None,
        owned: Sequence[Node] = (),
    ) -> None:
        """*owned* are the nodes to close with this one, ``file`` and *backing* included where they belong to it."""
        self.format = format
        self.driver = driver or type(format).__name__.lower()
        self.filename = filename or format.file.filename
        self.readonly = format.readonly
        self.cluster_size = format.cluster_size
        self.request_alignment = format.file.request_alignment
        self.watched = format.file.watched
        #: Told what is done next, where somebody looks at that.
        self._watch = format.file.event if self.watched else None
        #: Closes the driver and opens the image anew with changed options; also gives what was wrong with them.
        self.remake: Callable[[Format, dict[str, Any]], tuple[Format, Exception | None]] | None = None
        self._backing = backing
        if backing is not None:
            format.backing_changed(backing)
        self._owned = list(owned)
        self._ranges = RangeLock()
        self._mutex = self._ranges.mutex
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._closed = False

    # What it is

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        return self.format.sparse

    @property
    def size(self) -> int:
        return self.format.size

    @property
    def backing(self) -> Node | None:
        return self._backing

    def set_backing(self, node: Node | None, *, owned: bool = True) -> Node | None:
        """Put another backing image in place and return the former one, which the caller now owns."""
        with self.quiesce():
            former, self._backing = self._backing, node
            self.format.backing_changed(node)
            if former is not None and former in self._owned:
                self._owned.remove(former)
            if node is not None and owned:
                self._owned.append(node)
        return former

    def children(self) -> Dict[str, Node]:
        children = {"file": self.format.file, **self.format.children()}
        if self._backing is not None:
            children["backing"] = self._backing
        return children

    def info(self) -> dict[str, Any]:
        with self._mutex:
            return self.format.info()

    def allocated(self) -> int:
        return sum(node.allocated() for role, node in self.children().items() if role != "backing")

    # Reading

    @_as_block_errors
    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = total(buffers)
        if not length:
            return
        size = self.format.size
        if offset + length > size:
            inside = max(0, size - offset)
            fill(cut(buffers, inside, length - inside))
            if not inside:
                return
            buffers, length = cut(buffers, 0, inside), inside
        mutex = self._mutex
        with mutex:
            ticket = self._ranges.shared(offset, offset + length)
            try:
                runs = list(self.format.map(offset, length))
            except BaseException:
                self._ranges.drop(ticket)
                raise
        try:
            if self._watch is not None:
                self._tell_reads(runs)
            if len(runs) == 1 and runs[0].kind is Kind.DATA:
                storage = runs[0].storage
                assert storage is not None
                storage.read(runs[0].host, buffers)
            else:
                self._read_runs(offset, runs, buffers)
        finally:
            with mutex:
                self._ranges.drop(ticket)

    def _tell_reads(self, runs: Sequence[Mapping]) -> None:
        """Tell the storage what reading *runs* will come to."""
        assert self._watch is not None
        for run in runs:
            if run.kind is Kind.DATA:
                self._watch("read_aio")
            elif run.kind is Kind.SPECIAL:
                self._watch("read_compressed")
            elif run.kind is Kind.UNALLOCATED and self._backing is not None:
                self._watch("read_backing_aio")

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        length = total(buffers)
        if offset + length > self.format.size or not self._mutex.acquire(blocking=False):
            return False
        ticket: int | None = None
        runs: Sequence[Mapping] | None = None
        try:
            # First the ticket: whoever has the driver to himself (quiesce) calls it without the mutex.
            ticket = self._ranges.try_shared(offset, offset + length)
            if ticket is None:
                return False
            runs = self.format.map_cached(offset, length)
        except (OSError, VmError):
            return False  # the ordinary way will meet the error again and tell it
        finally:
            if ticket is not None and runs is None:
                self._ranges.drop(ticket)
            self._mutex.release()
        if runs is None:
            return False
        try:
            if len(runs) == 1 and runs[0].kind is Kind.DATA:
                storage = runs[0].storage
                return storage is not None and storage.read_nowait(runs[0].host, buffers)
            for run in runs:
                piece = cut(buffers, run.offset - offset, run.length)
                if run.kind is Kind.DATA and run.storage is not None:
                    if not run.storage.read_nowait(run.host, piece):
                        return False
                elif run.kind is Kind.ZERO or (run.kind is Kind.UNALLOCATED and self._backing is None):
                    fill(piece)
                elif run.kind is Kind.UNALLOCATED and self._backing is not None:
                    if not self._backing.read_nowait(run.offset, piece):
                        return False
                else:
                    return False
            return True
        finally:
            self._ranges.release(ticket)

    def host_spans(
        self, offset: int, length: int, spans: list[Span], holds: list[Hold], *, write: bool, stable: bool
    ) -> bool:
        if self._watch is not None or not self._mutex.acquire(blocking=False):
            return False
        try:
            # Under the mutex: the size, and whether changes are tracked, may have changed a moment ago.
            format = self.format
            if offset + length > format.size:
                return False
            if write and (
                # A stable write ends with a flush of the driver's.
                stable or self.readonly or self.detect_zeroes != "off" or format.compressed_only or format.tracking
            ):
                return False
            # First the ticket: whoever has the driver to himself (quiesce) calls it without the mutex.
            ticket = self._ranges.try_shared(offset, offset + length)
            if ticket is None:
                return False
            holds.append((self._ranges, ticket))
            runs = format.map_cached(offset, length)
            if runs is None:
                return False
            if write:
                for run in runs:
                    if run.kind is not Kind.DATA or not run.writable:
                        return False
        except (OSError, VmError):
            return False  # the ordinary way will meet the error again and tell it
        finally:
            self._mutex.release()
        if len(runs) == 1:
            run = runs[0]
            if run.kind is Kind.DATA and run.storage is not None:
                return run.storage.host_spans(run.host, length, spans, holds, write=write, stable=stable)
        backing = self._backing
        for run in runs:
            kind = run.kind
            if kind is Kind.DATA:
                storage = run.storage
                if storage is None or not storage.host_spans(
                    run.host, run.length, spans, holds, write=write, stable=stable
                ):
                    return False
            elif kind is Kind.UNALLOCATED and backing is not None:
                inside = max(0, min(run.length, backing.size - run.offset))
                if inside and not backing.host_spans(run.offset, inside, spans, holds, write=False, stable=False):
                    return False
                if inside < run.length:
                    spans.append(Span(None, -1, run.length - inside))
            elif kind is Kind.ZERO or kind is Kind.UNALLOCATED:
                spans.append(Span(None, -1, run.length))
            else:
                return False
        return True

    def lease_runs(self, ranges: Sequence[tuple[int, int]]) -> tuple[FormatNode, int, list[Mapping]]:
        start = min([offset for offset, _ in ranges])
        end = max([offset + length for offset, length in ranges])
        with self._mutex:
            ticket = self._ranges.shared(start, end)
            try:
                runs = [run for offset, length in ranges for run in self.format.map(offset, length)]
            except BaseException:
                self._ranges.drop(ticket)
                raise
        if self._watch is not None:
            try:
                self._tell_reads(runs)
            except BaseException:
                self._ranges.release(ticket)
                raise
        return self, ticket, runs

    def _read_runs(self, offset: int, runs: Sequence[Mapping], buffers: Sequence[Buffer]) -> None:
        """Read what *runs* of this node resolve to. The range is locked by the caller."""
        leases: list[Lease] = []
        try:
            for step in plan(self, runs, leases):
                piece = cut(buffers, step.offset - offset, step.length)
                if step.special is not None:
                    assert step.owner is not None
                    step.owner._read_special(step.special, piece)
                elif step.storage is None:
                    fill(piece)
                else:
                    step.storage.read(step.host, piece)
        finally:
            for node, ticket in leases:
                node._ranges.release(ticket)

    def _read_special(self, run: Mapping, buffers: Sequence[Buffer]) -> None:
        """Fill *buffers* from a SPECIAL run. Its range is locked by the caller, at least shared."""
        unit = self.format.special_unit or self.cluster_size
        start = run.offset - run.offset % unit
        end = min(-(-(run.offset + run.length) // unit) * unit, self.format.size)
        if start == run.offset and end == run.offset + run.length and run.length > KEPT_LENGTH:
            scatter(self._transform(run), buffers)
            return
        position, stop = run.offset, run.offset + run.length
        whole: list[Mapping] | None = None
        while position < stop:
            kept = self._find_kept(position)
            if kept is None:
                if whole is None:
                    # The mapping may be cut to the request; the driver wants whole units, and we too, to keep them.
                    with self._mutex:
                        whole = list(self.format.map(start, end - start))
                found = next(one for one in whole if one.offset <= position < one.offset + one.length)
                if found.kind is not Kind.SPECIAL:
                    raise ImageError(self.filename, f"{self.driver}: inconsistent mapping at {position}")
                data = self._transform(found)
                kept = (found.offset, data)
                if len(data) <= KEPT_LENGTH:
                    self._keep(found, data)
            origin, data = kept
            length = min(stop, origin + len(data)) - position
            scatter(
                memoryview(data)[position - origin : position - origin + length],
                cut(buffers, position - run.offset, length),
            )
            position += length

    def _transform(self, run: Mapping) -> bytes:
        data = self.format.read_special(run)
        if len(data) != run.length:
            raise ImageError(self.filename, f"{self.driver}: {len(data)} bytes for a run of {run.length}")
        return data

    def _find_kept(self, position: int) -> tuple[int, bytes] | None:
        with self._mutex:
            for (start, end), data in self._kept.items():
                if start <= position < end:
                    return start, data
        return None

    def _keep(self, run: Mapping, data: bytes) -> None:
        with self._mutex:
            if self._ranges.owned:
                return  # whoever has quiesced the image may change this run next, and tells nobody
            self._kept[run.offset, run.offset + run.length] = data
            if len(self._kept) > KEPT_RUNS:
                self._kept.popitem(last=False)

    def _forget(self, start: int, end: int) -> None:
        """Drop kept runs that overlap the range. Called with the mutex held."""
        if self._kept:
            for key in [key for key in self._kept if key[0] < end and start < key[1]]:
                del self._kept[key]

    # Writing

    @_as_block_errors
    def _write(self, offset: int, length: int, buffers: Sequence[Buffer], fua: bool) -> None:
        if self.format.compressed_only:
            self.write_compressed(offset, buffers)
        elif not self._write_in_place(offset, length, buffers):
            with self._exclusive(*self._clusters(offset, length)):
                self._write_allocating(offset, length, buffers)
        if self.format.tracking:
            self._written(offset, length)
        if fua:
            self.flush()

    def _written(self, offset: int, length: int) -> None:
        """Let a driver that asked for it hear of a change."""
        with self._mutex:
            self.format.written(offset, length)

    def _write_in_place(self, offset: int, length: int, buffers: Sequence[Buffer]) -> bool:
        """Overwrite what is there; False, with nothing written, where any of it must be allocated first."""
        ranges = self._ranges
        with self._mutex:
            ticket = ranges.shared(offset, offset + length)
            try:
                runs = list(self.format.map(offset, length))
            except BaseException:
                ranges.drop(ticket)
                raise
            for run in runs:
                if run.kind is not Kind.DATA or not run.writable:
                    ranges.drop(ticket)
                    return False
        try:
            for run in runs:
                assert run.storage is not None
                if self._watch is not None:
                    self._watch("write_aio")
                run.storage.write(run.host, cut(buffers, run.offset - offset, run.length))
        finally:
            ranges.release(ticket)
        return True

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The hull of whole clusters of a range."""
        size = self.cluster_size
        return offset - offset % size, -(-(offset + length) // size) * size

    @contextmanager
    def _exclusive(self, start: int, end: int) -> Iterator[None]:
        """Nobody else reads or writes the range, nor has read it meanwhile."""
        with self._mutex:
            ticket = self._ranges.exclusive(start, end)
            self._forget(start, end)
        try:
            yield
        finally:
            self._ranges.release(ticket)

    def _write_allocating(self, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        """Write through ``allocate``. The clusters are locked exclusively by the caller."""
        with self._mutex:
            allocations = list(self.format.allocate(offset, length))
        self._fill_allocations(offset, length, buffers, allocations)

    def _fill_allocations(
        self,
        offset: int,
        length: int,
        buffers: Sequence[Buffer],
        allocations: Sequence[Allocation],
        holes: Holes | None = None,
    ) -> None:
        """Write the data of a request and commit its fresh allocations, or give them back if that fails."""
        fresh = [one for one in allocations if one.fresh]
        try:
            self._check_allocations(offset, length, allocations)
            for group in _groups(allocations):
                if holes is None or not self._fill_data(offset, length, buffers, group, holes):
                    self._fill_group(offset, length, buffers, group)
        except BaseException:
            if fresh:
                with self._mutex:
                    self.format.abort(fresh)
            raise
        if fresh:
            with self._mutex:
                self.format.commit(fresh)

    @property
    def can_compress(self) -> bool:
        """Whether the format has a compressed form."""
        return type(self.format).encode is not Format.encode

    @_as_block_errors
    def write_compressed(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write whole clusters (the image's last one may be cut off) in compressed form where that makes them smaller.

        Raises BlockError: EINVAL for parts of clusters, EIO where a cluster holds data already.
        """
        length = total(buffers)
        unit, size = self.cluster_size, self.format.size
        if self.readonly:
            raise self.read_only_error()
        if offset < 0 or offset + length > size:
            raise self._past_end()
        if unit == 1:  # an image without clusters (fixed, flat): nothing in it is compressed
            self.write(offset, buffers)
            return
        if offset % unit or (length % unit and offset + length != size):
            raise BlockError.of(errno.EINVAL)
        for start in range(0, length, unit):
            piece = cut(buffers, start, min(unit, length - start))
            data = b"".join(piece).ljust(unit, b"\0")
            encoded = self.format.encode(offset + start, data)
            if encoded is None:
                self.write(offset + start, piece)
            else:
                self.write_encoded(offset + start, encoded)

    @_as_block_errors
    def copy_up(self, offset: int, length: int) -> None:
        """Copy-on-read: give this image the clusters of the range that only its backing images have, or nobody."""
        if self.readonly:
            raise self.read_only_error()
        start, end = self._clusters(offset, length)
        end = min(end, self.format.size)
        if start >= end:
            return
        with self._mutex:
            if all(run.kind is not Kind.UNALLOCATED for run in self.format.map(start, end - start)):
                return
        for begin, finish in _portions(start, end, self.cluster_size, COPY_STEP):
            with self._exclusive(begin, -(-finish // self.cluster_size) * self.cluster_size):
                with self._mutex:
                    runs = list(self.format.map(begin, finish - begin))
                for run in runs:
                    if run.kind is Kind.UNALLOCATED:
                        self._copy_run(run)

    def _copy_run(self, run: Mapping) -> None:
        """Make an UNALLOCATED run this image's own. It is locked exclusively by the caller."""
        data = [memoryview(bytearray(run.length))]
        self._read_runs(run.offset, [run], data)
        if is_zero(data):
            self._zero_clusters(run.offset, run.offset + run.length, False)
        else:
            self._write_allocating(run.offset, run.length, data)

    @_as_block_errors
    def write_encoded(self, offset: int, encoded: bytes | memoryview) -> None:
        """Store one cluster in the form that the driver's ``encode`` gave it. Raises BlockError as above."""
        with self._exclusive(offset, offset + self.cluster_size):
            with self._mutex:
                one = self.format.allocate_encoded(offset, len(encoded))
            try:
                if self._watch is not None:
                    self._watch("write_compressed")
                one.storage.write(one.host, (memoryview(encoded),))
            except BaseException:
                with self._mutex:
                    self.format.abort([one])
                raise
            with self._mutex:
                self.format.commit([one])
        if self.format.tracking:
            self._written(offset, min(self.cluster_size, self.format.size - offset))

    @_as_block_errors
    def end_encoded(self) -> None:
        """The last :meth:`write_encoded` of a job is done. Raises BlockError as above."""
        with self._mutex:
            self.format.end_encoded()

    @_as_block_errors
    def begin_write(self, offset: int, length: int) -> WriteTicket:
        """The first half of a write: lock the range and set host space aside for it, touching no data.

        For bulk jobs, where the order of these calls decides the layout while the data moves side by side. Each ticket
        goes to :meth:`finish_write` or :meth:`cancel_write`, once, from any thread.
        """
        if self.readonly:
            raise self.read_only_error()
        if offset < 0 or length <= 0 or offset + length > self.format.size:
            raise self._past_end()
        start, end = self._clusters(offset, length)
        with self._mutex:
            ticket = self._ranges.exclusive(start, end)
            try:
                self._forget(start, end)
                allocations = list(self.format.allocate(offset, length))
            except BaseException:
                self._ranges.drop(ticket)
                raise
        return WriteTicket(offset, length, allocations, ticket)

    @_as_block_errors
    def finish_write(self, write: WriteTicket, buffers: Sequence[Buffer], holes: Holes | None = None) -> None:
        """The second half: write the data where it belongs and make it what the guest sees.

        Zeroes among it that *holes* tells of need not be written.
        """
        try:
            self._fill_allocations(write.offset, write.length, buffers, write.allocations, holes)
            if self.format.tracking:
                self._written(write.offset, write.length)
        finally:
            self._ranges.release(write.ticket)

    @_as_block_errors
    def commit_write(self, write: WriteTicket) -> None:
        """Instead of :meth:`finish_write`: the caller has put the data of all allocations, whole, in their place."""
        fresh = [one for one in write.allocations if one.fresh]
        with self._mutex:
            try:
                if fresh:
                    self.format.commit(fresh)
                if self.format.tracking:
                    self.format.written(write.offset, write.length)
            finally:
                self._ranges.drop(write.ticket)

    def cancel_write(self, write: WriteTicket) -> None:
        """Give back what :meth:`begin_write` set aside: there will be no data."""
        fresh = [one for one in write.allocations if one.fresh]
        with self._mutex:
            try:
                if fresh:
                    self.format.abort(fresh)
            finally:
                self._ranges.drop(write.ticket)

    def _check_allocations(self, offset: int, length: int, allocations: Sequence[Allocation]) -> None:
        """A driver's mistake must not become a write to the wrong place."""
        start, end = self._clusters(offset, length)
        position = allocations[0].offset if allocations else -1
        if not start <= position <= offset:
            raise ImageError(self.filename, f"{self.driver}: bad allocation for {offset}+{length}")
        for one in allocations:
            if one.offset != position or one.length <= 0:
                raise ImageError(self.filename, f"{self.driver}: allocations for {offset}+{length} do not adjoin")
            position += one.length
        if not offset + length <= position <= end:
            raise ImageError(self.filename, f"{self.driver}: bad allocation for {offset}+{length}")

    def _fill_group(self, offset: int, length: int, buffers: Sequence[Buffer], group: Sequence[Allocation]) -> None:
        """Write the part of a request that goes to adjoining host space, with the head and tail that the guest saw."""
        first, last = group[0], group[-1]
        start, end = first.offset, last.offset + last.length
        begin, finish = max(start, offset), min(end, offset + length)
        vector = cut(buffers, begin - offset, finish - begin)
        host = first.host
        if first.fresh and begin > start:
            head = self._former_bytes(start, begin - start, first)
            if head is None:
                host += begin - start
            else:
                vector[:0] = head
        if last.fresh and end > finish:
            tail = self._former_bytes(finish, end - finish, last)
            if tail is not None:
                vector.extend(tail)
            elif last.host + last.length > last.storage.size:
                # A file never ends within a cluster: others look at its length.
                if self._watch is not None:
                    self._watch("cluster_alloc_space")
                rest = end - finish
                last.storage.zero(last.host + last.length - rest, rest)
        if self._watch is not None:
            self._watch("write_aio")
        first.storage.write(host, vector)

    def _fill_data(
        self, offset: int, length: int, buffers: Sequence[Buffer], group: Sequence[Allocation], holes: Holes
    ) -> bool:
        """Write the data alone where all else reads as zeroes already. False, and nothing written, where it may not."""
        first, last = group[0], group[-1]
        start, end = first.offset, last.offset + last.length
        for one in group:
            if not (one.zeroed and self.cluster_size >= HOLES_LEAST if one.fresh else holes.blank):
                return False
        begin, finish = max(start, offset), min(end, offset + length)
        if begin > start and first.fresh and self._former_bytes(start, begin - start, first) is not None:
            return False
        if finish < end and last.fresh and self._former_bytes(finish, end - finish, last) is not None:
            return False
        storage, distance = first.storage, first.host - start
        if self._watch is not None:
            self._watch("write_aio")
        for low, high in holes.data:
            if low < finish and begin < high:
                low, high = max(low, begin), min(high, finish)
                storage.write(low + distance, cut(buffers, low - offset, high - low))
        if last.fresh and end + distance > storage.size:
            # A file never ends within a cluster: others look at its length.
            storage.write(end + distance - SECTOR, zero_views(SECTOR))
        return True

    def _former_bytes(self, offset: int, length: int, target: Allocation) -> list[Buffer] | None:
        """What the guest reads in the range now, as vectors to write, None where nothing needs to be written."""
        size = self.format.size
        inside = max(0, min(length, size - offset))
        leases: list[Lease] = []
        try:
            steps: list[Step] = []
            if inside:
                with self._mutex:
                    runs = list(self.format.map(offset, inside))
                steps = plan(self, runs, leases)
            if all(step.storage is None and step.special is None for step in steps):
                if target.zeroed:
                    return None
                if length > ZERO_BY_STORAGE:
                    target.storage.zero(target.host + offset - target.offset, length)
                    return None
                return zero_views(length)
            data = memoryview(bytearray(length))
            if self._watch is not None:
                self._watch("cow_read")
            for step in steps:
                piece = [data[step.offset - offset : step.offset - offset + step.length]]
                if step.special is not None:
                    assert step.owner is not None
                    step.owner._read_special(step.special, piece)
                elif step.storage is not None:
                    step.storage.read(step.host, piece)
            return [data]
        finally:
            for node, ticket in leases:
                node._ranges.release(ticket)

    # Zeroing and discarding

    @_as_block_errors
    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        self._zero_range(offset, length, unmap)
        if self.format.tracking:
            self._written(offset, length)
        if fua:
            self.flush()

    def _zero_range(self, offset: int, length: int, unmap: bool) -> None:
        if self.format.compressed_only:
            self.write_compressed(offset, zero_views(length))
            return
        end = offset + length
        unit = self.cluster_size
        size = self.format.size
        fine = self.format.zero_unit or unit
        if fine != unit:
            with self._exclusive(*self._clusters(offset, length)):
                self._zero_fine(offset, end, fine, unmap)
            return
        start = -(-offset // unit) * unit
        # The image's last cluster counts as a whole one.
        stop = end if end == size and self.format.zero_parts else end - end % unit
        if start >= stop:
            self._zero_part(offset, end, unmap)
        else:
            if offset < start:
                self._zero_part(offset, start, unmap)
            for begin, finish in _portions(start, stop, unit):
                with self._exclusive(begin, -(-finish // unit) * unit):
                    self._zero_clusters(begin, finish, unmap)
            if stop < end:
                self._zero_part(stop, end, unmap)

    def _zero_part(self, start: int, end: int, unmap: bool) -> None:
        """Zero within the clusters at the range's ends, by metadata alone where that is possible.

        It is where the rest of the cluster (or of its parts, if the format has such) reads as zeroes already.
        """
        size, unit = self.format.size, self.cluster_size
        with self._exclusive(*self._clusters(start, end - start)):
            for begin, finish in _split(start, end, unit):
                self._zero_edge(begin, finish, unit, size, unmap)

    def _zero_fine(self, start: int, end: int, fine: int, unmap: bool) -> None:
        """Zero in a format that knows parts of clusters, of *fine* bytes. The clusters are locked by the caller.

        Whole parts are zeroed at once: if any of them cannot be by metadata, all of them are written.
        """
        size, unit = self.format.size, self.cluster_size
        whole, stop = -(-start // fine) * fine, end if end == size else end - end % fine
        if whole >= stop:
            for begin, finish in _split(start, end, fine):
                self._zero_edge(begin, finish, fine, size, unmap)
            return
        if start < whole:
            self._zero_edge(start, whole, fine, size, unmap)
        first, last = min(-(-whole // unit) * unit, stop), max(stop - stop % unit, whole)
        if first > last:
            parts = [(whole, stop)]
        else:
            parts = [(whole, first), *_portions(first, last, unit), (last, stop)]
        for begin, finish in parts:
            if begin < finish:
                with self._mutex:
                    done = self.format.zero(begin, finish - begin, unmap=unmap)
                if not done:
                    self._write_zeroes(whole, stop, even_zeroes=True)
                    break
        if stop < end:
            self._zero_edge(stop, end, fine, size, unmap)

    def _zero_edge(self, start: int, end: int, unit: int, size: int, unmap: bool) -> None:
        if not self.format.zero_parts:
            self._store_zeroes(start, end - start, unmap)
            return
        first, last = start - start % unit, min(-(-end // unit) * unit, size)
        if self._reads_zero(first, start) and self._reads_zero(end, last):
            self._zero_clusters(first, last, unmap)
        else:
            # Also where it reads as zeroes by now: the image below may change under a cluster that is not ours yet.
            self._write_zeroes(start, end, even_zeroes=True)

    def _zero_clusters(self, start: int, end: int, unmap: bool) -> None:
        with self._mutex:
            if self.format.zero(start, end - start, unmap=unmap):
                return
        self._write_zeroes(start, end, unmap=unmap)

    def _write_zeroes(self, start: int, end: int, *, even_zeroes: bool = False, unmap: bool = False) -> None:
        """Zeroes as data. The clusters are locked exclusively by the caller."""
        while start < end:
            step = min(end - start, ZERO_STEP - start % ZERO_STEP)
            if not self.format.zero_parts:
                self._store_zeroes(start, step, unmap)
            # Above a backing image zeroes are written even where that has zeroes too: it may not always.
            elif even_zeroes or self._backing is not None or not self._reads_zero(start, start + step):
                self._write_allocating(start, step, zero_views(step))
            start += step

    def _store_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Zeroes that get their place like any other data. The clusters are locked exclusively by the caller.

        The storage makes them where there is a place already, but not in an image that is in its file as the guest sees
        it: there a hole would be told as one.
        """
        position, end = offset, offset + length
        if not self.format.sparse:
            with self._mutex:
                runs = list(self.format.map(offset, length))
            for run in runs:
                if run.kind is Kind.DATA and run.writable and run.storage is not None:
                    if position < run.offset:
                        self._write_allocating(position, run.offset - position, zero_views(run.offset - position))
                    run.storage.zero(run.host, run.length, unmap=unmap)
                    position = run.offset + run.length
        if position < end:
            self._write_allocating(position, end - position, zero_views(end - position))

    @_as_block_errors
    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        if self.readonly:
            raise self.read_only_error()
        if offset < 0 or offset + length > self.format.size:
            raise self._past_end()
        if not self.format.zero_parts:
            return False
        start, end = self._clusters(offset, length)
        inside = min(end, self.format.size)
        with self._exclusive(start, end):
            # Clusters of which only a part is asked for are zeroed whole if the rest of them is zeroes already.
            if not (self._reads_zero(start, offset) and self._reads_zero(offset + length, inside)):
                return False
            with self._mutex:
                return self.format.zero(start, inside - start, unmap=unmap and self.discard_unmap)

    @_as_block_errors
    def blank(self, offset: int, length: int) -> bool:
        """Zero whole clusters (or what reaches the image's end) so that they take as little space as can be.

        False, with nothing done, where that means to write zeroes.
        """
        with self._exclusive(*self._clusters(offset, length)), self._mutex:
            return self.format.blank(offset, length)

    def _reads_zero(self, start: int, end: int) -> bool:
        """Whether metadata says that the range reads as zeroes. The range is locked by the caller."""
        if start >= end:
            return True
        leases: list[Lease] = []
        try:
            with self._mutex:
                runs = list(self.format.map(start, end - start))
            return all(step.storage is None and step.special is None for step in plan(self, runs, leases))
        finally:
            for node, ticket in leases:
                node._ranges.release(ticket)

    @_as_block_errors
    def _discard(self, offset: int, length: int) -> None:
        unit = self.cluster_size
        end = offset + length
        start, stop = -(-offset // unit) * unit, end if end == self.format.size else end - end % unit
        for begin, finish in _portions(start, stop, unit):
            with self._exclusive(begin, -(-finish // unit) * unit), self._mutex:
                self.format.discard(begin, finish - begin)
        if self.format.failed and (offset < start or stop < end):
            # The parts of clusters would have been a request of their own.
            raise BlockError.of(errno.ENOMEDIUM)
        if self.format.tracking:
            self._written(offset, length)

    # Saved machine state

    def _vmstate_base(self) -> int:
        base = self.format.vmstate_offset()
        if base is None:
            raise BlockError.of(errno.ENOTSUP)
        return base

    @_as_block_errors
    def read_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        base = self._vmstate_base()
        start, length = base + offset, total(buffers)
        if not length:
            return
        if self._watch is not None:
            self._watch("vmstate_load")
        with self._mutex:
            ticket = self._ranges.shared(start, start + length)
            try:
                runs = list(self.format.map(start, length))
            except BaseException:
                self._ranges.drop(ticket)
                raise
        try:
            # No backing image has anything to say here.
            blank = (Kind.UNALLOCATED, Kind.EOF)
            self._read_runs(
                start, [run._replace(kind=Kind.ZERO) if run.kind in blank else run for run in runs], buffers
            )
        finally:
            self._ranges.release(ticket)

    @_as_block_errors
    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Written in whole clusters, with what was there before around it. One writer at a time."""
        if self.readonly:
            raise self.read_only_error()
        base = self._vmstate_base()
        length = total(buffers)
        if not length:
            return
        if self._watch is not None:
            self._watch("vmstate_save")
        start, end = self._clusters(base + offset, length)
        vector: list[Buffer] = []
        if start < base + offset:
            vector.append(memoryview(bytearray(base + offset - start)))
            self.read_vmstate(start - base, vector)
        vector.extend(buffers)
        if base + offset + length < end:
            tail = memoryview(bytearray(end - base - offset - length))
            self.read_vmstate(offset + length, [tail])
            vector.append(tail)
        with self._exclusive(start, end):
            with self._mutex:
                self.format.vmstate_reserve(end)
            self._write_allocating(start, end - start, vector)

    # The whole image

    @_as_block_errors
    def flush(self) -> None:
        if self.readonly:
            return
        with self._mutex:
            ticket = self._ranges.shared(*FLUSHING)
        try:
            if self._watch is not None:
                self._watch("flush_to_os")
            self.format.file.flush()
            for node in self.format.children().values():
                node.flush()
            with self._mutex:
                self.format.flush()
            if self._watch is not None:
                self._watch("flush_to_disk")
                self.format.file.flush()
        finally:
            self._ranges.release(ticket)

    @contextmanager
    def quiesce(self) -> Iterator[Format]:
        """Have the driver to oneself: every request is finished and new ones wait. For check, snapshots, resizing.

        Inside, call the driver and the node as one likes from this thread; another one that needs either waits.
        """
        with self._ranges.alone():
            self._kept.clear()
            yield self.format

    @_as_block_errors
    def truncate(self, size: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        with self.quiesce():
            former = self.format.size
            self.format.truncate(size)
        self._blank_gained(former, size)

    def amend(self, options: dict[str, Any], *, force: bool = False, progress: Progress | None = None) -> None:
        """Change what :meth:`.Format.amend` changes; the size may be among it."""
        if self.readonly:
            raise self.read_only_error()
        with self.quiesce():
            former = self.format.size
            self.format.amend(options, force=force, progress=progress)
            size = self.format.size
        self._blank_gained(former, size)

    def _blank_gained(self, former: int, size: int, *, hidden: bool = False) -> None:
        """Let what an image gained read as zeroes. *hidden*: its whole clusters do."""
        # The rest of the last cluster may hold anything, and a backing image that is longer would show through; then
        # all is blanked at once, as by QEMU.
        unit, below = self.cluster_size, self._backing.size if self._backing is not None else 0
        last = min(size, -(-former // unit) * unit)
        if below <= former or hidden:
            if former < last and not self._is_blank(former, last):
                self._zero_range(former, last - former, False)
        elif not self.format.zero_parts:
            if former < size and not self._is_blank(former, size):
                self._zero_range(former, size - former, False)
        elif former < size:
            fine = self.format.zero_unit or unit
            edge = min(size, -(-former // fine) * fine)
            if former < edge:
                with self._exclusive(*self._clusters(former, edge - former)):
                    self._write_allocating(former, edge - former, zero_views(edge - former))
            if edge < last:
                self._zero_range(edge, last - edge, False)
            if last < size:
                self._zero_gained(last, size)

    def _zero_gained(self, start: int, size: int) -> None:
        """Have whole clusters read as zeroes, the image's last one among them."""
        unit = self.cluster_size
        for begin, finish in _portions(start, -(-size // unit) * unit, unit):
            with self._exclusive(begin, finish), self._mutex:
                done = self.format.zero(begin, finish - begin, unmap=False)
            if not done:
                self._zero_range(begin, min(finish, size) - begin, False)

    def _is_blank(self, start: int, end: int) -> bool:
        with self._exclusive(*self._clusters(start, end - start)):
            if self._reads_zero(start, end):
                return True
        return end - start <= ZERO_STEP and not any(self.pread(start, end - start))

    def truncate_preallocated(self, size: int, mode: str) -> None:
        """Grow, and set host space aside for what is gained. Raises UsageError where the format does not do that."""
        if self.readonly:
            raise self.read_only_error()
        with self.quiesce():
            former = self.format.size
            hide = self._backing is not None and self._backing.size > former
            hidden = self.format.truncate_preallocated(size, mode, hide=hide, read=self.pread)
        self._blank_gained(former, size, hidden=hidden)

    @_as_block_errors
    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        return self._map(offset, length)

    def _map(self, offset: int, length: int) -> Iterator[Mapping]:
        end = offset + length
        limit = min(end, self.format.size)
        step = MAP_STEP
        pending: Mapping | None = None
        while offset < limit:
            count = min(step, limit - offset)
            with self._mutex:
                runs = list(self.format.map(offset, count))
            offset += count
            if len(runs) < MAP_FEW:
                step = min(step * 4, MAP_STEP_MAX)
            elif len(runs) > MAP_MANY:
                step = max(step // 4, MAP_STEP_MIN)
            if pending is not None:
                if runs and pending.continues(runs[0]):
                    runs[0] = pending._replace(length=pending.length + runs[0].length)
                else:
                    yield pending
            pending = runs.pop() if runs else None
            yield from runs
        if pending is not None:
            yield pending
        if offset < end:
            yield Mapping(Kind.EOF, offset, end - offset)

    def read_special(self, run: Mapping) -> bytes:
        """The bytes of a SPECIAL run of :meth:`map` or of a walk, for programs that move data themselves."""
        data = bytearray(run.length)
        with self._mutex:
            ticket = self._ranges.shared(run.offset, run.offset + run.length)
        try:
            self._read_special(run, [memoryview(data)])
        finally:
            self._ranges.release(ticket)
        return bytes(data)

    @_as_block_errors
    def transform(self, run: Mapping) -> bytes:
        """Like :meth:`read_special` without any lock, for bulk jobs on an image that nobody writes to."""
        unit = self.format.special_unit or self.cluster_size
        end = run.offset + run.length
        if run.offset % unit or (end % unit and end != self.format.size):
            return self.read_special(run)
        return self._transform(run)

    def transform_each(self, runs: Sequence[Mapping]) -> Iterator[bytes]:
        """:meth:`transform` of several runs, in order. Raises OSError."""
        unit = self.format.special_unit or self.cluster_size
        if any(run.offset % unit or run.length != unit for run in runs):
            yield from map(self.transform, runs)
            return
        found = iter(self.format.read_specials(runs))
        while (data := _following(found)) is not None:
            if len(data) != unit:
                raise BlockError.of(errno.EIO, f"{self.driver}: {len(data)} bytes for a run of {unit}")
            yield data

    def reopen(self, *, readonly: bool) -> None:
        if readonly == self.readonly:
            return
        with self.quiesce():
            if readonly:
                self.flush()
            else:
                self.format.file.reopen(readonly=False)
            try:
                self.format.reopen(readonly=readonly)
            except BaseException:
                if not readonly:
                    self.format.file.reopen(readonly=True)
                raise
            if readonly:
                self.format.file.reopen(readonly=True)
            self.readonly = readonly

    def reconfigure(self, options: dict[str, Any]) -> None:
        """Change options of the driver while the image stays open. Raises VmError, with the image open as it was."""
        if self.remake is None:
            raise ImageError(self.filename, f"{self.driver}: options cannot be changed")
        with self.quiesce():
            self.flush()
            readonly = self.format.readonly
            self.format, failure = self.remake(self.format, options)
            self.format.readonly = readonly
        if failure is not None:
            raise failure

    def invalidate(self) -> None:
        self.format.file.invalidate()

    def identity(self) -> tuple[Any, ...] | None:
        return self.format.file.identity()

    def close(self) -> None:
        """Flush, let the driver write back, close what belongs to this node: all of it, even if a step fails."""
        if self._closed:
            return
        self._closed = True
        failure: BaseException | None = None
        steps: list[Callable[[], None]] = [self.format.close, *[node.close for node in self._owned]]
        if not self.format.failed:
            steps.insert(0, self.flush)
        for step in steps:
            try:
                step()
            except (OSError, VmError) as error:
                failure = failure or error
        if failure is not None:
            raise failure


def _portions(start: int, end: int, unit: int, longest: int = CHANGE_STEP) -> Iterator[tuple[int, int]]:
    """A long range in portions of whole clusters, so that others get a turn between them."""
    step = max(longest // unit, 1) * unit
    while start < end:
        stop = min(end, start + step)
        yield start, stop
        start = stop


def _split(start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """A range cut where units begin."""
    while start < end:
        stop = min(end, start - start % unit + unit)
        yield start, stop
        start = stop


def _groups(allocations: Sequence[Allocation]) -> Iterator[list[Allocation]]:
    """Neighbours that one write can fill: adjoining on the host too."""
    group: list[Allocation] = []
    for one in allocations:
        if group:
            last = group[-1]
            if last.storage is one.storage and last.host + last.length == one.host:
                group.append(one)
                continue
            yield group
        group = [one]
    if group:
        yield group
