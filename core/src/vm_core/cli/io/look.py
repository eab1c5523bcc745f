"""The commands that look at the image: its length, what is allocated, and what its format has to say."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...block.mapping import Kind
from ...block.raw import RawNode
from .texts import BadNumberError, human, parse_size

if TYPE_CHECKING:
    from ...block.node import Node
    from .session import Session


def length(session: Session, words: Sequence[str]) -> int:
    """``length``."""
    if session.empty:
        session.out.write(f"getlength: {os.strerror(errno.ENOMEDIUM)}\n")
        return 1
    session.out.write(f"{human(session.size)}\n")
    return 0


def allocated(node: Node, offset: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """Runs of *node* alone, without its backing images: offset, length, and whether it says what is there.

    Of raw images and filters the node below says so. The part of the last sector behind the end is like the end.
    """
    shift = 0
    while node.transparent and node.children():
        shift += node.offset if isinstance(node, RawNode) else 0
        node = next(iter(node.children().values()))
    start, length, said = offset, 0, True
    for run in node.map(offset + shift, size):
        if run.kind is Kind.EOF:
            break
        says = run.kind is not Kind.UNALLOCATED
        if length and says != said:
            yield start, length, said
            start, length = start + length, 0
        said = says
        length += run.length
    if start < offset + size:
        yield start, offset + size - start, said


def alloc(session: Session, words: Sequence[str]) -> int:
    """``alloc``: how much of a range the image itself holds."""
    try:
        offset = parse_size(words[1], session.program)
        count = parse_size(words[2], session.program) if len(words) == 3 else 512
    except BadNumberError as error:
        session.out.write(f"{error}\n")
        return 1
    end = min(offset + count, session.size)
    if offset + count > end:
        count = max(0, end - offset)
    found = sum(size for _, size, said in allocated(session.image, offset, count) if said) if count else 0
    session.out.write(f"{found}/{count} bytes allocated at offset {human(offset)}\n")
    return 0


def show_map(session: Session, words: Sequence[str]) -> int:
    """``map``: all runs of the image."""
    if session.empty:
        session.tool.error(f"Failed to query image length: {os.strerror(errno.ENOMEDIUM)}")
        return 1
    if session.size:
        for offset, size, said in allocated(session.image, 0, session.size):
            text = "    allocated" if said else "not allocated"
            session.out.write(f"{human(size)} ({size:#x}) bytes {text} at offset {human(offset)} ({offset:#x})\n")
    return 0


def info(session: Session, words: Sequence[str]) -> int:
    """``info``: the format, its clusters, and its own facts."""
    from ...block.filter import Filter
    from .vmstate import state_offset

    node = session.image
    session.out.write(f"format name: {node.driver}\n")
    if node.is_protocol:  # its name as a protocol
        session.out.write(f"format name: {node.driver}\n")
    if session.empty:
        return 1
    below = node
    try:
        facts = node.info()
        while below.transparent and below.children():
            below = next(iter(below.children().values()))
            below.info()
    except OSError:  # somebody knows nothing at all
        return 1
    below = node
    while isinstance(below, Filter):
        below = below.file
    cluster = below.cluster_size if below.cluster_size > 1 and not below.transparent else 0
    session.out.write(f"cluster size: {human(cluster)}\n")
    session.out.write(f"vm state offset: {human(state_offset(node))}\n")
    if facts:
        from ..facts import lines

        session.out.write("Format specific information:\n")
        session.out.write("".join(lines(facts, 1)))
    return 0
