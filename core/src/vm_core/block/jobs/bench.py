"""Bench: many equal requests against one image, several at a time, through a backend and its engine."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import NamedTuple

from ...errors import BlockError
from ..backend import BlockBackend
from ..cache import WRITEBACK, CacheMode
from ..node import Node
from ..request import Op, Request
from .job import Job

#: Threads at most, for the engine that has any.
WORKERS = 16


class Load(NamedTuple):
    """What to send: *requests* of *size* bytes, *depth* at a time, each *step* bytes behind the last."""

    requests: int
    depth: int
    offset: int
    size: int
    step: int
    write: bool = False
    #: The byte that is written.
    pattern: int = 0
    #: A flush after this many writes; 0: none.
    flush_interval: int = 0
    #: A flush waits for the writes before it to be done, and those after it for the flush.
    drain: bool = True


class Bench:
    """One run: the backend, and the requests that are not in flight."""

    def __init__(
        self, node: Node, load: Load, *, engine: str = "threads", cache: CacheMode = WRITEBACK, job: Job | None = None
    ) -> None:
        """Starts the *engine*. Raises PluginError, UsageError where it cannot be had."""
        self._load = load
        self._job = job or Job()
        self._size = node.size
        depth = max(1, min(load.depth, load.requests))
        options = {"workers": min(depth, WORKERS)} if engine == "threads" else None
        self._backend = BlockBackend(node, cache=cache, engine=engine, engine_options=options, werror="report")
        self._finished: list[Request] = []
        self._attended = self._backend.attend()
        if self._attended:
            self._backend.set_completion_sink(self._finished.extend)
            self._wait: Callable[[], None] = self._backend.poll
        else:
            from queue import SimpleQueue

            batches: SimpleQueue[list[Request]] = SimpleQueue()
            self._backend.set_completion_sink(batches.put)

            def wait() -> None:
                self._finished += batches.get()
                while not batches.empty():
                    self._finished += batches.get()

            self._wait = wait
        # Pages of their own, as O_DIRECT wants them; those that nobody touches cost nothing.
        room = -(-load.size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = memoryview(mmap.mmap(-1, depth * room))
        if load.write and load.pattern:
            piece = bytes([load.pattern]) * room
            for start in range(0, depth * room, room):
                memory[start : start + room] = piece
        op = Op.WRITE if load.write else Op.READ
        self._idle = [
            Request(op, 0, load.size, (memory[start : start + load.size],)) for start in range(0, depth * room, room)
        ]
        self._position = load.offset

    def run(self) -> None:
        """Send everything; past the image's end positions begin again. Raises BlockError, Cancelled."""
        load = self._load
        interval = load.flush_interval
        self._job.start(load.requests)
        if interval and load.drain:
            for first in range(0, load.requests, interval):
                self._send(min(interval, load.requests - first))
                self._flush()
        else:
            self._send(load.requests, interval)
            if interval:
                self._flush()
        self._job.finish()

    def _send(self, count: int, interval: int = 0) -> None:
        """Send *count* requests, and a flush with each *interval* of them. Returns when all have finished."""
        load, idle, backend, finished = self._load, self._idle, self._backend, self._finished
        size, step = self._size, load.step
        position = self._position
        sent = done = flushes = 0
        while done < count:
            if idle and sent < count:
                batch: list[Request] = []
                take = min(len(idle), count - sent)
                if interval:
                    take = min(take, interval - sent % interval)
                for request in idle[-take:]:
                    request.offset = position
                    batch.append(request)
                    position += step
                    if position >= size:
                        position = position % size if size else 0
                del idle[-take:]
                sent += take
                if interval and not sent % interval:
                    batch.append(Request(Op.FLUSH))
                    flushes += 1
                backend.submit(batch)
            if not finished:
                self._wait()
            returned = finished[:]
            finished.clear()
            for request in returned:
                self._check(request)
                if request.op is Op.FLUSH:
                    flushes -= 1
                else:
                    idle.append(request)
                    done += 1
            self._job.advance(len(returned))
        while flushes:
            if not finished:
                self._wait()
            for request in finished:
                self._check(request)
                flushes -= 1
            finished.clear()
        self._position = position

    def _flush(self) -> None:
        self._backend.submit([Request(Op.FLUSH)])
        while not self._finished:
            self._wait()
        self._check(self._finished.pop())

    def _check(self, request: Request) -> None:
        if request.status:
            raise self._backend.fatal or BlockError.of(request.status)

    def close(self) -> None:
        """End the engine. The image stays open."""
        self._backend.close(keep_medium=True)


def bench(
    node: Node, load: Load, *, engine: str = "threads", cache: CacheMode = WRITEBACK, job: Job | None = None
) -> None:
    """Send the whole *load*. Raises BlockError, Cancelled, and what :class:`Bench` does."""
    run = Bench(node, load, engine=engine, cache=cache, job=job)
    try:
        run.run()
    finally:
        run.close()
