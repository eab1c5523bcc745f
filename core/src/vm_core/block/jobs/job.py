"""How far a long operation is, how it is stopped, and how fast it may go."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

from ...errors import VmError
from ..format import Progress


class Cancelled(VmError):  # noqa: N818 - a state rather than a mistake
    """The operation was stopped on request before it was done."""


class Job:
    """One run of a long operation.

    Whoever starts it passes a *progress* callback, called with (bytes done, all bytes) from the operation's own
    threads, one call at a time; and calls :meth:`cancel`, from any thread or a signal handler, to stop it: the
    operation then raises :class:`Cancelled` at the next piece.
    """

    def __init__(self, progress: Progress | None = None, *, rate: int = 0) -> None:
        """*rate* limits the bytes written a second; 0: as fast as possible."""
        self._progress = progress
        self._lock = Lock()
        self.done = 0
        self.total = 0
        self.cancelled = False
        self._limit = RateLimit(rate) if rate else None

    @property
    def watched(self) -> bool:
        """Whether anybody wants to know: counting what there is to do costs a walk over the image."""
        return self._progress is not None

    def start(self, total: int) -> None:
        """There are *total* bytes to do. May be called again when that changes."""
        self.total = total
        self._tell()

    def advance(self, count: int) -> None:
        """*count* more bytes are done. Raises Cancelled."""
        with self._lock:
            self.done += count
            self._tell()
        self.check()

    def finish(self) -> None:
        """Everything is done."""
        self.done = self.total
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.done, self.total)

    def cancel(self) -> None:
        """Stop at the next piece."""
        self.cancelled = True

    def check(self) -> None:
        """Raise Cancelled if that was asked for."""
        if self.cancelled:
            raise Cancelled("cancelled")

    def throttle(self, count: int) -> None:
        """Wait until *count* more bytes may be written."""
        if self._limit is not None:
            self._limit.wait(count, self.check)


class RateLimit:
    """A bucket that drains at *rate* bytes a second and holds a tenth of a second's worth."""

    SLICE = 0.1

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._lock = Lock()
        #: When the bucket will be empty.
        self._free = clock()

    def wait(
        self, count: int, check: Callable[[], None] = lambda: None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Put *count* bytes in, once there is room. *check* is called between short sleeps and may raise."""
        with self._lock:
            now = self._clock()
            start = max(now, self._free)
            self._free = start + count / self.rate
        while (left := start - self.SLICE - self._clock()) > 0:
            check()
            sleep(min(left, self.SLICE))
