"""Locks on byte ranges, shared or exclusive, first come first served.

Each request takes a ticket. It waits only for earlier tickets that conflict with it – overlap it, with one of the two
exclusive – whether those are held or still waiting. So nobody starves, and as long as nodes lock from the top of a
graph to its bottom and ask once a node and request, nobody deadlocks.

One thread can also be :meth:`~RangeLock.alone`: it keeps the mutex, so that nobody else even asks, and gets whatever
tickets it takes meanwhile at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from threading import Condition, RLock

#: An end beyond every offset.
EVERYTHING = 1 << 63


class RangeLock:
    """Tickets on ranges, protected by :attr:`mutex`, which the owner also uses for what else it must protect."""

    __slots__ = ("_changed", "_exclusives", "_held", "_tickets", "_waiting", "mutex", "owned")

    def __init__(self) -> None:
        self.mutex = RLock()
        self._changed = Condition(self.mutex)
        #: Ticket → (start, end, exclusive), held or waiting, in order of arrival.
        self._held: dict[int, tuple[int, int, bool]] = {}
        self._tickets = count()
        #: Exclusive tickets, held or waiting: none in most moments, which makes shared ones cheap.
        self._exclusives = 0
        self._waiting = 0
        #: Somebody is alone. Whoever has the mutex and sees this is the one.
        self.owned = False

    def shared(self, start: int, end: int) -> int:
        """Take a shared ticket, waiting for it. Call with :attr:`mutex` held (it is released while waiting)."""
        ticket = next(self._tickets)
        self._held[ticket] = (start, end, False)
        if self._exclusives:
            self._wait(ticket, start, end, False)
        return ticket

    def try_shared(self, start: int, end: int) -> int | None:
        """Take a shared ticket if that needs no waiting. Call with :attr:`mutex` held."""
        if self._exclusives and self._blocked(-1, start, end, False):
            return None
        ticket = next(self._tickets)
        self._held[ticket] = (start, end, False)
        return ticket

    def exclusive(self, start: int, end: int) -> int:
        """Take an exclusive ticket, waiting for it. Call with :attr:`mutex` held (it is released while waiting)."""
        ticket = next(self._tickets)
        self._held[ticket] = (start, end, True)
        self._exclusives += 1
        self._wait(ticket, start, end, True)
        return ticket

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no ticket is held; then have the mutex, and every byte, until the end of the context.

        Whoever is alone may become so again, and may take tickets, which are given back before the end.
        """
        with self.mutex:
            if self.owned:
                yield
                return
            ticket = self.exclusive(0, EVERYTHING)
            self.owned = True
            try:
                yield
            finally:
                self.owned = False
                self.drop(ticket)

    def drop(self, ticket: int) -> None:
        """Give a ticket back. Call with :attr:`mutex` held."""
        if self._held.pop(ticket)[2]:
            self._exclusives -= 1
        if self._waiting:
            self._changed.notify_all()

    def release(self, ticket: int) -> None:
        """Give a ticket back. Call without :attr:`mutex`."""
        with self.mutex:
            self.drop(ticket)

    def _wait(self, ticket: int, start: int, end: int, exclusive: bool) -> None:
        if self.owned or not self._blocked(ticket, start, end, exclusive):
            return
        self._waiting += 1
        try:
            from . import attended

            while self._blocked(ticket, start, end, exclusive):
                if attended.current.settlers and (self._settle() or not self._blocked(ticket, start, end, exclusive)):
                    continue
                self._changed.wait()
        except BaseException:  # interrupted: nobody will give this ticket back
            self.drop(ticket)
            raise
        finally:
            self._waiting -= 1

    def _settle(self) -> bool:
        """Let requests finish that only this thread can finish, as their locks may be those that it waits for."""
        from . import attended

        self.mutex.release()
        try:
            return attended.settle()
        finally:
            self.mutex.acquire()

    def _blocked(self, ticket: int, start: int, end: int, exclusive: bool) -> bool:
        for other, (begin, finish, other_exclusive) in self._held.items():
            if other == ticket:
                return False
            if (exclusive or other_exclusive) and begin < end and start < finish:
                return True
        return False
