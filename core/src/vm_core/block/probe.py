"""Which format an image is of: the signatures and probe functions of all installed format drivers, by score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, cast

from ..references import load_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..descriptors import FormatDriver, Signature
    from .node import Node

#: Bytes from the start of a file that formats are recognised by, and from the end those with a footer.
HEAD = 64 * 1024
TAIL = 64 * 1024
#: The score of a driver that is as sure as can be.
CERTAIN = 100


def format_drivers() -> Sequence[FormatDriver]:
    """Every healthy format driver."""
    from ..plugins import drivers

    return cast("list[FormatDriver]", drivers("format"))


@cache
def _function(reference: str) -> Callable[[bytes, int, str], int]:
    function: Callable[[bytes, int, str], int] = load_reference(reference)
    return function


def score(driver: FormatDriver, head: bytes, tail: bytes, size: int, filename: str) -> int:
    """How sure *driver* is that an image of *size* bytes that begins with *head* and ends with *tail* is its own."""
    return max(look(driver, head, tail, size, filename) for look in (signature_score, function_score))


def signature_score(driver: FormatDriver, head: bytes, tail: bytes, size: int, filename: str) -> int:
    """The score by the driver's signatures alone."""
    scores = [mark.score for mark in driver.signatures if mark.score > 0 and _matches(mark, head, tail)]
    return max(scores, default=0)


def function_score(driver: FormatDriver, head: bytes, tail: bytes, size: int, filename: str) -> int:
    """The score by the driver's own function, 0 without one."""
    return 0 if driver.probe is None else _function(driver.probe)(head, size, filename)


def _matches(mark: Signature, head: bytes, tail: bytes) -> bool:
    if mark.offset >= 0:
        return head.startswith(mark.magic, mark.offset)
    start = len(tail) + mark.offset
    return start >= 0 and tail.startswith(mark.magic, start)


def guess(head: bytes, tail: bytes, size: int, filename: str = "") -> str:
    """The name of the format with the highest score, ``raw`` where no driver has any.

    A well-known format that no installed driver reads is named too.
    """
    best, name = 0, "raw"
    # What can be told by signatures alone needs no driver's code.
    for look in (signature_score, function_score):
        for driver in format_drivers():
            found = look(driver, head, tail, size, filename)
            if found > best:
                best, name = found, driver.name
        if best >= CERTAIN:
            break
    if name == "raw":
        from ..known_drivers import KNOWN_SIGNATURES

        installed = {driver.name for driver in format_drivers()}
        marks = ((format, head.startswith(magic, offset)) for offset, magic, format in KNOWN_SIGNATURES)
        name = next((format for format, found in marks if found and format not in installed), name)
    return name


def probe(file: Node) -> str:
    """The name of the format of the image in *file*."""
    size = file.size
    head = file.pread(0, min(size, HEAD))
    if size <= HEAD:
        tail = head[-TAIL:]
    elif any(mark.offset < 0 for driver in format_drivers() for mark in driver.signatures):
        tail = file.pread(size - TAIL, TAIL)
    else:
        tail = b""
    return guess(head, tail, size, file.filename)
