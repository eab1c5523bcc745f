"""What a device or a tool holds of a disk: a medium, its cache mode, its error policy, its counters, its engine.

Requests are submitted in batches, carried out by the engine and handed back in batches. They are not ordered among each
other, except that a flush covers everything that was completed before it was submitted – the rules of a disk with a
volatile write cache.

With the write cache off, which is what cache modes ``writethrough`` and ``directsync`` start with and what a guest may
choose at run time, every change is stable before it completes.

A failed request goes the way of the policy ``rerror`` (reads) or ``werror`` (everything else): ``report`` it to the
guest, ``ignore`` it, ``stop`` the machine and keep the request for :meth:`BlockBackend.retry`, or ``enospc``: stop
where the host's disk is full, else report.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from threading import Condition, Lock
from typing import Any

from ..errors import BlockError, FatalError, UsageError
from .cache import WRITEBACK, CacheMode
from .engine import Engine
from .node import Node, sectors_up
from .passage import Hold, Passage, Span, release
from .request import Op, Request

READ_POLICIES = ("report", "ignore", "stop")
WRITE_POLICIES = ("report", "ignore", "stop", "enospc")

Sink = Callable[[list[Request]], None]


class Stats:
    """Counters of completed requests; plain attributes, cheap to read at any time. Bytes and numbers of requests."""

    __slots__ = (
        "discarded_bytes",
        "discards",
        "failed_flushes",
        "failed_others",
        "failed_reads",
        "failed_writes",
        "flushes",
        "read_bytes",
        "reads",
        "writes",
        "written_bytes",
        "zeroed_bytes",
        "zeroes",
    )

    def __init__(self) -> None:
        self.reads = self.writes = self.flushes = self.discards = self.zeroes = 0
        self.read_bytes = self.written_bytes = self.discarded_bytes = self.zeroed_bytes = 0
        self.failed_reads = self.failed_writes = self.failed_flushes = self.failed_others = 0

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}

    def count(self, request: Request) -> None:
        """Add a completed request."""
        op, failed = request.op, request.status != 0
        if op is Op.READ:
            if failed:
                self.failed_reads += 1
            else:
                self.reads += 1
                self.read_bytes += request.length
        elif op is Op.WRITE:
            if failed:
                self.failed_writes += 1
            else:
                self.writes += 1
                self.written_bytes += request.length
        elif op is Op.FLUSH:
            if failed:
                self.failed_flushes += 1
            else:
                self.flushes += 1
        elif failed:
            self.failed_others += 1
        elif op is Op.DISCARD:
            self.discards += 1
            self.discarded_bytes += request.length
        else:
            self.zeroes += 1
            self.zeroed_bytes += request.length


class BlockBackend:
    """A disk as a frontend sees it. Methods may be called from any thread unless they say otherwise."""

    def __init__(
        self,
        node: Node | None,
        *,
        name: str = "",
        cache: CacheMode = WRITEBACK,
        engine: str = "threads",
        rerror: str = "report",
        werror: str = "enospc",
        readonly: bool = False,
        removable: bool = False,
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        """*node* None: a drive without medium. The backend closes the node with itself.

        *engine* is a driver of kind ``engine``, loaded when requests are first submitted. Raises UsageError for unknown
        policies.
        """
        if rerror not in READ_POLICIES:
            raise UsageError(f"rerror={rerror}: one of {', '.join(READ_POLICIES)} is needed")
        if werror not in WRITE_POLICIES:
            raise UsageError(f"werror={werror}: one of {', '.join(WRITE_POLICIES)} is needed")
        self.name = name
        self.cache = cache
        self.rerror = rerror
        self.werror = werror
        self.removable = removable
        self.stats = Stats()
        #: Called with the new size in bytes.
        self.on_resize: list[Callable[[int], None]] = []
        #: Called with True when a medium was put in, False when it was taken out.
        self.on_medium_change: list[Callable[[bool], None]] = []
        #: Called with a failed request and what is done about it (report, ignore, stop), on a worker thread.
        self.on_error: list[Callable[[Request, str], None]] = []
        #: Called with what ends everything, on a worker thread. The requests fail with EIO.
        self.on_fatal: list[Callable[[FatalError], None]] = []
        #: What did so first.
        self.fatal: FatalError | None = None
        self._readonly = readonly
        self._node = node
        self._write_cache = not cache.writethrough
        self._engine_name = engine
        self._engine_options = dict(engine_options or {})
        self._engine: Engine | None = None
        self._sink: Sink | None = None
        self._lock = Lock()
        self._quiet = Condition(self._lock)
        self._inflight = 0
        self._stopped: list[Request] = []
        self._tray_open = False
        self._locked = False
        self._closed = False
        self._attended = False

    # The medium

    @property
    def node(self) -> Node | None:
        """The medium, None where there is none."""
        return self._node

    @property
    def size(self) -> int:
        """Bytes of the medium, 0 without one: whole sectors, as in QEMU. The rest of the last one reads as zeroes."""
        node = self._node
        if node is None:
            return 0
        if self.removable:
            from .medium import present

            if not present(node):  # a drive of the host that is empty
                return 0
        return sectors_up(node.size)

    @property
    def readonly(self) -> bool:
        """Whether writes are refused: asked for, or because the medium allows none."""
        node = self._node
        return self._readonly or (node is not None and node.readonly)

    @property
    def tray_open(self) -> bool:
        return self._tray_open

    @property
    def locked(self) -> bool:
        """Whether the guest forbids that the medium is taken out (PREVENT MEDIUM REMOVAL)."""
        return self._locked

    @locked.setter
    def locked(self, value: bool) -> None:
        self._locked = value

    def set_medium(self, node: Node | None) -> Node | None:
        """Put *node* in (None: take the medium out) and return what was in, which is the caller's from now on.

        Waits until nothing is in flight and flushes. Raises UsageError for a drive that is not removable and has one.
        """
        if not self.removable and self._node is not None:
            raise UsageError(f"{self.name or 'the drive'} is not removable")
        self.drain()
        former = self._node
        if former is not None and not former.readonly:
            former.flush()
        self._node = node
        if node is not None:
            self._tray_open = False
        for listener in list(self.on_medium_change):
            listener(node is not None)
        return former

    def eject(self, *, force: bool = False) -> Node | None:
        """Open the tray and give the medium out. Raises UsageError where the guest has locked it and not *force*."""
        if self._locked and not force:
            raise UsageError(f"{self.name or 'the drive'} is locked by the guest; force=on opens it")
        former = self.set_medium(None)
        self._tray_open = True
        return former

    def move_tray(self, *, is_open: bool) -> None:
        """The guest opens or closes the tray; a medium stays in it."""
        self._tray_open = is_open

    def resize(self, size: int) -> None:
        """Change the medium's size and tell the device."""
        self._medium().truncate(size)
        self.resized()

    def resized(self) -> None:
        """The medium's size has changed: tell the device."""
        size = self.size
        for listener in list(self.on_resize):
            listener(size)

    # The write cache

    @property
    def write_cache(self) -> bool:
        """Whether the guest has a volatile write cache, so that it must flush."""
        return self._write_cache

    @write_cache.setter
    def write_cache(self, enabled: bool) -> None:
        """Switching it off flushes what it held before this returns; blocks on host I/O."""
        was, self._write_cache = self._write_cache, enabled
        if was and not enabled:
            self.flush()

    def set_write_cache(self, enabled: bool, done: Callable[[Request], None] | None = None) -> None:
        """Switch the write cache without blocking, for devices: *done* is called with the flush that belongs to it.

        Later writes are stable at once; earlier ones when *done* is called (also where no flush was needed).
        """
        self._write_cache = enabled
        self.submit([Request(Op.FLUSH, done=done)])

    # Requests in batches

    def set_completion_sink(self, sink: Sink | None) -> None:
        """Where completed requests go, in batches, on whatever thread completed them. None: each one's ``done``."""
        self._sink = sink

    def submit(self, requests: Sequence[Request]) -> None:
        """Take over a batch. Never blocks on host I/O; may complete requests before it returns."""
        if not requests:
            return
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.name or 'the drive'} is closed")
            self._inflight += len(requests)
            engine = self._engine
        if engine is None:
            engine = self._start_engine()
        node = self._node
        if node is not None and not self._stopped and node.request_alignment == 1:
            # What is in the page cache costs less to copy than to hand over.
            slow: list[Request] = []
            done: list[Request] = []
            for request in requests:
                if request.op is Op.READ and node.read_nowait(request.offset, request.buffers):
                    request.status = 0
                    done.append(request)
                else:
                    slow.append(request)
            if slow:
                engine.submit(slow)
            if done:
                self.complete(done)
        else:
            engine.submit(requests)

    def _start_engine(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._engine = make_engine(self._engine_name, self, self._engine_options)
            return self._engine

    def start(self) -> None:
        """Start the engine now, not at the first request. Raises PluginError, UsageError where it cannot be had."""
        self._start_engine()

    def attend(self) -> bool:
        """The calling thread alone will submit, and hand completions back by :meth:`poll`: see :meth:`Engine.attend`.

        False: this engine does not do that, completions come on its threads.
        """
        self._attended = self._start_engine().attend()
        return self._attended

    def poll(self) -> None:
        """Wait until a request is complete, and hand back all that are. Only after :meth:`attend` said so."""
        if self._inflight:
            self._start_engine().poll()

    def passage(self, request: Request) -> Passage | None:
        """Where on the host an engine moves the bytes of *request*; None: that is for :meth:`execute` to do."""
        node, offset, length = self._node, request.offset, request.length
        if node is None or not length or offset < 0 or (node.is_protocol and offset + length > node.size):
            return None
        write = request.op is Op.WRITE
        stable = write and (request.fua or not self._write_cache) and not self.cache.no_flush
        if write and self._readonly:
            return None
        spans: list[Span] = []
        holds: list[Hold] = []
        if node.host_spans(offset, length, spans, holds, write=write, stable=stable):
            return Passage(spans, holds, write, stable)
        release(holds)
        return None

    def execute(self, request: Request) -> None:
        """Carry *request* out on this thread and set its status. Never raises."""
        try:
            self._execute(request)
            request.status = 0
        except OSError as error:
            request.status = error.errno or errno.EIO
        except MemoryError:
            request.status = errno.ENOMEM
        except FatalError as fatal:
            request.status = errno.EIO
            self.fatal = self.fatal or fatal
            for listener in list(self.on_fatal):
                listener(fatal)
        except Exception:
            # A bug in a driver: the guest gets an I/O error, the developer a traceback, and the machine lives on.
            import traceback

            traceback.print_exc()
            request.status = errno.EIO

    def _execute(self, request: Request) -> None:
        node = self._medium()
        op = request.op
        if op is Op.READ:
            if request.offset + request.length > sectors_up(node.size):
                raise BlockError.of(errno.EIO)
            node.read(request.offset, request.buffers)
            return
        if op is Op.FLUSH:
            if not self.cache.no_flush:
                node.flush()
            return
        if self._readonly or node.readonly:
            raise BlockError.of(errno.EACCES)
        stable = (request.fua or not self._write_cache) and not self.cache.no_flush
        length, end = request.length, request.offset + request.length
        if end > node.size:
            if end > sectors_up(node.size):
                raise BlockError.of(errno.EIO)
            if op is Op.DISCARD:
                length = node.size - request.offset
            else:
                node.truncate(end)
        if op is Op.WRITE:
            node.write(request.offset, request.buffers, fua=stable)
        elif op is Op.ZERO:
            node.zero(request.offset, request.length, unmap=request.unmap, fua=stable)
        else:
            if length > 0:
                node.discard(request.offset, length)
            if stable:
                node.flush()

    def complete(self, requests: list[Request]) -> None:
        """Requests whose status is set go back to where they came from, or wait for :meth:`retry`."""
        failed = [request for request in requests if request.status]
        told: list[tuple[Request, str]] = []
        if failed:
            kept: set[int] = set()
            for request in failed:
                action = self._action(request)
                told.append((request, action))
                if action == "ignore":
                    request.status = 0
                elif action == "stop":
                    kept.add(id(request))
            if kept:
                with self._lock:
                    self._stopped += [request for request in requests if id(request) in kept]
                requests = [request for request in requests if id(request) not in kept]
        with self._lock:
            count = self.stats.count
            for request in requests:
                count(request)
        for request, action in told:
            for listener in list(self.on_error):
                listener(request, action)
        if requests:
            sink = self._sink
            if sink is not None:
                sink(requests)
            else:
                for request in requests:
                    if request.done is not None:
                        request.done(request)
        with self._lock:
            # Those that wait for a retry are not in flight: a machine that stops on the error must be able to drain.
            self._inflight -= len(requests) + sum([action == "stop" for _, action in told])
            if not self._inflight:
                self._quiet.notify_all()

    def _action(self, request: Request) -> str:
        policy = self.rerror if request.op is Op.READ else self.werror
        if policy == "enospc":
            return "stop" if request.status == errno.ENOSPC else "report"
        return policy

    @property
    def stopped_requests(self) -> int:
        """Requests that failed and wait for :meth:`retry`."""
        return len(self._stopped)

    def retry(self) -> None:
        """Submit again what failed under the policy ``stop``; the machine continues."""
        with self._lock:
            requests, self._stopped = self._stopped, []
        self.submit(requests)

    def cancel_stopped(self) -> list[Request]:
        """Forget what waits for a retry and return it: the device was reset."""
        with self._lock:
            requests, self._stopped = self._stopped, []
        return requests

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every completion has been handed over. False: that took longer than *timeout* seconds."""
        while self._attended and self._inflight:
            self.poll()
        with self._lock:
            return self._quiet.wait_for(lambda: not self._inflight, timeout)

    @property
    def inflight(self) -> int:
        """Requests submitted and not completed."""
        return self._inflight

    # One at a time, for tools

    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset* on. Raises BlockError."""
        buffer = bytearray(length)
        self._now(Request(Op.READ, offset, length, (memoryview(buffer),)))
        return bytes(buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write *data* at *offset*. Raises BlockError."""
        view = memoryview(data).cast("B")
        self._now(Request(Op.WRITE, offset, view.nbytes, (view,), fua=fua))

    def flush(self) -> None:
        """Make everything written stable, as the cache mode understands it. Raises BlockError."""
        if self._node is not None:
            self._now(Request(Op.FLUSH))

    def discard(self, offset: int, length: int) -> None:
        """Tell that the bytes are no longer needed. Raises BlockError."""
        self._now(Request(Op.DISCARD, offset, length))

    def zero(self, offset: int, length: int, *, unmap: bool = False) -> None:
        """Make the bytes zero. Raises BlockError."""
        self._now(Request(Op.ZERO, offset, length, unmap=unmap))

    def _now(self, request: Request) -> None:
        try:
            self._execute(request)
        except OSError as error:
            request.status = error.errno or errno.EIO
            raise
        finally:
            with self._lock:
                self.stats.count(request)

    def _medium(self) -> Node:
        node = self._node
        if node is None:
            raise BlockError.of(getattr(errno, "ENOMEDIUM", errno.ENXIO))
        return node

    def close(self, *, keep_medium: bool = False) -> None:
        """Wait for what is in flight, end the engine, flush and close the medium. A second call does nothing.

        With *keep_medium* the medium stays as it is; it is the caller's.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.drain()
        if self._engine is not None:
            self._engine.close()
        node, self._node = self._node, None
        if node is not None and not keep_medium:
            node.close()


def make_engine(name: str, host: BlockBackend, options: dict[str, Any]) -> Engine:
    """The engine called *name*. Raises PluginError where it is not installed, UsageError for unknown options."""
    options = dict(options)
    implementation: Any
    if name == "threads":
        from .engines.threads import ThreadsEngine

        implementation = ThreadsEngine
    else:
        from ..plugins import find

        implementation = find("engine", name).load()
    engine: Engine = implementation(host, options)
    if options:
        raise UsageError(f"engine {name}: the option {min(options)!r} is unknown")
    return engine
