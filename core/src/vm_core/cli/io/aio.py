"""Asynchronous requests: carried out by threads while the commands go on.

Theory of operation. Requests start in the order in which they were submitted, and each gets a head start: the next one
begins when the one before has finished, is known to wait for something (:mod:`vm_core.block.waiting`), or has taken
longer than :data:`HEAD_START`. So those that are quick finish in order and place their clusters in order, as they do in
a program with one event loop, and those that wait run side by side. Finished requests are reported by the main thread
at the moments at which such a program would look for them: ``aio_flush``, waits, the end, and around every request that
is carried out at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread, get_ident
from time import monotonic
from typing import TextIO

from ...block import waiting
from ...errors import FatalError

#: Seconds before a request that has not finished lets the next one start.
HEAD_START = 0.05
#: Threads at most.
WORKERS = 64

#: Carries a request out and returns what to print about it.
Work = Callable[[], str]


class _Request:
    """One request on its way."""

    __slots__ = ("since", "thread", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.since = 0.0
        self.thread = 0


class Queue:
    """All asynchronous requests of the program."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._changed = Condition()
        self._submitted: deque[_Request] = deque()
        #: The request that has its head start now.
        self._leader: _Request | None = None
        #: Requests that have begun and not finished.
        self._running = 0
        #: What to print about finished ones, or to raise.
        self._finished: deque[str | FatalError] = deque()
        self._idle = 0
        self._workers: list[Thread] = []
        self._stopping = False
        #: Called on a worker's thread after a request finished, for a main thread that waits for something else.
        self.on_finish: Callable[[], None] | None = None
        waiting.listener = self._parked

    @property
    def busy(self) -> bool:
        """Whether a request has not been reported."""
        with self._changed:
            return bool(self._submitted or self._running or self._finished)

    def submit(self, work: Work) -> None:
        """Have *work* done soon."""
        with self._changed:
            self._submitted.append(_Request(work))
            self._hire()
            self._changed.notify_all()

    def _hire(self) -> None:
        """See to it that somebody can take the next request."""
        if not self._idle and len(self._workers) < WORKERS:
            worker = Thread(target=self._serve, name=f"vm-io-{len(self._workers)}", daemon=True)
            self._workers.append(worker)
            worker.start()
            self._idle += 1

    def _serve(self) -> None:
        while True:
            with self._changed:
                request = self._take()
                if request is None:
                    return
            text: str | FatalError
            try:
                text = request.work()
            except FatalError as error:
                text = error
            with self._changed:
                self._running -= 1
                self._idle += 1
                if text:
                    self._finished.append(text)
                if self._leader is request:
                    self._leader = None
                self._changed.notify_all()
                listener = self.on_finish
            if listener is not None:
                listener()

    def _take(self) -> _Request | None:
        """The next request, when it may start; None at the end. Called with the lock held, by an idle worker."""
        while True:
            if self._stopping:
                return None
            leader = self._leader
            rest = 0.0 if leader is None else leader.since + HEAD_START - monotonic()
            if self._submitted and rest <= 0:
                request = self._submitted.popleft()
                request.since, request.thread = monotonic(), get_ident()
                self._leader = request
                self._running += 1
                self._idle -= 1
                if self._submitted:
                    self._hire()
                return request
            self._changed.wait(rest if self._submitted else None)

    def _parked(self) -> None:
        """The request of this thread waits for something: the next one may start."""
        with self._changed:
            leader = self._leader
            if leader is not None and leader.thread == get_ident():
                self._leader = None
                if self._submitted:
                    self._hire()
                self._changed.notify_all()

    def settle(self) -> None:
        """Wait until every request submitted so far has finished or had its head start; report the finished ones."""
        with self._changed:
            while self._submitted or self._leader is not None:
                leader = self._leader
                rest = HEAD_START if leader is None else leader.since + HEAD_START - monotonic()
                if rest <= 0 and not self._submitted:
                    break
                self._changed.wait(max(rest, 0.001))
        self.poll()

    def poll(self) -> None:
        """Report what has finished."""
        while True:
            with self._changed:
                if not self._finished:
                    return
                text = self._finished.popleft()
            if isinstance(text, FatalError):
                raise text
            self._out.write(text)

    def wait(self, seconds: float) -> None:
        """Report what finishes in the next *seconds*."""
        end = monotonic() + seconds
        while True:
            self.poll()
            with self._changed:
                rest = end - monotonic()
                if rest <= 0:
                    return
                if not self._finished:
                    self._changed.wait(rest)

    def flush(self) -> None:
        """Wait for all requests, reporting them as they finish."""
        while True:
            self.poll()
            with self._changed:
                if not self._submitted and not self._running:
                    if not self._finished:
                        return
                elif not self._finished:
                    self._changed.wait()

    def stop(self) -> None:
        """No more requests come: end the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        waiting.listener = None
