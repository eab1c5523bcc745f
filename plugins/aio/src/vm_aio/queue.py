"""What an engine asks of the kernel: a queue of reads and writes. Implemented on io_uring and on Linux AIO."""

from __future__ import annotations

from abc import ABC, abstractmethod

#: A finished entry: its slot, and the bytes that were moved or a negative errno.
Event = tuple[int, int]


class KernelQueue(ABC):
    """A queue of *slots* entries, each known by its slot's number. One thread at a time puts and pushes."""

    #: Entries that may be on their way at a time.
    slots: int
    #: Entries may finish while they are pushed (what is in the page cache), so it pays to look at once.
    quick: bool

    @abstractmethod
    def put(self, slot: int, write: bool, fd: int, vectors: int, count: int, offset: int, stable: bool) -> None:
        """Write an entry: *count* vectors at the address *vectors*. The kernel does not see it before the push."""

    @abstractmethod
    def push(self) -> list[Event]:
        """Give the kernel all that was put. What it refuses at once is told as if it had finished."""

    @abstractmethod
    def reap(self) -> list[Event]:
        """What has finished, without waiting. One thread at a time."""

    @abstractmethod
    def wait(self) -> bool:
        """Wait until something has finished. False: the queue was closed. Returns early for signals. One thread."""

    @abstractmethod
    def push_and_wait(self) -> list[Event]:
        """Both at once, where nobody else waits; something is put or on its way. See :meth:`push`."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that can be read when something has finished, for poll(2)."""

    @abstractmethod
    def clear(self) -> None:
        """Before :meth:`reap`, after :meth:`fileno` was found readable."""

    @abstractmethod
    def stop(self) -> None:
        """Nothing is on its way: let the thread in :meth:`wait` return, now or when it gets there."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Nothing is on its way, nobody waits."""
