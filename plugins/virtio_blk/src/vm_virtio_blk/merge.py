"""Joining neighbours: reads or writes of one batch that follow each other on the disk become one host I/O.

Guests send such runs when they cut a large transfer to what the device takes, or have no scheduler of their own. Only
requests that arrive in order are joined; nothing is sorted, held back or reordered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vm_core.block.request import Op, Request

#: Bytes and buffers of a joined request; the second is what the host takes in one vector (IOV_MAX).
MAX_LENGTH = 2 << 20
MAX_BUFFERS = 1024


def merge(batch: list[Request], done: Callable[[Request], None]) -> list[Request]:
    """*batch* with runs joined. A joined request lists its parts in ``opaque`` and calls *done*."""
    result: list[Request] = []
    run: list[Request] = []
    end = -1
    length = buffers = 0

    for request in batch:
        op = request.op
        if (
            request.offset == end
            and op is run[0].op
            and length + request.length <= MAX_LENGTH
            and buffers + len(request.buffers) <= MAX_BUFFERS
        ):
            run.append(request)
        else:
            if run:
                result.append(run[0] if len(run) == 1 else _join(run, done))
            run = [request]
            length = buffers = 0
        length += request.length
        buffers += len(request.buffers)
        # Only transfers have a successor: the end of anything else is nowhere.
        end = request.offset + request.length if op is Op.READ or op is Op.WRITE else -1
    result.append(run[0] if len(run) == 1 else _join(run, done))
    return result


def _join(run: list[Request], done: Callable[[Request], None]) -> Request:
    first = run[0]
    buffers: list[Any] = []
    guest: list[tuple[int, int]] = []
    for part in run:
        buffers += part.buffers
        guest += part.guest
    length = run[-1].offset + run[-1].length - first.offset
    return Request(first.op, first.offset, length, buffers, guest=guest, done=done, opaque=run)
