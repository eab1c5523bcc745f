"""The protocol driver ``file``: a regular file on the host.

Theory of operation. Everything is positional I/O on one descriptor, so threads need no lock. With ``cache.direct`` the
file is open with O_DIRECT: requests whose offset and length are aligned go to the system as they are, the rest through
a bounce buffer, where an unaligned write (read, change, write back) excludes others on the same blocks. The size is
kept here, because asking the system before every request would double its cost; nobody else changes the file while we
hold its lock, and :meth:`FileProtocol.invalidate` asks anew where somebody may.

A flush is one fdatasync, left out where nothing was written since the last. A failed one is remembered: the kernel may
have dropped the pages it could not write and would report success the next time.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import BlockError, ImageError, UsageError
from . import locks
from .fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate, worth_reserving
from .mapping import Kind, Mapping
from .node import Buffer, Node, Protocol
from .passage import Span
from .rangelock import RangeLock
from .vectors import cut, fill, gather, scatter, total, zero_views

if TYPE_CHECKING:
    import mmap

    from .open import OpenContext
    from .passage import Hold

#: Vectors that one system call takes.
IOV_MAX = 1024
with suppress(AttributeError, OSError, ValueError):  # no sysconf (Windows), or it does not know
    IOV_MAX = os.sysconf("SC_IOV_MAX")

#: Bytes that one system call writes. For aligned writes of 1 MiB and more Linux looks for large blocks of free memory,
#: which in a virtual machine its host may have taken back: fetching those again costs four times what is saved.
WRITE_MAX = 512 * 1024
#: Writes from this many bytes on go one by one: Linux lets one writer at a time into a file, and has the others spin.
WRITE_LONG = 128 * 1024
#: Where much is going to be written (:meth:`FileProtocol.expect_much`) space is set aside for writes from this many on.
RESERVE_LEAST = 256 * 1024
#: Bytes that a bounce buffer holds.
BOUNCE = 1024 * 1024
#: Bytes at the start of a new file that have host space at once.
FIRST_BLOCK = 4096
#: Zeroes are written in requests of this many bytes where the system cannot make them.
ZERO_STEP = 4 * 1024 * 1024

#: QEMU's words.
NATIVE_NEEDS_DIRECT = "aio=native was specified, but it requires cache.direct=on, which was not specified."
#: Those that QEMU knows.
KNOWN_ENGINES = ("threads", "native", "io_uring")

_DSYNC = getattr(os, "RWF_DSYNC", 0)
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_VECTORED = hasattr(os, "preadv")


def _error(error: OSError) -> BlockError:
    return BlockError.of(error.errno or errno.EIO, error.strerror or "")


class FileProtocol(Protocol):
    """A regular file. Reads past its end give zeroes, writes past its end grow it."""

    driver = "file"
    #: The engine that a backend on top should use.
    aio: str = "threads"

    def __init__(
        self,
        fd: int,
        filename: str,
        *,
        readonly: bool = True,
        direct: bool = False,
        no_flush: bool = False,
        unmap: bool = True,
        alignment: int | None = None,
    ) -> None:
        """Take over the open descriptor *fd*. *unmap* tells whether discard gives space back to the file system.

        *alignment* is what O_DIRECT wants; found out if None.
        """
        self._fd = fd
        self.filename = filename
        self.readonly = readonly
        self.direct = direct
        self.no_flush = no_flush
        self.unmap = unmap
        self._size = self._query_size()
        self._growing = Lock()
        self._long_writes = Lock()
        self._writes = count(1)
        self._written = 0
        self._flushed = 0
        self._flush_failure: OSError | None = None
        self._can_punch = self._can_zero = self._can_seek_holes = hasattr(os, "SEEK_DATA")
        self._can_dsync = bool(_DSYNC)
        self._can_nowait = bool(_NOWAIT)
        self._reserves = False
        self._locked = self._claimed = False
        self._blocks = RangeLock() if direct else None
        if direct:
            self.request_alignment = alignment or self._find_alignment()

    # Opening and creating

    @classmethod
    def claims(cls, filename: str) -> int:
        """Any path; a driver for devices outbids this one where there is a device."""
        return 1

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        return {"filename": filename.removeprefix(f"{cls.driver}:")}

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Protocol:
        filename = options.pop("filename", None)
        if not isinstance(filename, str) or not filename:
            raise UsageError(f"{cls.driver}: the option 'filename' is missing").put(
                f"The '{cls.driver}' block driver requires a file name"
            )
        locking = options.pop("locking", "auto")
        aio = check_aio(options.pop("aio", context.aio))
        readonly = context.readonly
        try:
            fd = _open(filename, readonly=readonly, direct=context.cache.direct)
        except OSError as error:
            if readonly or not context.auto_readonly or error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise ImageError("", f"Could not open '{filename}': {error.strerror}") from None
            readonly = True
            try:
                fd = _open(filename, readonly=True, direct=context.cache.direct)
            except OSError as second:
                raise ImageError("", f"Could not open '{filename}': {second.strerror}") from None
        try:
            cls._check_type(fd, filename)
            if aio == "native" and not context.cache.direct:
                raise UsageError(NATIVE_NEEDS_DIRECT)
            if locking != "off":
                cls._lock(fd, filename, context, readonly)
            node = cls(
                fd,
                filename,
                readonly=readonly,
                direct=context.cache.direct,
                no_flush=context.cache.no_flush,
                unmap=context.discard,
            )
            node._locked = locking != "off" and not context.share
            node.aio = aio
            return node
        except OSError as error:
            os.close(fd)
            raise ImageError("", f"Could not open '{filename}': {error.strerror}") from None
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _check_type(cls, fd: int, filename: str) -> None:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            hint = "; use the driver host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else ""
            raise ImageError(
                filename,
                f"'file' driver requires a regular file, and this is {kind}{hint}",
                peer=f"'{cls.driver}' driver requires '{filename}' to be a regular file",
            )

    @classmethod
    def _lock(cls, fd: int, filename: str, context: OpenContext, readonly: bool) -> None:
        if context.share:
            if not readonly:
                raise UsageError("force-share=on (-U) goes with read-only images alone").put(
                    "force-share=on can only be used with read-only images"
                )
            return
        locks.acquire(fd, filename, (locks.CONSISTENT_READ,) if readonly else (locks.CONSISTENT_READ, locks.WRITE), ())

    @contextmanager
    def alone(self) -> Iterator[None]:
        refuses = (locks.CONSISTENT_READ,) if self._locked else ()
        locks.acquire(self._fd, self.filename, (), refuses)
        try:
            yield
        finally:
            locks.unrefuse(self._fd, refuses)

    def claim(self) -> None:
        if self._locked and not self._claimed:
            locks.acquire(
                self._fd, self.filename, () if self.readonly else (locks.RESIZE,), (locks.WRITE, locks.RESIZE)
            )
            self._claimed = True

    @classmethod
    def create(cls, options: dict[str, Any], size: int) -> None:
        filename = options.pop("filename")
        nocow, extent_size = options.pop("nocow", False), options.pop("extent_size_hint", None)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            fd = os.open(filename, flags, 0o644)
        except OSError as error:
            raise ImageError("", f"Could not create '{filename}': {error.strerror}") from None
        try:
            # An image that somebody has open is not ours to empty; raw ones may be shared by those who say so.
            locks.acquire(fd, filename, (locks.WRITE, locks.RESIZE), (locks.RESIZE,))
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
                from . import filehints

                if nocow:
                    filehints.no_copy_on_write(fd)
                filehints.extent_size(fd, filehints.EXTENT_SIZE if extent_size is None else extent_size)
                os.ftruncate(fd, size)
        except OSError as error:
            raise ImageError("", f"Could not resize '{filename}' to {size} bytes: {error.strerror}") from None
        finally:
            os.close(fd)

    def reopen(self, *, readonly: bool) -> None:
        """Change between read-only and read-write, keeping locks and place in the graph. Raises ImageError."""
        if readonly != self.readonly:
            self._reopen(readonly, self.direct)

    def recache(self, *, direct: bool, no_flush: bool) -> None:
        """Change what the host's page cache and flushes are for. Nothing is in flight. Raises ImageError."""
        if direct != self.direct:
            self.flush()
            self._reopen(self.readonly, direct)
            self.direct = direct
            self._blocks = RangeLock() if direct else None
            self.request_alignment = self._find_alignment() if direct else 1
        self.no_flush = no_flush

    def _reopen(self, readonly: bool, direct: bool) -> None:
        try:
            fd = _open(self.filename, readonly=readonly, direct=direct)
        except OSError as error:
            raise ImageError("", f"Could not reopen '{self.filename}': {error.strerror}") from None
        before, after = os.fstat(self._fd), os.fstat(fd)
        if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino):
            os.close(fd)
            raise ImageError(self.filename, "is another file now; not reopened")
        old = self._fd
        if self._locked:
            uses = (locks.CONSISTENT_READ,) if readonly else (locks.CONSISTENT_READ, locks.WRITE, locks.RESIZE)
            refuses = (locks.WRITE, locks.RESIZE) if self._claimed else ()
            locks.release(old)
            try:
                locks.acquire(fd, self.filename, uses[: 3 if self._claimed else 2], refuses)
            except BaseException:
                os.close(fd)
                self._relock()
                raise
        os.dup2(fd, old, inheritable=False)  # requests in flight keep a valid number
        os.close(fd)
        self.readonly = readonly

    def _relock(self) -> None:
        """Take the locks of an unchanged descriptor again."""
        uses = (locks.CONSISTENT_READ,) if self.readonly else (locks.CONSISTENT_READ, locks.WRITE, locks.RESIZE)
        refuses = (locks.WRITE, locks.RESIZE) if self._claimed else ()
        locks.acquire(self._fd, self.filename, uses[: 3 if self._claimed else 2], refuses)

    # Size

    def _query_size(self) -> int:
        return os.fstat(self._fd).st_size

    @property
    def size(self) -> int:
        return self._size

    def invalidate(self) -> None:
        self._size = self._query_size()

    def _grown(self, end: int) -> None:
        with self._growing:
            if end > self._size:
                self._size = end

    def truncate(self, size: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        try:
            with self._growing:
                first = not self._size
                os.ftruncate(self._fd, size)
                self._size = size
                if first and size:
                    # As in QEMU the first block is allocated, so that O_DIRECT's alignment can be found by reading it.
                    _pwritev(self._fd, zero_views(min(size, FIRST_BLOCK)), 0)
        except OSError as error:
            raise _error(error) from None
        finally:
            self._written = next(self._writes)

    def allocated(self) -> int:
        status = os.fstat(self._fd)
        blocks: int | None = getattr(status, "st_blocks", None)
        return status.st_size if blocks is None else blocks * 512

    # Reading

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._blocks is not None:
            self._read_direct(offset, buffers)
            return
        try:
            if _VECTORED and len(buffers) <= IOV_MAX:
                done = os.preadv(self._fd, buffers, offset)
                if done == total(buffers):
                    return
            else:
                done = 0
            self._read_rest(offset, buffers, done)
        except OSError as error:
            raise _error(error) from None

    def _read_rest(self, offset: int, buffers: Sequence[Buffer], done: int) -> None:
        """Go on after a short transfer: a signal, the system's limit of 2 GiB, or the end of the file."""
        length = total(buffers)
        while done < length:
            rest = cut(buffers, done, length - done)
            got = _preadv(self._fd, rest[:IOV_MAX], offset + done)
            if not got:
                fill(rest)
                return
            done += got

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Read if the bytes are in the page cache. False: nothing promised, use :meth:`read`."""
        if not self._can_nowait or self._blocks is not None:
            return False
        try:
            return os.preadv(self._fd, buffers, offset, _NOWAIT) == total(buffers)
        except BlockingIOError:
            return False
        except OSError:
            self._can_nowait = False
            return False

    def _read_direct(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = total(buffers)
        mask = self.request_alignment - 1
        try:
            if not (offset | length) & mask and not _ragged(buffers, mask):
                try:
                    done = _preadv(self._fd, buffers[:IOV_MAX], offset)
                    if done == length:
                        return
                except OSError as error:
                    if error.errno != errno.EINVAL:  # EINVAL: memory that is not aligned
                        raise
            bounce = _take_bounce()
            try:
                self._read_bounced(bounce, offset, length, buffers)
            finally:
                _give_bounce(bounce)
        except OSError as error:
            raise _error(error) from None

    def _read_bounced(self, bounce: mmap.mmap, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        mask = self.request_alignment - 1
        position, end = offset, offset + length
        with memoryview(bounce) as view:
            while position < end:
                start = position & ~mask
                stop = min(end, start + BOUNCE)
                self._fill_bounce(view, start, (stop - start + mask) & ~mask)
                scatter(view[position - start : stop - start], cut(buffers, position - offset, stop - position))
                position = stop

    def _fill_bounce(self, view: memoryview, start: int, length: int) -> None:
        """Read an aligned range into the bounce buffer's beginning; zeroes past the end of the file."""
        done = 0
        while done < length:
            got = _preadv(self._fd, [view[done:length]], start + done)
            done += got
            if not got or done & (self.request_alignment - 1):  # the end of the file
                fill([view[done:length]])
                return

    # Engines

    def host_spans(
        self, offset: int, length: int, spans: list[Span], holds: list[Hold], *, write: bool, stable: bool
    ) -> bool:
        blocks = self._blocks
        if blocks is not None and (offset | length) & (self.request_alignment - 1):
            return False
        if write:
            if self.readonly or (stable and not self._can_dsync):
                return False
            if blocks is not None:
                if not blocks.mutex.acquire(blocking=False):
                    return False
                try:
                    ticket = blocks.try_shared(offset, offset + length)
                finally:
                    blocks.mutex.release()
                if ticket is None:
                    return False
                holds.append((blocks, ticket))
        spans.append(Span(self, offset, length))
        return True

    def moved(self, offset: int, length: int, *, stable: bool, failed: bool) -> None:
        """An engine wrote to the descriptor, or with *failed* tried to."""
        if failed:
            self._written = next(self._writes)
            self._size = max(self._size, self._query_size())
            return
        if offset + length > self._size:
            self._grown(offset + length)
        if not stable:
            self._written = next(self._writes)

    # Writing

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        stable = False
        length = total(buffers)
        fua = fua and not self.no_flush
        try:
            if self._blocks is not None:
                self._write_direct(offset, length, buffers)
            else:
                flags = _DSYNC if fua and self._can_dsync else 0
                if flags:
                    stable = self._write_stable(offset, length, buffers, flags)
                elif length < WRITE_LONG:
                    self._write_cached(offset, length, buffers)
                else:
                    with self._long_writes:
                        if self._reserves and length >= RESERVE_LEAST:
                            self._set_aside(offset, length)
                        self._write_cached(offset, length, buffers)
        except OSError as error:
            self._written = next(self._writes)
            self._size = max(self._size, self._query_size())
            raise _error(error) from None
        if offset + length > self._size:
            self._grown(offset + length)
        if not stable:
            self._written = next(self._writes)
            if fua:
                self.flush()

    def _write_cached(self, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        done = 0
        while done < length:
            done += _pwritev(self._fd, _next_piece(offset, length, buffers, done), offset + done)

    def _write_stable(self, offset: int, length: int, buffers: Sequence[Buffer], flags: int) -> bool:
        """Write with *flags*; whether all of it is stable then."""
        done = 0
        while done < length:
            try:
                done += os.pwritev(self._fd, _next_piece(offset, length, buffers, done), offset + done, flags)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP or not flags:
                    raise
                self._can_dsync = False
                flags = 0
        return bool(flags)

    def expect_much(self) -> None:
        """A job is going to write much to where nothing is yet."""
        self._reserves = self._blocks is None and not self.readonly and worth_reserving(self._fd)

    def _set_aside(self, offset: int, length: int) -> None:
        """Have host space for a write before it comes; the write itself tells where there is none."""
        try:
            if fallocate(self._fd, KEEP_SIZE, offset, length):
                return
        except OSError:
            pass
        self._reserves = False

    def _write_direct(self, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        assert self._blocks is not None
        mask = self.request_alignment - 1
        aligned = not (offset | length) & mask
        with self._blocks.mutex:
            if aligned:
                ticket = self._blocks.shared(offset, offset + length)
            else:
                ticket = self._blocks.exclusive(offset & ~mask, (offset + length + mask) & ~mask)
        try:
            done = 0
            if aligned and not _ragged(buffers, mask):
                try:
                    while done < length:
                        rest = buffers if not done else cut(buffers, done, length - done)
                        done += _pwritev(self._fd, rest[:IOV_MAX], offset + done)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # EINVAL: memory that is not aligned
                        raise
            if done < length:
                bounce = _take_bounce()
                try:
                    self._write_bounced(bounce, offset, length, buffers)
                finally:
                    _give_bounce(bounce)
        finally:
            self._blocks.release(ticket)

    def _write_bounced(self, bounce: mmap.mmap, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        mask = self.request_alignment - 1
        position, end = offset, offset + length
        with memoryview(bounce) as view:
            while position < end:
                start = position & ~mask
                stop = min(end, start + BOUNCE)
                whole = (stop - start + mask) & ~mask
                if position > start:
                    self._fill_bounce(view, start, mask + 1)
                if stop < start + whole and (whole > mask + 1 or position == start):
                    self._fill_bounce(view[whole - mask - 1 :], start + whole - mask - 1, mask + 1)
                begin = position - start
                for piece in cut(buffers, position - offset, stop - position):
                    view[begin : begin + piece.nbytes] = piece
                    begin += piece.nbytes
                done = 0
                while done < whole:
                    done += _pwritev(self._fd, [view[done:whole]], start + done)
                if start + whole > stop and start + whole > self._size:
                    # The last block reached past what was asked for: the file's length is part of what a guest sees.
                    with self._growing:
                        self._size = max(self._size, stop)
                        os.ftruncate(self._fd, self._size)
                position = stop

    def copy_from(self, offset: int, source: FileProtocol, start: int, length: int, *, share: bool) -> int:
        """Have the host put *length* bytes of *source* from *start* on to *offset*; returns how many it did.

        With *share* the files then share the blocks: all of them, or none.
        """
        from . import sharing

        if self.readonly:
            raise self.read_only_error()
        try:
            if share:
                done = length if sharing.share_range(source._fd, start, self._fd, offset, length) else 0
            else:
                done = sharing.copy_range(source._fd, start, self._fd, offset, length)
        except OSError as error:
            raise _error(error) from None
        finally:
            self._written = next(self._writes)
        if done:
            self._grown(offset + done)
        return done

    def flush(self) -> None:
        if self.no_flush:
            return
        if self._flush_failure is not None:
            raise _error(self._flush_failure) from None
        current = self._written
        if current == self._flushed:
            return
        try:
            _sync(self._fd)
        except OSError as error:
            if self._blocks is None:
                self._flush_failure = error
            raise _error(error) from None
        self._flushed = current

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        if not length:
            return
        try:
            done = (unmap and self.unmap and self._punch(offset, length)) or self._zero_range(offset, length)
        except OSError as error:
            raise _error(error) from None
        finally:
            self._written = next(self._writes)
        if done:
            self._grown(offset + length)
        else:
            self._zero_by_hand(offset, length)
        if fua:
            self.flush()

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        if self.readonly:
            raise self.read_only_error()
        try:
            done = (unmap and self.unmap and self._punch(offset, length)) or self._zero_range(offset, length)
        except OSError as error:
            raise _error(error) from None
        finally:
            self._written = next(self._writes)
        if done:
            self._grown(offset + length)
        return done

    def _punch(self, offset: int, length: int) -> bool:
        if not self._can_punch:
            return False
        if not fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
            self._can_punch = False
            return False
        if offset + length > self._size:
            with self._growing:
                if offset + length > self._size:
                    os.ftruncate(self._fd, offset + length)
        return True

    def _zero_range(self, offset: int, length: int) -> bool:
        if not self._can_zero:
            return False
        if not fallocate(self._fd, ZERO_RANGE, offset, length):
            self._can_zero = False
            return False
        return True

    def _zero_by_hand(self, offset: int, length: int) -> None:
        """Zeroes without the system's help: grow past the end, write before it."""
        end = offset + length
        if end > self._size:
            inside = max(0, self._size - offset)
            self.truncate(end)
            length = inside
        while length > 0:
            step = min(length, ZERO_STEP)
            self.write(offset, zero_views(step))
            offset += step
            length -= step

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        if not self.unmap or length <= 0:
            return
        length = min(length, self._size - offset)
        if length <= 0 or not self._can_punch:
            return
        try:
            if not fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
                self._can_punch = False
        except OSError as error:
            raise _error(error) from None
        finally:
            self._written = next(self._writes)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        if not full and not self.readonly:
            try:
                if fallocate(self._fd, 0, offset, length):
                    self._written = next(self._writes)
                    self._grown(offset + length)
                    return
            except OSError as error:
                raise _error(error) from None
        super().reserve(offset, length, full=True)

    # Mapping

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        end = offset + length
        limit = min(end, self._size)
        while offset < limit:
            kind, stop = self._extent(offset, limit)
            yield Mapping(kind, offset, stop - offset, self, offset, kind is Kind.DATA and not self.readonly)
            offset = stop
        if offset < end:
            yield Mapping(Kind.EOF, offset, end - offset)

    def _extent(self, offset: int, limit: int) -> tuple[Kind, int]:
        """What is at *offset* and where that ends, at most *limit*."""
        if not self._can_seek_holes:
            return Kind.DATA, limit
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
            if data > offset:
                return Kind.ZERO, min(data, limit)
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
            return Kind.DATA, min(hole, limit) if hole > offset else limit
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                return Kind.ZERO, limit
            if error.errno == errno.EINVAL:
                self._can_seek_holes = False
            return Kind.DATA, limit

    def close(self) -> None:
        if self._fd < 0:
            return
        try:
            if not self.readonly:
                self.flush()
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def fileno(self) -> int:
        """The descriptor, for copy_file_range and sendfile."""
        return self._fd

    def identity(self) -> tuple[Any, ...]:
        """What two openings of the same file have in common."""
        status = os.fstat(self._fd)
        return (status.st_dev, status.st_ino)

    # O_DIRECT

    def _find_alignment(self) -> int:
        """The smallest block that O_DIRECT takes, by trying a read at each power of two."""
        bounce = _take_bounce()
        try:
            with memoryview(bounce) as view:
                for alignment in (1, 512, 1024, 2048, 4096):
                    try:
                        _preadv(self._fd, [view[:alignment]], 0)
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
                    else:
                        # A file system that takes single bytes takes them through the page cache; a sector then.
                        return max(alignment, 512)
        finally:
            _give_bounce(bounce)
        return 4096


def check_aio(name: str) -> str:
    """The name of an engine that is there. Raises UsageError, or PluginError that says what brings it."""
    if name != "threads":
        from ..errors import PluginError
        from ..plugins import find

        try:
            find("engine", name)
        except PluginError as error:
            if "not installed" in str(error) or name in KNOWN_ENGINES:
                raise
            raise UsageError(f"aio={name}: {error}").put(f"invalid parameter value: {name}") from None
    return name


def engine_of(node: Node | None, default: str = "threads") -> str:
    """The engine that the storage below *node* asks for (the file option ``aio``); *default* where there is no file."""
    while node is not None:
        if isinstance(node, FileProtocol):
            return node.aio
        node = next(iter(node.children().values()), None)
    return default


def _open(filename: str, *, readonly: bool, direct: bool) -> int:
    flags = os.O_RDONLY if readonly else os.O_RDWR
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if not direct:
        return os.open(filename, flags)
    o_direct = getattr(os, "O_DIRECT", 0)
    if o_direct:
        try:
            return os.open(filename, flags | o_direct)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise OSError(error.errno, "the file system does not support O_DIRECT (cache=none, directsync)") from None
    fd = os.open(filename, flags)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, 48, 1)  # F_NOCACHE
    return fd


def _ragged(buffers: Sequence[Buffer], mask: int) -> bool:
    """Whether any buffer's length is no multiple of the block."""
    return any(buffer.nbytes & mask for buffer in buffers)


def _next_piece(offset: int, length: int, buffers: Sequence[Buffer], done: int) -> Sequence[Buffer]:
    """What one system call writes when *done* bytes of a write are written."""
    if done or length > WRITE_MAX:
        buffers = cut(buffers, done, min(WRITE_MAX - (offset + done) % WRITE_MAX, length - done))
    return buffers[:IOV_MAX] if len(buffers) > IOV_MAX else buffers


def _preadv(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    if _VECTORED:
        return os.preadv(fd, buffers, offset)
    if hasattr(os, "pread"):
        data = os.pread(fd, total(buffers), offset)
    else:
        with _seek_lock:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, total(buffers))
    scatter(data, cut(buffers, 0, len(data)))
    return len(data)


def _pwritev(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    if _VECTORED:
        return os.pwritev(fd, buffers, offset)
    data = gather(buffers)
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _seek_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def _sync(fd: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


#: Where there is no positional I/O, the position is shared by everybody.
_seek_lock = Lock()
_bounces: list[mmap.mmap] = []


def _take_bounce() -> mmap.mmap:
    """A page-aligned buffer of BOUNCE bytes."""
    try:
        return _bounces.pop()
    except IndexError:
        import mmap

        return mmap.mmap(-1, BOUNCE)


def _give_bounce(bounce: mmap.mmap) -> None:
    if len(_bounces) < 8:
        _bounces.append(bounce)
    else:
        bounce.close()
