"""Requests: what a frontend hands to a backend, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from .node import Buffer


class Op(IntEnum):
    """What is asked."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZERO = 4


class Request:
    """One operation on a backend. Positions are bytes.

    For READ and WRITE *length* is the sum of the *buffers*, which are views of guest memory. *guest* lists the
    (guest-physical address, length) pairs of the buffers of a READ, so that an accelerator can be told which code may
    have changed. When the request is complete *status* holds 0 or a positive errno, and *done* is called with the
    request: on the machine's I/O thread, without the device lock; in tests wherever the backend's completion runs.
    """

    __slots__ = ("buffers", "done", "fua", "guest", "length", "offset", "op", "opaque", "status", "unmap")

    def __init__(
        self,
        op: Op,
        offset: int = 0,
        length: int = 0,
        buffers: Sequence[Buffer] = (),
        *,
        fua: bool = False,
        unmap: bool = False,
        guest: Sequence[tuple[int, int]] = (),
        done: Callable[[Request], None] | None = None,
        opaque: Any = None,
    ) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.buffers = buffers
        self.fua = fua
        self.unmap = unmap
        self.guest = guest
        self.done = done
        self.status = 0
        self.opaque = opaque

    def __repr__(self) -> str:
        return f"<Request {self.op.name} {self.offset:#x}+{self.length:#x} status={self.status}>"
