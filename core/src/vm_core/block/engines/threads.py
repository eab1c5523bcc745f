"""The engine ``threads``: a few worker threads that take requests from one queue.

Theory of operation. A submitted batch is put on the queue whole and wakes one worker, which takes one request after
the other until the queue is empty and then hands all it has finished back at once. A second worker is only a loss
while requests are answered from the page cache, because the interpreter's lock would be passed to and fro between
them; it is needed as soon as one blocks. So a worker wakes a colleague before it starts something that is bound to
wait (a flush, a stable write, a discard, anything with O_DIRECT, a read: those in the page cache never get here) and
after something that turned out to have waited, if there is more to do. Finished requests are handed back around such
a wait, too, and after a millisecond at the latest; sooner would only make two threads of Python run at once, each of
which waits for the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic_ns
from typing import Any

from ..engine import Engine, EngineHost
from ..request import Op, Request

#: A request that took longer (nanoseconds) has waited for something.
SLOW = 1_000_000
#: Finished requests are handed back after this many, or when this many nanoseconds have passed.
BATCH = 64
BATCH_TIME = 1_000_000


class ThreadsEngine(Engine):
    """Workers are started when they are first needed and end with the backend."""

    def __init__(self, host: EngineHost, options: dict[str, Any]) -> None:
        self._host = host
        self._limit = max(1, int(options.pop("workers", 8)))
        self._requests: deque[Request] = deque()
        #: One token is one call to work; None ends a worker.
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._lock = Lock()
        self._threads: list[Thread] = []
        #: Workers that have no work and no call on its way to them.
        self._idle = 0

    def submit(self, requests: Sequence[Request]) -> None:
        self._requests.extend(requests)
        self._call()

    def _call(self) -> None:
        """Get one more worker to look at the queue, if there is one to be had."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._limit:
                thread = Thread(target=self._work, name=f"vm-io-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                return  # all are at work, and look at the queue again before they rest
        self._calls.put(True)

    def _work(self) -> None:
        requests = self._requests
        execute, complete = self._host.execute, self._host.complete
        while self._calls.get():
            while True:
                finished: list[Request] = []
                started = monotonic_ns()
                while True:
                    try:
                        request = requests.popleft()
                    except IndexError:
                        break
                    if self._will_wait(request):
                        if requests:
                            self._call()
                        if finished:
                            complete(finished)
                            finished = []
                    before = monotonic_ns()
                    execute(request)
                    finished.append(request)
                    now = monotonic_ns()
                    slow = now - before > SLOW
                    if slow and requests:
                        self._call()
                    if slow or len(finished) >= BATCH or now - started > BATCH_TIME:
                        complete(finished)
                        finished = []
                        started = now
                if finished:
                    complete(finished)
                with self._lock:
                    # A submitter that found nobody idle relies on this second look.
                    if not requests:
                        self._idle += 1
                        break

    def _will_wait(self, request: Request) -> bool:
        if request.op is not Op.WRITE or request.fua:
            return True
        node = self._host.node
        return node is not None and node.request_alignment > 1

    def close(self) -> None:
        with self._lock:
            threads, self._threads = self._threads, []
            self._limit = 0
        for _ in threads:
            self._calls.put(False)
        for thread in threads:
            thread.join()
