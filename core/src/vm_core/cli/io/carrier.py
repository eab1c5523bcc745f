"""Reads and writes through the host-I/O engine that was asked for (``-i``, ``-k``, the file option ``aio``).

Each call submits one request and waits for it; asynchronous commands make theirs on threads of their own
(:mod:`.aio`), so that the engine has many at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from ...block.backend import BlockBackend
from ...block.request import Op, Request
from ...errors import BlockError

if TYPE_CHECKING:
    from ...block.node import Node


class Carrier:
    """An image behind an engine."""

    def __init__(self, node: Node, engine: str) -> None:
        """Starts the *engine*. Raises PluginError, UsageError where it cannot be had."""
        self._backend = BlockBackend(node, engine=engine, werror="report")
        self._backend.start()

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """As of a node."""
        self._carry(Request(Op.READ, offset, sum([buffer.nbytes for buffer in buffers]), buffers))

    def write(self, offset: int, buffers: Sequence[memoryview], *, fua: bool = False) -> None:
        """As of a node."""
        self._carry(Request(Op.WRITE, offset, sum([buffer.nbytes for buffer in buffers]), buffers, fua=fua))

    def _carry(self, request: Request) -> None:
        lock = Lock()
        lock.acquire()
        request.done = lambda _: lock.release()
        self._backend.submit([request])
        with lock:
            pass
        if request.status:
            if self._backend.fatal is not None:
                raise self._backend.fatal
            raise BlockError.of(request.status)

    def close(self) -> None:
        """End the engine. The image stays open."""
        self._backend.close(keep_medium=True)
