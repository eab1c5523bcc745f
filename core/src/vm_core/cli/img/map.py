"""``map``: where an image's bytes are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .common import Failure, Tool, need_medium

if TYPE_CHECKING:
    from ...block.mapping import Mapping
    from ...block.node import Node

_LONG = {
    "help": "h",
    "format:": "f",
    "output:": "output",
    "object:": "object",
    "image-opts": "image-opts",
    "force-share": "U",
    "start-offset:": "s",
    "max-length:": "l",
}


class Entry(NamedTuple):
    """QEMU's MapEntry. *host* is -1 where there is none; *file* names what it is in."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    host: int
    file: str


def run(args: list[str], tool: Tool) -> int:
    """``map [-f FMT] [--start-offset=N] [--max-length=N] [--output=OFMT] [-U] FILE``."""
    format, image_opts, share, output, start, limit = None, False, False, None, 0, -1
    options = tool.options(args, "f:s:l:hU", _LONG)
    for key, value in options:
        if key == "f":
            format = value
        elif key == "U":
            share = True
        elif key == "output":
            output = value
        elif key == "s":
            start = tool.size(value, "start offset")
        elif key == "l":
            limit = tool.size(value, "max length")
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    as_json = tool.output(output) if output is not None else False
    from ...block.medium import present
    from ...block.node import sectors_up

    with tool.open(options.rest[0], image_opts=image_opts, format=format, share=share) as node:
        if not as_json:
            print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        elif tool.peer and not present(node):
            sys.stdout.write("[")
        need_medium(node, f"Failed to get size for '{options.rest[0]}'", why=False)
        end = sectors_up(node.size)
        if limit >= 0:
            end = min(end, start + limit)
        if as_json:
            _print_json(entries(node, start, end, plain=tool.peer))
        else:
            _print(entries(node, start, end, plain=tool.peer))
    return 0


def _print(found: Iterator[Entry]) -> None:
    for one in found:
        if one.data and one.host < 0:
            raise Failure("File contains external, encrypted or compressed clusters.")
        if one.data and not one.zero:
            sys.stdout.write(f"{_hex(one.start):<16}{_hex(one.length):<16}{_hex(one.host):<16}{one.file}\n")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _print_json(found: Iterator[Entry]) -> None:
    words = ("false", "true")
    separator = "["
    for one in found:
        offset = f', "offset": {one.host}' if one.host >= 0 else ""
        sys.stdout.write(
            f'{separator}{{ "start": {one.start}, "length": {one.length}, "depth": {one.depth}, '
            f'"present": {words[one.present]}, "zero": {words[one.zero]}, "data": {words[one.data]}{offset}}}'
        )
        separator = ",\n"
    sys.stdout.write("]\n")


def entries(node: Node, start: int, end: int, *, plain: bool = False) -> Iterator[Entry]:
    """The map of the range, neighbours that go on in each other joined; *plain*: no more than the peer knows."""
    if plain and not _peer_maps(node):
        yield Entry(start, max(0, end - start), 0, True, False, True, -1, "")
        return
    pending: Entry | None = None
    for one in _resolve(node, start, end, 0):
        if pending is not None and _joins(pending, one):
            pending = pending._replace(length=pending.length + one.length)
            continue
        if pending is not None:
            yield pending
        pending = one
    if pending is None:
        pending = Entry(start, 0, 0, False, False, False, -1, "")
    yield pending


def _joins(one: Entry, two: Entry) -> bool:
    return (
        one.data is two.data
        and (two.host < 0 if one.host < 0 else one.host + one.length == two.host)
        and one[2:6] == two[2:6]
        and one.file == two.file
    )


def _peer_maps(node: Node) -> bool:
    from ...block.formatnode import FormatNode

    return not isinstance(node, FormatNode) or node.format.peer_maps


