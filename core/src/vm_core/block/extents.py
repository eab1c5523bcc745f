"""The one walk over extents: what every guest byte of an image is, resolved through backing files and filters.

Reads, convert, map, compare, measure, NBD's block status and streaming all stand on these two functions.

:func:`walk` describes a whole graph for programs: maximal runs, with the depth in the chain at which each was found.
:func:`plan` is its sibling for the request path: it resolves one request and holds a shared range lock on every format
node it passed, so that nothing it found can be given away before the bytes have been read.

Both go down a backing chain level by level in a loop, never by recursion: a chain may be longer than Python's stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .mapping import Kind, Mapping

if TYPE_CHECKING:
    from .formatnode import FormatNode
    from .node import Node

#: Guest bytes that are mapped in one step of a walk; adapted to how many runs come back.
STEP = 1 << 25
STEP_MAX = 1 << 44
STEP_MIN = 1 << 20
RUNS_FEW = 64
RUNS_MANY = 4096


class Extent(NamedTuple):
    """A resolved run: *length* guest bytes of the top image from *offset* on, all of one kind."""

    kind: Kind
    offset: int
    length: int
    #: The node that holds the bytes, below all filters, and where in it; None and -1 without host space.
    storage: Node | None
    host: int
    #: Levels below the top at which the answer was found: 0 the image itself, 1 its backing image, …
    depth: int
    #: The image at that depth; for SPECIAL the node that turns *token* into bytes.
    owner: Node
    #: False where no image of the chain says anything: the bytes are zeroes because nobody ever wrote them.
    allocated: bool = True
    #: DATA that the owner may overwrite where it is.
    writable: bool = False
    token: Any = None

    @property
    def end(self) -> int:
        return self.offset + self.length


def walk(
    node: Node, offset: int = 0, length: int | None = None, *, base: Node | None = None, holes: bool = True
) -> Iterator[Extent]:
    """Maximal resolved runs that cover the range, in order; up to the end of the image where *length* is None.

    The chain is followed down to *base*, which is not looked at (what only it or its backing images hold comes out as
    not allocated); None: the whole chain. With *holes* the storage below filters and raw images is asked where it has
    holes; formats' own data is not (that would be a system call a cluster).
    """
    end = node.size if length is None else min(node.size, offset + length)
    step = STEP
    pending: Extent | None = None
    while offset < end:
        size = min(step, end - offset)
        found = _resolve(node, offset, size, base, holes)
        for extent in found:
            if pending is None:
                pending = extent
            elif _adjoins(pending, extent):
                pending = pending._replace(length=pending.length + extent.length)
            else:
                yield pending
                pending = extent
        offset += size
        if len(found) < RUNS_FEW:
            step = min(step * 2, STEP_MAX)
        elif len(found) > RUNS_MANY:
            step = max(step // 4, STEP_MIN)
    if pending is not None:
        yield pending


def _adjoins(one: Extent, two: Extent) -> bool:
    return (
        one.kind is two.kind
        and one.kind is not Kind.SPECIAL
        and one.storage is two.storage
        and (one.host < 0 if two.host < 0 else one.host + one.length == two.host)
        and one.depth == two.depth
        and one.allocated == two.allocated
        and one.writable == two.writable
    )


def _resolve(top: Node, offset: int, length: int, base: Node | None, holes: bool) -> list[Extent]:
    result: list[Extent] = []
    missing = [(offset, length)]
    node: Node | None = top
    depth = 0
    while missing:
        assert node is not None
        size = node.size
        absent: list[tuple[int, int]] = []
        below = node.backing
        if below is base:
            below = None
        for start, count in missing:
            inside = max(0, min(count, size - start))
            if inside:
                for run in node.map(start, inside):
                    if run.kind is Kind.UNALLOCATED and below is not None:
                        absent.append((run.offset, run.length))
                    else:
                        result.extend(_leaves(run, depth, node, base, holes))
            if inside < count:  # a backing image that is shorter than its overlay: zeroes from its end on
                result.append(Extent(Kind.ZERO, start + inside, count - inside, None, -1, depth, node, depth == 0))
        missing, node, depth = absent, below, depth + 1
    if len(result) > 1:
        result.sort(key=_by_offset)
    return result


def _by_offset(extent: Extent) -> int:
    return extent.offset


def _leaves(run: Mapping, depth: int, owner: Node, base: Node | None, holes: bool) -> Iterable[Extent]:
    """One run of a node, followed through filters and raw images to where the bytes lie."""
    kind, storage = run.kind, run.storage
    if kind is Kind.UNALLOCATED or kind is Kind.EOF:
        # Host space may be set aside for what was never written (subclusters).
        return (Extent(Kind.ZERO, run.offset, run.length, run.storage, run.host, depth, owner, False),)
    if kind is Kind.DATA and storage is not None and storage is not owner:
        looks_below = owner.transparent and (holes or storage.backing is not None or storage.transparent)
        if looks_below or (holes and owner.sparse):
            # The node below answers for itself, with its own backing chain. Recursion nests as filters do, no deeper.
            delta = run.offset - run.host
            return [
                extent._replace(
                    offset=extent.offset + delta,
                    depth=extent.depth + depth,
                    writable=extent.writable and run.writable,
                )
                for extent in _resolve(storage, run.host, run.length, base, holes)
            ]
        while storage.transparent:  # a format's data: only its place is asked for
            inner = next(iter(storage.map(run.host, run.length)), None)
            if inner is None or inner.kind is not Kind.DATA or inner.length != run.length or inner.storage is None:
                break
            storage = inner.storage
            run = run._replace(storage=storage, host=inner.host)
    return (Extent(kind, run.offset, run.length, run.storage, run.host, depth, owner, True, run.writable, run.token),)


class Step(NamedTuple):
    """One act of a planned read. ``storage`` None: zeroes. ``special``: ask *owner* for the bytes of the run."""

    offset: int
    length: int
    storage: Node | None
    host: int
    owner: FormatNode | None = None
    special: Mapping | None = None


#: A range lock that a plan holds: the node and its ticket.
Lease = tuple["FormatNode", int]


def plan(top: FormatNode, runs: Sequence[Mapping], leases: list[Lease]) -> list[Step]:
    """Resolve *runs*, the answer of *top* for one request, into reads of storage in order of guest offset.

    *top* is locked by the caller; of each format node below, the hull of what is asked of it is locked here once and
    put on *leases*, which the caller gives back when the bytes have been read (also if this raises).
    """
    steps: list[Step] = []
    node = top
    while True:
        missing: list[tuple[int, int]] = []
        below = node.backing
        for run in runs:
            kind = run.kind
            if kind is Kind.DATA:
                steps.append(Step(run.offset, run.length, run.storage, run.host))
            elif kind is Kind.SPECIAL:
                steps.append(Step(run.offset, run.length, None, -1, node, run))
            elif kind is Kind.UNALLOCATED and below is not None:
                missing.append((run.offset, run.length))
            else:
                steps.append(Step(run.offset, run.length, None, -1))
        if not missing or below is None:
            break
        size = below.size
        inside: list[tuple[int, int]] = []
        for start, length in missing:
            count = max(0, min(length, size - start))
            if count:
                inside.append((start, count))
            if count < length:
                steps.append(Step(start + count, length - count, None, -1))
        if not inside:
            break
        lease = below.lease_runs(inside)
        if lease is None:  # not an image with mappings: it reads by itself
            steps.extend([Step(start, count, below, start) for start, count in inside])
            break
        node, ticket, runs = lease
        leases.append((node, ticket))
    if len(steps) > 1:
        steps.sort(key=_step_offset)
        steps = _merge(steps)
    return steps


def _step_offset(step: Step) -> int:
    return step.offset


def _merge(steps: list[Step]) -> list[Step]:
    """Join neighbours that one system call can serve."""
    merged = [steps[0]]
    for step in steps[1:]:
        last = merged[-1]
        if (
            last.special is None
            and step.special is None
            and last.storage is step.storage
            and (step.storage is None or last.host + last.length == step.host)
        ):
            merged[-1] = last._replace(length=last.length + step.length)
        else:
            merged.append(step)
    return merged
