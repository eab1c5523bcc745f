"""The engine ``io_uring``.

Theory of operation. Two rings are shared with the kernel (io_uring_setup(2), ``linux/io_uring.h``): entries to carry
out are written to the one, and one system call hands any number of them over; finished ones are read from the other
without any. What is in the page cache, or goes there, is done during that call.

The kernel reads the submission ring's tail during the call alone, so the call orders our stores. Of the completion ring
the kernel moves the tail at any time; a lock that is taken between reading the tail and reading entries keeps
processors of weak ordering from reading the entries first.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from struct import Struct
from threading import Lock
from time import sleep
from typing import Literal

from vm_core.block.engine import EngineHost
from vm_core.errors import UsageError

from . import syscalls
from .engine import KernelEngine
from .queue import Event, KernelQueue

# linux/io_uring.h
_READV, _WRITEV, _NOP = 1, 2, 0
_ENTER_GETEVENTS = 1
_OFF_SQES = 0x10000000
_FEAT_SINGLE_MMAP = 1
_RWF_DSYNC = 2

#: ``struct io_uring_sqe``: opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data, and the rest.
_ENTRY = Struct("=BBHiQQIIQ24x")
#: ``struct io_uring_params`` up to the offsets: sq_entries, cq_entries, flags, two of SQPOLL, features, and more.
_PARAMETERS = Struct("=10I")
#: ``struct io_sqring_offsets`` and ``io_cqring_offsets``.
_OFFSETS = Struct("=8IQ")
_PARAMETERS_SIZE = 120
_EVENT_SIZE = 16
_MASK = 0xFFFFFFFF
#: What a wake-up is known by.
_WAKE = 1 << 62

_enter = syscalls.uring_enter
_NUMBER = syscalls.IO_URING_ENTER


class Ring(KernelQueue):
    """One io_uring."""

    quick = True

    def __init__(self, entries: int) -> None:
        """Raises UsageError where the kernel has none for us."""
        syscalls.require_linux("io_uring")
        parameters = ctypes.create_string_buffer(_PARAMETERS_SIZE)
        try:
            self._fd = syscalls.uring_setup(entries, parameters)
        except OSError as error:
            raise UsageError(_explain(error)) from None
        os.set_inheritable(self._fd, False)
        self._maps: list[mmap.mmap] = []
        self._views: list[memoryview] = []
        try:
            self._map(parameters.raw)
        except BaseException:
            self.close()
            raise

    def _map(self, raw: bytes) -> None:
        self.slots, completions, _, _, _, features, *_ = _PARAMETERS.unpack_from(raw, 0)
        _, tail, _, _, _, _, array, _, _ = _OFFSETS.unpack_from(raw, 40)
        done_head, done_tail, _, _, _, events, _, _, _ = _OFFSETS.unpack_from(raw, 80)
        submission_size, completion_size = array + 4 * self.slots, events + _EVENT_SIZE * completions
        if features & _FEAT_SINGLE_MMAP:
            submission = completion = self._shared(max(submission_size, completion_size), 0)
        else:
            submission, completion = self._shared(submission_size, 0), self._shared(completion_size, 0x8000000)
        self._entries = self._shared(_ENTRY.size * self.slots, _OFF_SQES)
        ring = self._view(submission, "I")
        for index in range(self.slots):
            ring[array // 4 + index] = index
        self._ring = ring
        self._tail_at = tail // 4
        self._tail = ring[self._tail_at]
        self._entry_mask = self.slots - 1
        self._put = 0
        self._done = self._view(completion, "I")
        self._done_names, self._done_results = self._view(completion, "Q"), self._view(completion, "i")
        self._head_at, self._done_tail_at = done_head // 4, done_tail // 4
        self._events_at, self._event_mask = events, completions - 1
        self._order = Lock()
        self._closing = False

    def _shared(self, size: int, offset: int) -> mmap.mmap:
        found = mmap.mmap(self._fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0), offset=offset)
        self._maps.append(found)
        return found

    def _view(self, memory: mmap.mmap, code: Literal["I", "Q", "i"]) -> memoryview[int]:
        view = memoryview(memory)[: len(memory) & ~7].cast(code)
        self._views.append(view)
        return view

    def put(self, slot: int, write: bool, fd: int, vectors: int, count: int, offset: int, stable: bool) -> None:
        _ENTRY.pack_into(
            self._entries,
            (self._tail & self._entry_mask) * 64,
            _WRITEV if write else _READV,
            0,
            0,
            fd,
            offset,
            vectors,
            count,
            _RWF_DSYNC if stable else 0,
            slot,
        )
        self._tail = self._tail + 1 & _MASK
        self._put += 1

    def push(self) -> list[Event]:
        self._ring[self._tail_at] = self._tail
        while self._put:
            taken = _enter(_NUMBER, self._fd, self._put, 0, 0, None, 0)
            if taken >= 0:
                self._put -= taken
            else:
                _breathe(syscalls.last_error())
        return []

    def push_and_wait(self) -> list[Event]:
        self._ring[self._tail_at] = self._tail
        while True:
            taken = _enter(_NUMBER, self._fd, self._put, 1, _ENTER_GETEVENTS, None, 0)
            if taken >= 0:
                self._put -= taken
                if not self._put:
                    return []
            else:
                code = syscalls.last_error()
                if code == errno.EINTR and not self._put:
                    return []
                _breathe(code)

    def wait(self) -> bool:
        if self._closing:
            return False
        done = self._done
        if done[self._head_at] == done[self._done_tail_at] and (
            _enter(_NUMBER, self._fd, 0, 1, _ENTER_GETEVENTS, None, 0) < 0
        ):
            _breathe(syscalls.last_error())
        return not self._closing

    def reap(self) -> list[Event]:
        done = self._done
        head = done[self._head_at]
        with self._order:
            tail = done[self._done_tail_at]
        if head == tail:
            return []
        events: list[Event] = []
        with self._order:
            names, results = self._done_names, self._done_results
            base, mask = self._events_at, self._event_mask
            while head != tail:
                at = base + (head & mask) * _EVENT_SIZE
                name = names[at >> 3]
                if name != _WAKE:
                    events.append((name, results[(at >> 2) + 2]))
                head = head + 1 & _MASK
        done[self._head_at] = head
        return events

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        pass

    def stop(self) -> None:
        # An entry that does nothing finishes at once.
        self._closing = True
        _ENTRY.pack_into(self._entries, (self._tail & self._entry_mask) * 64, _NOP, 0, 0, -1, 0, 0, 0, 0, _WAKE)
        self._tail = self._tail + 1 & _MASK
        self._put += 1
        self.push()

    def close(self) -> None:
        for view in self._views:
            view.release()
        self._views.clear()
        for one in self._maps:
            one.close()
        self._maps.clear()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _breathe(code: int) -> None:
    """A call was refused with *code*: return to try again where that makes sense."""
    if code in (errno.EAGAIN, errno.EBUSY, errno.ENOMEM):  # the kernel is short of memory, or has results for us
        sleep(0.0005)
    elif code != errno.EINTR:
        raise OSError(code, os.strerror(code))


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOSYS:
        return "aio=io_uring: this kernel has no io_uring, which Linux has since 5.1; aio=threads works everywhere"
    if error.errno in (errno.EPERM, errno.EACCES):
        return (
            "aio=io_uring: io_uring is forbidden here (kernel.io_uring_disabled, or a seccomp filter as containers "
            "have it); aio=threads works everywhere"
        )
    if error.errno == errno.ENOMEM:
        return "aio=io_uring: the memory that may be locked (ulimit -l) does not suffice; aio=threads needs none"
    return f"aio=io_uring: io_uring_setup: {error.strerror}; aio=threads works everywhere"


class UringEngine(KernelEngine):
    """Host I/O by io_uring."""

    name = "io_uring"

    def make_queue(self, host: EngineHost, entries: int) -> KernelQueue:
        return Ring(entries)