def _resolve(node: Node, start: int, end: int, depth: int) -> Iterator[Entry]:
    """Entries of the range, from *node* and what is below it."""
    from ...block.mapping import Kind
    from ...block.node import sectors_up

    below = node.backing
    below_end = sectors_up(below.size) if below is not None else 0
    stop = min(end, node.size)
    position = start
    storage, here, name = None, False, ""
    if start < stop:
        for run in node.map(start, stop - start):
            length = run.length
            position = run.offset + length
            kind = run.kind
            if kind is Kind.DATA or kind is Kind.SPECIAL:
                host, file, zero = -1, "", False
                if kind is Kind.DATA and run.storage is not None:
                    if run.storage is not storage:
                        storage = run.storage
                        # Most data of formats: only its place is asked for.
                        here = not (node.transparent or node.sparse or storage.transparent or storage.opaque)
                        name = storage.filename
                    if here:
                        yield Entry(run.offset, length, depth, True, False, True, run.host, name)
                        continue
                    yield from _stored(run.storage, node, run.offset, length, run.host, depth)
                    continue
                yield Entry(run.offset, length, depth, True, zero, True, host, file)
            elif kind is Kind.ZERO:
                host = run.host if run.storage is not None else -1
                file = run.storage.filename if run.storage is not None and host >= 0 else ""
                yield Entry(run.offset, length, depth, True, True, False, host, file)
            else:
                inside = max(0, min(length, below_end - run.offset))
                if below is not None and inside:
                    yield from _resolve(below, run.offset, run.offset + inside, depth + 1)
                if inside < length:
                    # Space may be set aside for what was never written (a cluster of which other parts are in use).
                    host = run.host + inside if run.storage is not None and run.host >= 0 else -1
                    file = run.storage.filename if run.storage is not None and host >= 0 else ""
                    yield Entry(run.offset + inside, length - inside, depth, False, True, False, host, file)
    if position < end and position >= start:
        # The last sector counts whole; what a file lacks of it reads as zeroes.
        tail = next(node.map(node.size - 1, 1), None) if node.transparent and node.size else None
        host, file, data = -1, "", False
        if tail is not None and tail.storage is not None:
            host, file = tail.host + 1, tail.storage.filename
            # Where only whole blocks are read, the last one is data to its end.
            data = tail.storage.request_alignment > 1 and _is_data(tail)
        yield Entry(position, end - position, depth, True, not data, data, host, file)


def _is_data(run: Mapping) -> bool:
    """Whether the beginning of *run* is data all the way down to the host."""
    from ...block.mapping import Kind

    inner: Mapping | None = run
    while inner is not None and inner.kind is Kind.DATA and inner.storage is not None:
        storage = inner.storage
        inner = next(iter(storage.map(inner.host, 1)), None)
        if inner is not None and inner.storage is storage:
            break
    return inner is not None and inner.kind is Kind.DATA


def _stored(storage: Node, owner: Node, offset: int, length: int, host: int, depth: int) -> Iterator[Entry]:
    """DATA of *owner*: in place, or for raw images and filters what the storage says."""
    from ...block.mapping import Kind

    if not owner.transparent:
        while storage.transparent:
            inner = next(iter(storage.map(host, length)), None)
            if inner is None or inner.storage is None or inner.length < length:
                break
            storage, host = inner.storage, inner.host
        if storage.opaque:
            host = -1
        if owner.sparse and host >= 0:
            # Set aside, and a hole where nobody has written.
            for run in storage.map(host, length):
                start = offset + run.offset - host
                zero = run.kind is not Kind.DATA
                yield Entry(start, run.length, depth, True, zero, True, run.offset, storage.filename)
            return
        yield Entry(offset, length, depth, True, False, True, host, storage.filename if host >= 0 else "")
        return
    delta = offset - host
    for one in _resolve(storage, host, host + length, depth) if storage.transparent or storage.backing else ():
        yield one._replace(start=one.start + delta)
    if storage.transparent or storage.backing:
        return
    for run in storage.map(host, length):
        span = run.length
        if run.kind is Kind.DATA:
            place = -1 if storage.opaque else run.offset
            yield Entry(run.offset + delta, span, depth, True, False, True, place, storage.filename)
        elif run.kind is Kind.SPECIAL:
            yield Entry(run.offset + delta, span, depth, True, False, True, -1, "")
        elif run.kind is Kind.UNALLOCATED:
            yield Entry(run.offset + delta, span, depth, False, True, False, -1, "")
        elif run.kind is not Kind.EOF:
            place = -1 if storage.opaque or storage.backing is not None else run.offset
            yield Entry(run.offset + delta, span, depth, True, True, False, place, storage.filename)
