"""dd: copy a range of an image to the beginning of another, zeroes included."""

from __future__ import annotations

from ...errors import VmError
from ..node import Node
from ..raw import RawNode
from .convert import ConvertOptions, CopyError, convert
from .job import Job


def dd(source: Node, target: Node, start: int, length: int, *, job: Job | None = None, workers: int = 8) -> None:
    """Copy *length* bytes of *source* from *start* on to the beginning of *target*, which is at least as long.

    Every byte is written. Raises VmError that says which side failed, Cancelled.
    """
    if not length:
        return
    window = RawNode(source, offset=start, size=length, readonly=True)
    try:
        convert([window], target, ConvertOptions(sparse=0, workers=workers), job=job)
    except CopyError as error:
        side = "reading from input" if error.what == "reading" else "writing to output"
        raise VmError(f"error while {side} image file: {error.text}") from error
