"""The bounded pipeline: a few threads that take work from one generator, and turns for what must stay in order.

Each worker takes the next item, does what may happen side by side (reading, codecs, writing data), and takes its turn
for what decides the layout (setting space aside). There is no queue between stages, so memory is one buffer a worker,
whatever the size of the image. The first failure stops all workers and is what :func:`run` raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from threading import Condition, Lock, Thread
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds after which a waiting caller looks for signals.
WAKE = 0.25

#: More workers than this gain nothing for codecs and system calls.
MAX_WORKERS = 16


class Stopped(Exception):  # noqa: N818 - no mistake
    """Another worker failed: give up quietly."""


class Turns:
    """Lets the holders of the numbers 0, 1, 2, … pass one after the other."""

    def __init__(self) -> None:
        self._changed = Condition(Lock())
        self._now = 0
        self._stopped = False

    def wait(self, number: int) -> None:
        """Return when it is *number*'s turn. Raises Stopped."""
        with self._changed:
            while self._now != number and not self._stopped:
                self._changed.wait()
            if self._stopped:
                raise Stopped

    def done(self) -> None:
        """The turn is over; the next number's begins."""
        with self._changed:
            self._now += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Nobody passes any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def worker_count(limit: int = MAX_WORKERS) -> int:
    """Threads that make sense here, at most *limit*."""
    try:
        processors = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        processors = os.cpu_count() or 1
    return max(1, min(processors, limit, MAX_WORKERS))


class _Crew:
    """What the workers of one run share."""

    def __init__(self, items: Iterator[Any], work: Callable[[Any, Any], None], turns: Turns | None) -> None:
        self.items = items
        self.work = work
        self.turns = turns
        self.lock = Lock()
        self.failure: BaseException | None = None
        self.stopping = False
        self.running = 0
        self._gone = Condition(self.lock)

    def next(self) -> Any:
        with self.lock:
            return None if self.stopping else next(self.items, None)

    def fail(self, error: BaseException) -> None:
        with self.lock:
            if self.failure is None and not isinstance(error, Stopped):
                self.failure = error
            self.stopping = True
        if self.turns is not None:
            self.turns.stop()

    def labour(self, make_state: Callable[[], Any]) -> None:
        try:
            state = make_state()
            while (item := self.next()) is not None:
                self.work(item, state)
        except BaseException as error:
            self.fail(error)

    def start(self, make_state: Callable[[], Any]) -> None:
        """Another worker, in a thread."""
        thread = Thread(target=self._labour_and_go, args=(make_state,), daemon=True)
        with self.lock:
            self.running += 1
        try:
            thread.start()
        except BaseException:
            with self.lock:
                self.running -= 1
            raise

    def _labour_and_go(self, make_state: Callable[[], Any]) -> None:
        self.labour(make_state)
        with self.lock:
            self.running -= 1
            self._gone.notify_all()

    def wait(self) -> None:
        """Return when all workers have gone.

        Not by ``Thread.join``: one that a signal's exception interrupts takes the thread for dead from then on. And
        never for long: Python's signal handlers run in this thread alone, which a signal that another one took does not
        wake.
        """
        with self._gone:
            while self.running:
                self._gone.wait(WAKE)


def run(
    items: Iterator[T],
    work: Callable[[T, Any], None],
    *,
    workers: int,
    make_state: Callable[[], Any] = lambda: None,
    turns: Turns | None = None,
) -> None:
    """Call ``work(item, state)`` for every item, from *workers* threads, each with a state of its own.

    *turns* are what *work* waits for, if anything. Raises the first failure when all workers have stopped; one that
    interrupts the calling thread (Ctrl-C) stops them too.
    """
    crew = _Crew(items, work, turns)
    if workers < 2:
        crew.labour(make_state)
    else:
        try:
            for _ in range(workers):
                crew.start(make_state)
            crew.wait()
        except BaseException as error:
            crew.fail(error)
            crew.wait()
            raise
    if crew.failure is not None:
        raise crew.failure
