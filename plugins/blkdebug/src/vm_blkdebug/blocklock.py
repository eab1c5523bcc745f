"""Keeping requests from blocks that another one reads, changes and writes back.

A request waits for those that are at work on the same blocks, not for those that wait themselves: so two that wait for
different ones never wait for each other, and tests can bring requests into any order. (The range lock of vm-core is
first come, first served.)
"""

from __future__ import annotations

from threading import Condition


class _Request:
    __slots__ = ("end", "exclusive", "start", "waiting")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.waiting = True


class BlockLock:
    """Requests on ranges, shared or exclusive."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._requests: list[_Request] = []

    def acquire(self, start: int, end: int, *, exclusive: bool) -> _Request:
        """Wait for the range; returns what to release."""
        mine = _Request(start, end, exclusive)
        with self._changed:
            self._requests.append(mine)
            while any(self._conflict(mine, other) for other in self._requests):
                self._changed.wait()
            mine.waiting = False
        return mine

    @staticmethod
    def _conflict(mine: _Request, other: _Request) -> bool:
        return (
            other is not mine
            and not other.waiting
            and (mine.exclusive or other.exclusive)
            and mine.start < other.end
            and other.start < mine.end
        )

    def release(self, request: _Request) -> None:
        """Give the range back."""
        with self._changed:
            self._requests.remove(request)
            self._changed.notify_all()
