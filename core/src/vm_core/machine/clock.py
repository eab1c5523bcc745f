"""Virtual time and timers.

Theory of operation. Virtual time counts nanoseconds since the machine was made and stands still while the machine is
paused. Devices ask for a :class:`Timer` once and arm it as often as they like; its callback runs on the I/O thread with
the device lock held. Everything here is called with the device lock held, except :meth:`Clock.now_ns`.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from typing import Protocol

NANOSECONDS = 1_000_000_000
#: Entries in the queue that make it worth looking for forgotten ones; more than a machine has timers.
FORGOTTEN = 4096


class Alarm(Protocol):
    """What a clock asks of the thread that runs its timers."""

    def wake_in(self, nanoseconds: int | None) -> None:
        """Call :meth:`Clock.run_due` after that much real time, in place of what was asked before; None: never."""
        ...


class Timer:
    """A callback at a moment of virtual time. Armed again, it forgets the moment it was armed for before."""

    __slots__ = ("_clock", "_serial", "callback", "deadline")

    def __init__(self, clock: Clock, callback: Callable[[], object]) -> None:
        self._clock = clock
        self._serial = 0
        self.callback = callback
        #: Nanoseconds of virtual time; None while not armed.
        self.deadline: int | None = None

    @property
    def armed(self) -> bool:
        """The callback is going to be called."""
        return self.deadline is not None

    def arm(self, at_ns: int) -> None:
        """Call the callback once when virtual time reaches *at_ns*; soon, if that has passed."""
        if self.deadline != at_ns:
            self.deadline = at_ns
            self._serial += 1
            self._clock._push(at_ns, self._serial, self)

    def cancel(self) -> None:
        """Do not call."""
        self.deadline = None
        self._serial += 1


class Clock:
    """Virtual time that follows the host's monotonic clock while it runs. It begins stopped, at zero."""

    def __init__(self, alarm: Alarm | None = None) -> None:
        self._alarm = alarm
        #: Host time minus virtual time while running; virtual time while stopped.
        self._base = 0
        self._running = False
        self._heap: list[tuple[int, int, int, Timer]] = []
        self._order = 0
        self._waking_at: int | None = None

    def now_ns(self) -> int:
        """Virtual time in nanoseconds. Any thread, without the lock."""
        return time.monotonic_ns() - self._base if self._running else self._base

    @property
    def running(self) -> bool:
        """Time goes on."""
        return self._running

    def timer(self, callback: Callable[[], object]) -> Timer:
        """A new timer, not armed."""
        return Timer(self, callback)

    def start(self) -> None:
        """Let time go on."""
        if not self._running:
            self._base = time.monotonic_ns() - self._base
            self._running = True
            self._set_alarm()

    def stop(self) -> None:
        """Hold time."""
        if self._running:
            self._base = time.monotonic_ns() - self._base
            self._running = False
            self._waking_at = None
            if self._alarm is not None:
                self._alarm.wake_in(None)

    def next_deadline_ns(self) -> int | None:
        """When the next timer is due, None without one."""
        heap = self._heap
        while heap:
            deadline, _, serial, timer = heap[0]
            if timer._serial == serial:
                return deadline
            heapq.heappop(heap)
        return None

    def run_due(self) -> None:
        """Call back every timer whose time has come, in order."""
        self._waking_at = None
        while self._running:
            deadline = self.next_deadline_ns()
            if deadline is None or deadline > self.now_ns():
                break
            timer = heapq.heappop(self._heap)[3]
            timer.deadline = None
            timer.callback()
        self._set_alarm()

    def _push(self, at_ns: int, serial: int, timer: Timer) -> None:
        self._order += 1
        if len(self._heap) > FORGOTTEN:
            # Entries of timers that were armed anew or cancelled stay until their time comes: drop them now and then.
            self._heap = [entry for entry in self._heap if entry[3]._serial == entry[2]]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (at_ns, self._order, serial, timer))
        if self._running and (self._waking_at is None or at_ns < self._waking_at):
            self._set_alarm()

    def _set_alarm(self) -> None:
        deadline = self.next_deadline_ns()
        if self._alarm is None or not self._running or deadline is None or deadline == self._waking_at:
            return
        self._waking_at = deadline
        self._alarm.wake_in(max(0, deadline - self.now_ns()))


class ManualClock(Clock):
    """Time that moves only when told, for tests."""

    def __init__(self) -> None:
        super().__init__()
        self._running = True
        self._now = 0

    def now_ns(self) -> int:
        return self._now

    def start(self) -> None:
        self._running = True

    def stop(self) -> None:
        self._running = False

    def advance(self, nanoseconds: int) -> None:
        """Move on by *nanoseconds*, stopping at every timer that becomes due on the way."""
        end = self._now + nanoseconds
        while (deadline := self.next_deadline_ns()) is not None and deadline <= end:
            self._now = max(self._now, deadline)
            self.run_due()
        self._now = end
