"""A backend over bytes, for tests of device frontends: it answers when the test says so."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from ..block.request import Op, Request
from ..errors import FatalError


class MemoryBackend:
    """What a frontend uses of a :class:`vm_core.block.backend.BlockBackend`, on a bytearray.

    Requests wait in :attr:`pending` until :meth:`run`. :attr:`stable` is what would survive a power cut: writes get
    there by a flush, or at once while the write cache is off. Set :attr:`fail` to an errno to fail every request.
    """

    def __init__(self, size: int, *, readonly: bool = False, write_cache: bool = True) -> None:
        self.data = bytearray(size)
        self.stable = bytearray(size)
        self.readonly = readonly
        self.write_cache = write_cache
        self.name = "test"
        self.pending: list[Request] = []
        #: Every request ever submitted, as (op, offset, length, unmap), and the size of each batch.
        self.log: list[tuple[Op, int, int, bool]] = []
        self.batches: list[int] = []
        self.fail: int | None = None
        #: Answer before :meth:`submit` returns.
        self.immediate = False
        #: Positions that cannot be read or written.
        self.bad = range(0)
        self.on_error: list[Callable[[Request, str], None]] = []
        self.on_fatal: list[Callable[[FatalError], None]] = []
        self.on_resize: list[Callable[[int], None]] = []
        self._sink: Callable[[list[Request]], None] | None = None

    @property
    def size(self) -> int:
        return len(self.data)

    def resize(self, size: int) -> None:
        """Change the size and tell the device."""
        self.data[size:] = bytes(max(0, size - len(self.data)))
        self.stable[size:] = bytes(max(0, size - len(self.stable)))
        for listener in self.on_resize:
            listener(size)

    def submit(self, requests: Sequence[Request]) -> None:
        self.batches.append(len(requests))
        self.log += [(r.op, r.offset, r.length, r.unmap) for r in requests]
        self.pending += requests
        if self.immediate:
            self.run()

    def set_completion_sink(self, sink: Callable[[list[Request]], None]) -> None:
        """Give answered batches to *sink*, in place of calling each request's ``done``."""
        self._sink = sink

    def set_write_cache(self, enabled: bool, done: Callable[[Request], None] | None = None) -> None:
        """Switch the write cache; what is submitted later obeys."""
        self.write_cache = enabled
        self.stable[:] = self.data
        if done is not None:
            done(Request(Op.FLUSH))

    def cancel_stopped(self) -> list[Request]:
        """There is no retry here."""
        return []

    def run(self, *, backwards: bool = False) -> bool:
        """Execute and answer what is pending; False if nothing was."""
        batch, self.pending = self.pending, []
        for request in batch:
            request.status = self._execute(request)
        if backwards:
            batch.reverse()
        if batch and self._sink is not None:
            self._sink(batch)
        else:
            for request in batch:
                if request.done is not None:
                    request.done(request)
        return bool(batch)

    def drain(self) -> None:
        self.run()

    def _execute(self, request: Request) -> int:
        if self.fail is not None:
            return self.fail
        at, end = request.offset, request.offset + request.length
        if end > len(self.data):
            return errno.EINVAL
        if at < self.bad.stop and end > self.bad.start:
            return errno.EIO
        if request.op is Op.READ:
            for view in request.buffers:
                view[:] = self.data[at : at + len(view)]
                at += len(view)
            return 0
        if request.op is Op.FLUSH:
            self.stable[:] = self.data
            return 0
        if self.readonly:
            return errno.EACCES
        if request.op is Op.WRITE:
            self.data[at:end] = b"".join(request.buffers)
        elif request.op is Op.ZERO:
            self.data[at:end] = bytes(request.length)
        if request.fua or not self.write_cache:
            self.stable[at:end] = self.data[at:end]
        return 0
