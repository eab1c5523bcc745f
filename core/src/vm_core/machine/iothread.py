"""The I/O thread: one loop that waits for kicks, timers, sockets and completions.

Theory of operation. The thread runs asyncio's selector loop, used through its callbacks alone. Other threads hand it
functions with :meth:`IoThread.call_soon`; many functions cost one wake-up, since only the first one into an empty queue
writes to the loop's self-pipe. The loop is made when the thread starts; what is asked before that waits in the queue.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio

    from .timerfd import TimerFd

T = TypeVar("T")

Callback = Callable[[], object]


class IoThread:
    """The loop and its thread. *on_error* is told what a callback raised."""

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        self._on_error = on_error
        self._queue: deque[Callback] = deque()
        #: The loop will look at the queue: nobody needs to wake it.
        self._woken = False
        self._mutex = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at: float | None = None
        self._timer: TimerFd | None = None
        #: Called when the alarm of :meth:`wake_in` goes off.
        self.on_alarm: Callback = lambda: None

    @property
    def current(self) -> bool:
        """The caller is on the I/O thread."""
        return threading.current_thread() is self._thread

    @property
    def started(self) -> bool:
        """The loop runs."""
        return self._thread is not None and not self._closed

    def start(self) -> None:
        """Start the thread and wait for its loop."""
        if self._thread is None:
            ready = threading.Event()
            self._thread = threading.Thread(target=self._main, args=(ready,), name="vm-io", daemon=True)
            self._thread.start()
            ready.wait()

    def close(self) -> None:
        """Run what is queued, end the loop and wait for the thread (unless called on it)."""
        if self._thread is None or self._closed:
            self._closed = True
            return
        self.call_soon(self._stop)
        if not self.current:
            self._thread.join()

    def _stop(self) -> None:
        self._closed = True
        if self._loop is not None:
            self._loop.stop()

    def _main(self, ready: threading.Event) -> None:
        import asyncio

        from .timerfd import TimerFd

        timer: TimerFd | None
        loop = asyncio.SelectorEventLoop()
        asyncio.set_event_loop(loop)
        try:
            # Exact to microseconds, where the loop's own timers are rounded up to milliseconds.
            timer = TimerFd()
            loop.add_reader(timer.fd, self._run, self._on_timer)
            self._timer = timer
        except OSError:
            timer = None
        with self._mutex:
            self._loop = loop
            self._woken = True
        loop.call_soon(self._drain)
        ready.set()
        try:
            loop.run_forever()
        finally:
            loop.close()
            if timer is not None:
                timer.close()

    # Work for the loop.

    def call_soon(self, function: Callback) -> None:
        """Call *function* on the I/O thread, in order, without the device lock. Any thread; never blocks."""
        self._queue.append(function)
        if not self._woken:
            self._wake()

    def call_later(self, seconds: float, function: Callback) -> None:
        """Call *function* on the I/O thread after so much real time. Any thread; never blocks."""

        def begin() -> None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_later(seconds, self._run, function)

        if self.current:
            begin()
        else:
            self.call_soon(begin)

    def _wake(self) -> None:
        with self._mutex:
            if self._woken or self._loop is None or self._closed:
                return
            self._woken = True
            loop = self._loop
        try:
            loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # The loop ended a moment ago; so did everybody who could care.
            self._closed = True

    def _drain(self) -> None:
        # First admit new wake-ups, then look: a function queued in between is seen now or wakes the loop again.
        self._woken = False
        self.run_pending()

    def run_pending(self) -> bool:
        """On the I/O thread: run what is queued now. False if there was nothing."""
        queue = self._queue
        count = len(queue)
        for _ in range(count):
            try:
                function = queue.popleft()
            except IndexError:  # a callback ran the rest itself
                break
            self._run(function)
        if queue and not self._woken:
            self._wake()
        return count > 0

    def _run(self, function: Callback) -> None:
        try:
            function()
        except Exception as error:
            self._on_error(error)

    def call(self, function: Callable[[], T]) -> T:
        """Call *function* on the I/O thread and return its result. Before the thread starts, and on it: at once."""
        if self.current or not self.started:
            return function()
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self.call_soon(run)
        done.wait()
        if errors:
            raise errors[0]
        return results[0]

    # Descriptors. On the I/O thread these act at once; elsewhere in order with what was queued before, so a
    # descriptor that another thread gives up is closed by a function of call_soon() after its removal.

    def add_reader(self, fd: int, function: Callback) -> None:
        """Call *function* on the I/O thread whenever *fd* is readable. Any thread; never blocks."""
        self._on_loop(lambda loop: loop.add_reader(fd, self._run, function))

    def remove_reader(self, fd: int) -> None:
        """Undo :meth:`add_reader`."""
        self._on_loop(lambda loop: loop.remove_reader(fd))

    def add_writer(self, fd: int, function: Callback) -> None:
        """Call *function* on the I/O thread whenever *fd* is writable. Any thread; never blocks."""
        self._on_loop(lambda loop: loop.add_writer(fd, self._run, function))

    def remove_writer(self, fd: int) -> None:
        """Undo :meth:`add_writer`."""
        self._on_loop(lambda loop: loop.remove_writer(fd))

    def _on_loop(self, use: Callable[[asyncio.AbstractEventLoop], object]) -> None:
        def run() -> None:
            # A closed loop has forgotten its descriptors already.
            if self._loop is not None and not self._loop.is_closed():
                use(self._loop)

        if self.current:
            run()
        else:
            self.call_soon(run)

    # The clock's alarm.

    def wake_in(self, nanoseconds: int | None) -> None:
        """Call :attr:`on_alarm` after that much time, in place of what was asked before; None: never. Any thread."""
        if self._timer is not None:
            self._timer.set(nanoseconds)
            return
        # The wish is kept as a moment, and whoever sets the alarm takes the newest one: a wish that waits in the queue
        # must not replace one that the I/O thread made meanwhile.
        self._alarm_at = None if nanoseconds is None else time.monotonic() + nanoseconds / 1e9
        if self.current:
            self._set_alarm()
        else:
            self.call_soon(self._set_alarm)

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        at = self._alarm_at
        if at is not None and self._loop is not None and not self._loop.is_closed():
            # The selector loop's clock is time.monotonic().
            self._alarm = self._loop.call_at(at, self._run, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = None
        self._alarm_at = None
        self.on_alarm()

    def _on_timer(self) -> None:
        assert self._timer is not None
        self._timer.clear()
        self.on_alarm()


class InlineIo(IoThread):
    """An I/O thread without a thread, for tests: queued functions run when :meth:`run_pending` is called."""

    def __init__(self, on_error: Callable[[BaseException], object] | None = None) -> None:
        super().__init__(on_error or self._raise)
        self.readers: dict[int, Callback] = {}
        self.writers: dict[int, Callback] = {}

    @staticmethod
    def _raise(error: BaseException) -> None:
        raise error

    @property
    def current(self) -> bool:
        return True

    @property
    def started(self) -> bool:
        return not self._closed

    def start(self) -> None:
        pass

    def close(self) -> None:
        self._closed = True

    def call_soon(self, function: Callback) -> None:
        self._queue.append(function)

    def call_later(self, seconds: float, function: Callback) -> None:
        self._queue.append(function)

    def run_until_idle(self) -> None:
        """Run queued functions, and what they queue, until there is nothing left."""
        while self.run_pending():
            pass

    def add_reader(self, fd: int, function: Callback) -> None:
        self.readers[fd] = function

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def add_writer(self, fd: int, function: Callback) -> None:
        self.writers[fd] = function

    def remove_writer(self, fd: int) -> None:
        self.writers.pop(fd, None)

    def wake_in(self, nanoseconds: int | None) -> None:
        pass
