"""What both engines have in common: from a request to entries of the kernel's queue and back.

Theory of operation. The backend resolves a request into a *passage*: spans of plain files, with the range locks that
keep them valid. Each span becomes one *transfer* (cached writes: one a megabyte), which takes a slot of the kernel's
queue, or waits in the backlog until one is free. When all transfers of a request are done the passage is finished and
the request is handed back. Requests without a passage, flushes among them, go to worker threads in one batch, which
carry them out through the nodes.

Whoever submits writes the entries and makes the system call; what finished during it is handed back at once. The rest
is fetched by one thread, the *reaper*, which blocks in the kernel. It parks where nobody needs it: when it was woken
for what the submitting thread had fetched already, it sleeps on its bell until something is on its way that did not
finish at once. In an attended engine (:meth:`Engine.attend`) there is no reaper: the one thread that submits fetches
too, by polling, and where it would wait for a lock (:mod:`vm_core.block.attended`); what it fetches there is handed
back when it polls.

A transfer that was cut short goes on where it stopped. One that the kernel refuses for a reason that has nothing to do
with the disk – memory that is not aligned, a flag that a file system does not know, a submitting thread that ended – is
carried out again by the workers, whole: both reads and writes in place may be repeated. What is left are the disk's own
errors, which the request ends with as it would by any other engine.
"""

from __future__ import annotations

import errno
import os
import select
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

from vm_core.block import attended
from vm_core.block.engine import Engine, EngineHost
from vm_core.block.engines.threads import ThreadsEngine
from vm_core.block.file import WRITE_MAX, FileProtocol
from vm_core.block.node import Buffer, Node
from vm_core.block.passage import Passage
from vm_core.block.request import Op, Request
from vm_core.block.vectors import cut, fill
from vm_core.errors import UsageError

from .memory import VECTORS_MAX, Vectors, many
from .queue import Event, KernelQueue

#: Entries at most: what io_uring_setup(2) takes.
ENTRIES_MAX = 4096
#: Refusals that say nothing about the disk.
_AGAIN = frozenset(
    (
        errno.EAGAIN,
        errno.EINTR,
        errno.ECANCELED,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.ENOMEM,
        errno.EFAULT,
        errno.EBADF,
    )
)


class _Flight:
    """A request on its way: its passage, transfers to come, and what went wrong first."""

    __slots__ = ("error", "passage", "pending", "request")

    def __init__(self, request: Request, passage: Passage) -> None:
        self.request = request
        self.passage = passage
        self.pending = 1
        self.error = 0


class _Transfer:
    """One entry of the kernel's queue: *length* bytes between *buffers* and *file* at *offset*."""

    __slots__ = ("buffers", "file", "flight", "held", "length", "offset")

    def __init__(
        self, flight: _Flight, file: FileProtocol, offset: int, buffers: Sequence[Buffer], length: int
    ) -> None:
        self.flight = flight
        self.file = file
        self.offset = offset
        self.buffers = buffers
        self.length = length
        #: Keeps the memory in place.
        self.held: object = None


