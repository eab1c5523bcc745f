"""The engine ``native``: Linux AIO (io_submit(2)), which is asynchronous for O_DIRECT alone."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from struct import Struct
from time import sleep

from vm_core.block.engine import EngineHost
from vm_core.block.file import NATIVE_NEEDS_DIRECT, FileProtocol
from vm_core.block.node import Node
from vm_core.errors import UsageError

from . import syscalls
from .engine import KernelEngine
from .queue import Event, KernelQueue

# linux/aio_abi.h
_PREADV, _PWRITEV = 7, 8
_FLAG_RESFD = 1
_RWF_DSYNC = 2

#: ``struct iocb``: data, key and rw_flags (in the machine's order), opcode, priority, fd, buffer, count, offset,
#: reserved, flags, descriptor to be told.
_ENTRY = Struct("=QIIHhIQQqQII")
_LITTLE = sys.byteorder == "little"
#: ``struct io_event``: data, entry, result, second result.
_EVENT = Struct("=QQqq")
#: Events that one call fetches.
_BATCH = 128

_submit, _getevents = syscalls.aio_submit, syscalls.aio_getevents


class Context(KernelQueue):
    """One ``aio_context_t``."""

    quick = False

    def __init__(self, entries: int) -> None:
        """Raises UsageError where the kernel has none for us."""
        syscalls.require_linux("native")
        self._numbers = syscalls.aio_numbers()
        self.slots = entries
        context = ctypes.c_ulong(0)
        if syscalls.aio_setup(self._numbers.setup, entries, ctypes.addressof(context)) < 0:
            raise UsageError(_explain(syscalls.last_error(), entries))
        self._context = context.value
        try:
            self._told = os.eventfd(0, os.EFD_CLOEXEC)
        except BaseException:
            syscalls.aio_destroy(self._numbers.destroy, self._context)
            raise
        self._entries = ctypes.create_string_buffer(_ENTRY.size * entries)
        base = ctypes.addressof(self._entries)
        self._addresses = [base + _ENTRY.size * slot for slot in range(entries)]
        self._list = (ctypes.c_void_p * entries)()
        self._list_at = ctypes.addressof(self._list)
        self._waiting: list[int] = []
        self._events = ctypes.create_string_buffer(_EVENT.size * _BATCH)
        self._events_at = ctypes.addressof(self._events)
        self._no_time = ctypes.create_string_buffer(16)
        self._stopping = False

    def put(self, slot: int, write: bool, fd: int, vectors: int, count: int, offset: int, stable: bool) -> None:
        flags = _RWF_DSYNC if stable else 0
        _ENTRY.pack_into(
            self._entries,
            slot * 64,
            slot,
            *((0, flags) if _LITTLE else (flags, 0)),
            _PWRITEV if write else _PREADV,
            0,
            fd,
            vectors,
            count,
            offset,
            0,
            _FLAG_RESFD,
            self._told,
        )
        self._waiting.append(slot)

    def push(self) -> list[Event]:
        waiting = self._waiting
        refused: list[Event] = []
        while waiting:
            count = len(waiting)
            addresses = self._addresses
            self._list[:count] = [addresses[slot] for slot in waiting]
            taken = _submit(self._numbers.submit, self._context, count, self._list_at)
            if taken > 0:
                del waiting[:taken]
                continue
            code = syscalls.last_error()
            if code == errno.EAGAIN:
                sleep(0.0005)
            elif code != errno.EINTR:
                # It is the first entry that the kernel does not like.
                refused.append((waiting.pop(0), -(code or errno.EIO)))
        return refused

    def push_and_wait(self) -> list[Event]:
        refused = self.push()
        return refused or self._fetch(1)

    def wait(self) -> bool:
        if not self._stopping:
            os.eventfd_read(self._told)
        return not self._stopping

    def reap(self) -> list[Event]:
        events: list[Event] = []
        while True:
            found = self._fetch(0)
            events += found
            if len(found) < _BATCH:
                return events

    def _fetch(self, least: int) -> list[Event]:
        time = None if least else ctypes.addressof(self._no_time)
        count = _getevents(self._numbers.getevents, self._context, least, _BATCH, self._events_at, time)
        if count <= 0:
            code = syscalls.last_error() if count < 0 else 0
            if code not in (0, errno.EINTR):
                raise OSError(code, os.strerror(code))
            return []
        return [
            (slot, result) for slot, _, result, _ in _EVENT.iter_unpack(memoryview(self._events)[: count * _EVENT.size])
        ]

    def fileno(self) -> int:
        return self._told

    def clear(self) -> None:
        os.eventfd_read(self._told)

    def stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._told, 1)

    def close(self) -> None:
        if self._told >= 0:
            syscalls.aio_destroy(self._numbers.destroy, self._context)
            os.close(self._told)
            self._told = -1


def _explain(code: int, entries: int) -> str:
    if code == errno.ENOSYS:
        return "aio=native: this kernel has no Linux AIO; aio=threads works everywhere"
    if code in (errno.EPERM, errno.EACCES):
        return "aio=native: Linux AIO is forbidden here, by a seccomp filter perhaps; aio=threads works everywhere"
    if code == errno.EAGAIN:
        return (
            f"aio=native: {entries} requests are more than the system has left (fs.aio-max-nr); aio=threads needs none"
        )
    return f"aio=native: io_setup: {os.strerror(code)}; aio=threads works everywhere"


class NativeEngine(KernelEngine):
    """Host I/O by Linux AIO."""

    name = "native"

    def make_queue(self, host: EngineHost, entries: int) -> KernelQueue:
        _check_direct(host.node)
        return Context(entries)


def _check_direct(node: Node | None) -> None:
    """Raise UsageError where the image's file goes through the page cache."""
    while node is not None:
        if isinstance(node, FileProtocol):
            if not node.direct:
                raise UsageError(NATIVE_NEEDS_DIRECT)
            return
        node = next(iter(node.children().values()), None)