class _Inbox:
    """The host that the workers of an attended engine see: what they complete waits for the thread that polls."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self.bell = os.eventfd(0, os.EFD_CLOEXEC)
        self.requests: deque[Request] = deque()

    @property
    def node(self) -> Node | None:
        return self._host.node

    def passage(self, request: Request) -> Passage | None:
        return None

    def execute(self, request: Request) -> None:
        self._host.execute(request)

    def complete(self, requests: list[Request]) -> None:
        self.requests.extend(requests)
        os.eventfd_write(self.bell, 1)

    def take(self) -> list[Request]:
        """What has been completed. Called by the thread that polls, when there is something."""
        os.eventfd_read(self.bell)
        found = []
        while self.requests:
            found.append(self.requests.popleft())
        return found

    def close(self) -> None:
        os.close(self.bell)


class KernelEngine(Engine):
    """An engine on a :class:`~vm_aio.queue.KernelQueue`."""

    #: What it is called in messages.
    name = ""

    @abstractmethod
    def make_queue(self, host: EngineHost, entries: int) -> KernelQueue:
        """The queue. Raises UsageError where it cannot be had."""

    def __init__(self, host: EngineHost, options: dict[str, Any]) -> None:
        entries = int(options.pop("entries", 256))
        if not 1 <= entries <= ENTRIES_MAX:
            raise UsageError(f"aio={self.name}: entries={entries}: a number from 1 to {ENTRIES_MAX} is needed")
        self._host = host
        self._worker_options = {"workers": options.pop("workers")} if "workers" in options else {}
        self._queue = queue = self.make_queue(host, entries)
        self._vectors = Vectors(queue.slots)
        self._transfers: list[_Transfer | None] = [None] * queue.slots
        self._free = list(range(queue.slots))
        self._backlog: deque[_Transfer] = deque()
        #: Around putting and pushing, and the reaper's parking.
        self._submitting = Lock()
        #: Around fetching and settling what finished.
        self._reaping = Lock()
        self._workers: ThreadsEngine | None = None
        self._reaper: Thread | None = None
        self._parked = True
        self._bell: SimpleQueue[bool] = SimpleQueue()
        self._inbox: _Inbox | None = None
        #: Requests that the workers of an attended engine have.
        self._away = 0
        #: Requests that were finished while the attending thread waited for a lock.
        self._ready: list[Request] = []
        #: Where the attending thread looks for us.
        self._settlers: list[Callable[[], bool]] = []
        self._closed = False

    # Submitting

    def submit(self, requests: Sequence[Request]) -> None:
        passage_of = self._host.passage
        transfers: list[_Transfer] = []
        others: list[Request] = []
        blank: list[Request] = []
        for request in requests:
            passage = passage_of(request) if request.op <= Op.WRITE else None
            if passage is None:
                others.append(request)
            elif not self._depart(request, passage, transfers):
                blank.append(request)
        if transfers:
            self._issue(transfers)
        if others:
            self._hand_over(others)
        if blank:
            self._host.complete(blank)

    def _depart(self, request: Request, passage: Passage, transfers: list[_Transfer]) -> bool:
        """Make the transfers of a request. False: there are none, and it is complete."""
        flight = _Flight(request, passage)
        spans = passage.spans
        if len(spans) == 1:
            file, host, length = spans[0]
            if file is not None and (length <= WRITE_MAX or not passage.write or file.direct):
                transfers.append(_Transfer(flight, file, host, request.buffers, length))
                return True
        made: list[_Transfer] = []
        position = 0
        for file, host, length in spans:
            if file is None:
                fill(cut(request.buffers, position, length))
            else:
                # Cached writes of many megabytes at once are slow in Linux.
                step = WRITE_MAX if passage.write and not file.direct else length
                for start in range(0, length, step):
                    count = min(step, length - start)
                    buffers = cut(request.buffers, position + start, count)
                    made.append(_Transfer(flight, file, host + start, buffers, count))
            position += length
        flight.pending = len(made)
        if not made:
            passage.finish()
            request.status = 0
            return False
        transfers += made
        return True

    def _issue(self, transfers: Sequence[_Transfer]) -> None:
        """Get transfers on their way, or into the backlog."""
        with self._submitting:
            self._put(transfers)
            if self._inbox is not None:
                return  # the thread that polls pushes
            refused = self._queue.push()
        if self._queue.quick or refused:
            self._collect(refused)
        if self._parked and len(self._free) < self._queue.slots:
            with self._submitting:
                if self._parked and not self._closed:
                    self._parked = False
                    if self._reaper is None:
                        self._reaper = Thread(target=self._reap, name=f"vm-{self.name}", daemon=True)
                        self._reaper.start()
                    self._bell.put(True)

    def _put(self, transfers: Sequence[_Transfer]) -> None:
        """Write entries for as many as there are free slots. Called with the submitting lock."""
        free = self._free
        for transfer in transfers:
            if self._backlog or not free:
                self._backlog.append(transfer)
            else:
                self._write_entry(free.pop(), transfer)
        while self._backlog and free:
            self._write_entry(free.pop(), self._backlog.popleft())

    def _write_entry(self, slot: int, transfer: _Transfer) -> None:
        buffers = transfer.buffers
        if len(buffers) == 1:
            count = 1
            vectors, transfer.held = self._vectors.one(slot, buffers[0])
        else:
            # More than the kernel takes at once is a transfer cut short.
            count = min(len(buffers), VECTORS_MAX)
            vectors, transfer.held = many(buffers[:count])
        self._transfers[slot] = transfer
        passage = transfer.flight.passage
        self._queue.put(slot, passage.write, transfer.file.fileno(), vectors, count, transfer.offset, passage.stable)

    def _hand_over(self, requests: Sequence[Request]) -> None:
        """Let the workers carry requests out."""
        workers = self._workers
        if workers is None:
            with self._submitting:
                workers = self._workers
                if workers is None:
                    workers = self._workers = ThreadsEngine(self._inbox or self._host, dict(self._worker_options))
        if self._inbox is not None:
            self._away += len(requests)
        workers.submit(requests)

    # Finishing

    def _collect(self, refused: Sequence[Event] = (), *, keep: bool = False) -> bool:
        """Settle what has finished, and hand it back or *keep* it for the next poll. False: nothing had."""
        finished: list[Request] = []
        again: list[_Transfer] = []
        others: list[Request] = []
        with self._reaping:
            events = self._queue.reap()
            if refused:
                events = [*refused, *events]
            if events:
                self._settle(events, finished, again, others)
        if not events:
            return False
        if again or self._backlog:
            self._issue(again)
        if others:
            self._hand_over(others)
        if keep:
            self._ready += finished
        elif finished:
            self._host.complete(finished)
        return True

    def _settle(
        self, events: Sequence[Event], finished: list[Request], again: list[_Transfer], others: list[Request]
    ) -> None:
        """Take the slots of *events* back. Requests become *finished*, or are for the *others*; transfers go on."""
        transfers, free = self._transfers, self._free
        for slot, result in events:
            transfer = transfers[slot]
            assert transfer is not None
            transfers[slot] = None
            free.append(slot)
            flight = transfer.flight
            if result != transfer.length:
                if result > 0:
                    transfer.offset += result
                    transfer.length -= result
                    transfer.buffers = cut(transfer.buffers, result, transfer.length)
                    again.append(transfer)
                    continue
                if result < 0:
                    if not flight.error or flight.error in _AGAIN:
                        flight.error = -result
                elif flight.passage.write:
                    flight.error = flight.error or errno.EAGAIN
                else:  # the end of the file
                    fill(transfer.buffers)
            transfer.held = None
            flight.pending -= 1
            if flight.pending:
                continue
            error, request = flight.error, flight.request
            flight.passage.finish(failed=error != 0)
            if error in _AGAIN:
                others.append(request)
            else:
                request.status = error
                finished.append(request)

    def _reap(self) -> None:
        """The reaper's life."""
        queue = self._queue
        while self._bell.get():
            while queue.wait():
                if self._collect():
                    continue
                with self._submitting:
                    # Somebody else has fetched it. A submitter that finds the reaper parked rings, so look once more.
                    if len(self._free) == queue.slots:
                        self._parked = True
                        break

    # Attended

    def attend(self) -> bool:
        if self._inbox is None:
            self._inbox = _Inbox(self._host)
            self._settlers = attended.current.settlers
            self._settlers.append(self._settle_own)
        return True

    def _settle_own(self) -> bool:
        """See :data:`vm_core.block.attended.current`."""
        if len(self._free) == self._queue.slots:  # then the backlog is empty too
            return False
        self._collect(self._queue.push_and_wait(), keep=True)
        return True

    def poll(self) -> None:
        queue, inbox = self._queue, self._inbox
        assert inbox is not None
        if self._ready:
            ready, self._ready = self._ready, []
            self._host.complete(ready)
            return
        refused: list[Event] = []
        done: list[Request] = []
        if not self._away:
            refused = queue.push_and_wait()
        else:
            refused = queue.push()
            if not refused and not inbox.requests:
                waiting = select.poll()
                waiting.register(inbox.bell, select.POLLIN)
                waiting.register(queue.fileno(), select.POLLIN)
                if any(fd == queue.fileno() for fd, _ in waiting.poll()):
                    queue.clear()
            if inbox.requests:
                done = inbox.take()
                self._away -= len(done)
        self._collect(refused)
        if done:
            self._host.complete(done)

    def close(self) -> None:
        with self._submitting:
            if self._closed:
                return
            self._closed = True
            reaper = self._reaper
            if reaper is not None:
                self._queue.stop()
                self._bell.put(False)
        if reaper is not None:
            reaper.join()
        if self._workers is not None:
            self._workers.close()
        if self._inbox is not None:
            self._settlers.remove(self._settle_own)
            self._inbox.close()
        self._queue.close()
