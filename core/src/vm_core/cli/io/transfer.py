"""The commands that move data or change it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING

from ...errors import BlockError, ImageError, UsageError, VmError
from ..img.common import reason
from .commands import usage
from .getopt import WRONG, Getopt
from .texts import MAX_REQUEST, BadNumberError, dump, parse_c_number, parse_size, report

if TYPE_CHECKING:
    from ...block.node import Node
    from .session import Session

#: What is written unless something else is asked for, and what buffers hold before they are read into.
FILL, POISON = 0xCD, 0xAB
#: Written data is this many bytes of the pattern, again and again.
PIECE = 1 << 20
#: How far ``-m`` moves buffers.
MISALIGNMENT = 16
SECTOR = 512


class _WrongError(Exception):
    """The command's words are wrong; it ends with 1. What there is to say was printed, or is ``str()``."""


def _number(session: Session, text: str) -> int:
    try:
        return parse_size(text, session.program)
    except BadNumberError as error:
        raise _WrongError(str(error)) from None


def _pattern(text: str) -> int:
    """The byte that ``-P`` names: decimal, octal or hexadecimal, as in C."""
    value = parse_c_number(text)
    if value is None or not 0 <= value <= 255:
        raise _WrongError(f"{text} is not a valid pattern byte")
    return value


def _told(function: Callable[[Session, Sequence[str]], int]) -> Callable[[Session, Sequence[str]], int]:
    """Wrong words are told on standard output, as everything that a command finds out itself."""

    def run(session: Session, words: Sequence[str]) -> int:
        try:
            return function(session, words)
        except _WrongError as wrong:
            if wrong.args and wrong.args[0]:
                session.out.write(f"{wrong}\n")
            return 1

    return run


# Buffers


def _target(session: Session, length: int) -> memoryview:
    """Memory to read *length* bytes into."""
    if session.how.direct and length:
        import mmap

        # O_DIRECT wants memory that starts on a page, or with -m just does not get it.
        memory = mmap.mmap(-1, length + MISALIGNMENT)
        start = MISALIGNMENT if session.misalign else 0
        return memoryview(memory)[start : start + length]
    return memoryview(bytearray(length))


def _repeated(session: Session, pattern: int, length: int) -> list[memoryview]:
    """*length* bytes of *pattern* to be written."""
    if session.how.direct and length:
        view = _target(session, min(length, PIECE))
        view[:] = bytes([pattern]) * view.nbytes
    else:
        view = memoryview(bytes([pattern]) * min(length, PIECE))
    views = [view] * (length // PIECE)
    if length % PIECE:
        views.append(view[: length % PIECE])
    return views


def _from_file(path: str, length: int) -> list[memoryview]:
    """*length* bytes to be written: the file's, again and again."""
    try:
        with open(path, "rb") as file:
            data = file.read(length)
    except OSError as error:
        sys.stderr.write(f"{path}: {error.strerror}\n")
        raise _WrongError from None
    if not data:
        sys.stderr.write(f"{path}: file is empty\n")
        raise _WrongError
    if len(data) < length:
        data = (data * -(-length // len(data)))[:length]
    return [memoryview(data)]


def _holds(view: memoryview, pattern: int) -> bool:
    """Whether *view* is nothing but *pattern*."""
    expected = bytes([pattern]) * min(len(view), PIECE)
    for start in range(0, len(view), PIECE):
        piece = bytes(view[start : start + PIECE])
        if piece != (expected if len(piece) == len(expected) else expected[: len(piece)]):
            return False
    return True


# Requests


def _failed(error: BaseException) -> str:
    """What the peer says of a failed request: the error number's text."""
    code = errno.EIO
    if isinstance(error, OSError) and error.errno:
        code = error.errno
    elif isinstance(error, ImageError | UsageError):
        code = errno.ENOTSUP
    return os.strerror(code)


def _check(session: Session, offset: int, length: int) -> None:
    """Raise EIO where a request passes the image's end."""
    if offset + length > session.size:
        raise BlockError.of(errno.EIO)


def _reach(session: Session, offset: int, length: int) -> None:
    """Let a change of the last sector of an image that is no whole sectors long go to the end of that sector."""
    _check(session, offset, length)
    if offset + length > session.image.size:
        session.image.truncate(offset + length)


def _do_read(session: Session, node: Node, offset: int, buffers: Sequence[memoryview], length: int) -> None:
    _check(session, offset, length)
    if length:
        if session.how.copy_on_read:
            from .copyonread import copy_up

            copy_up(node, offset, length)
        session.io.read(offset, buffers)


def _do_write(session: Session, offset: int, buffers: Sequence[memoryview], length: int, *, fua: bool) -> None:
    _reach(session, offset, length)
    if length:
        session.io.write(offset, buffers, fua=(fua or session.writethrough) and not session.how.no_flush)


def _do_zero(
    session: Session, node: Node, offset: int, length: int, *, unmap: bool, fua: bool, fallback: bool = True
) -> None:
    _reach(session, offset, length)
    if not length:
        return
    stable = (fua or session.writethrough) and not session.how.no_flush
    if fallback:
        node.zero(offset, length, unmap=unmap, fua=stable)
    elif not node.zero_fast(offset, length, unmap=unmap):
        raise BlockError.of(errno.ENOTSUP)
    elif stable:
        node.flush()


def _do_write_compressed(session: Session, node: Node, offset: int, buffers: Sequence[memoryview], length: int) -> None:
    from ...block.formatnode import FormatNode

    _check(session, offset, length)
    if not isinstance(node, FormatNode) or not node.can_compress:
        raise BlockError.of(errno.ENOTSUP)
    node.write_compressed(offset, buffers)
    if session.writethrough and not session.how.no_flush:
        node.flush()


def _timed(session: Session, work: Callable[[], object]) -> tuple[int, BaseException | None]:
    """Do *work* now, after what was submitted before. Nanoseconds that it took, and its failure."""
    session.settle()
    started = monotonic_ns()
    failure: BaseException | None = None
    try:
        work()
    except (OSError, VmError) as error:
        failure = error
    taken = monotonic_ns() - started
    session.poll()
    return taken, failure


# read, readv


@_told
def read(session: Session, words: Sequence[str]) -> int:
    """``read``: with a pattern to be found in all or a part of it."""
    bare = quiet = verbose = state = False
    pattern: int | None = None
    first: int | None = None
    count: int | None = None
    scan = Getopt(words, "bCl:pP:qs:v")
    for key, value in scan:
        if key == "b":
            state = True
        elif key == "C":
            bare = True
        elif key == "l":
            count = _number(session, value)
        elif key == "P":
            pattern = _pattern(value)
        elif key == "q":
            quiet = True
        elif key == "s":
            first = _number(session, value)
        elif key == "v":
            verbose = True
        elif key == WRONG:
            return usage(session, words)
    if len(scan.rest) != 2:
        return usage(session, words)
    offset = _number(session, scan.rest[0])
    length = _number(session, scan.rest[1])
    if length > MAX_REQUEST:
        raise _WrongError(f"length cannot exceed {MAX_REQUEST}, given {scan.rest[1]}")
    if pattern is None and (first is not None or count is not None):
        return usage(session, words)
    first = first or 0
    if count is None:
        count = length - first
    if count < 0 or count > length - first:
        raise _WrongError("pattern verification range exceeds end of read data")
    if state:
        _whole_sectors(offset, length)
    buffer = _target(session, length)
    node = session.image
    if state:
        from .vmstate import read_state

        taken, failure = _timed(session, lambda: read_state(node, offset, buffer))
    else:
        taken, failure = _timed(session, lambda: _do_read(session, node, offset, [buffer], length))
    if failure is not None:
        session.out.write(f"read failed: {_failed(failure)}\n")
        return 1
    status = 0
    if pattern is not None and not _holds(buffer[first : first + count], pattern):
        session.out.write(f"Pattern verification failed at offset {offset + first}, {count} bytes\n")
        status = 1
    if not quiet:
        if verbose:
            session.out.write(dump(buffer, offset))
        session.out.write(report("read", offset, length, length, 1, taken, bare=bare))
    return status


def _whole_sectors(offset: int, length: int) -> None:
    for value, name in ((offset, "offset"), (length, "count")):
        if value % SECTOR:
            raise _WrongError(f"{value} is not a sector-aligned value for '{name}'")


def _lengths(session: Session, texts: Sequence[str]) -> list[int]:
    """The lengths of a vectored request's buffers."""
    lengths: list[int] = []
    for text in texts:
        length = _number(session, text)
        if length > MAX_REQUEST:
            raise _WrongError(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        if sum(lengths) > MAX_REQUEST - length:
            raise _WrongError(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
        lengths.append(length)
    return lengths


def _cut(view: memoryview, lengths: Sequence[int]) -> list[memoryview]:
    """*view* in pieces of these *lengths*, those of none left out."""
    pieces = []
    start = 0
    for length in lengths:
        if length:
            pieces.append(view[start : start + length])
        start += length
    return pieces


@_told
def readv(session: Session, words: Sequence[str]) -> int:
    """``readv``: into several buffers."""
    bare = quiet = verbose = False
    pattern: int | None = None
    scan = Getopt(words, "CP:qv")
    for key, value in scan:
        if key == "C":
            bare = True
        elif key == "P":
            pattern = _pattern(value)
        elif key == "q":
            quiet = True
        elif key == "v":
            verbose = True
        elif key == WRONG:
            return usage(session, words)
    if len(scan.rest) < 2:
        return usage(session, words)
    offset = _number(session, scan.rest[0])
    lengths = _lengths(session, scan.rest[1:])
    total = sum(lengths)
    buffer = _target(session, total)
    node = session.image
    taken, failure = _timed(session, lambda: _do_read(session, node, offset, _cut(buffer, lengths), total))
    if failure is not None:
        session.out.write(f"readv failed: {_failed(failure)}\n")
        return 1
    status = 0
    if pattern is not None and not _holds(buffer, pattern):
        session.out.write(f"Pattern verification failed at offset {offset}, {total} bytes\n")
        status = 1
    if not quiet:
        if verbose:
            session.out.write(dump(buffer, offset))
        session.out.write(report("read", offset, total, total, 1, taken, bare=bare))
    return status


# write, writev


@_told
def write(session: Session, words: Sequence[str]) -> int:
    """``write``: a pattern, a file's bytes, zeroes by metadata, compressed, or to the machine's state."""
    flags: set[str] = set()
    pattern = FILL
    source: str | None = None
    scan = Getopt(words, "bcCfnpP:qs:uz")
    for key, value in scan:
        if key == WRONG:
            return usage(session, words)
        flags.add(key)
        if key == "P":
            pattern = _pattern(value)
        elif key == "s":
            source = value
    if len(scan.rest) != 2:
        return usage(session, words)
    if "b" in flags and "z" in flags:
        raise _WrongError("-b and -z cannot be specified at the same time")
    if "f" in flags and flags & {"b", "c"}:
        raise _WrongError("-f and -b or -c cannot be specified at the same time")
    if "n" in flags and "z" not in flags:
        raise _WrongError("-n requires -z to be specified")
    if "u" in flags and "z" not in flags:
        raise _WrongError("-u requires -z to be specified")
    if len(flags & {"z", "P", "s"}) > 1:
        raise _WrongError("Only one of -z, -P, and -s can be specified at the same time")
    offset = _number(session, scan.rest[0])
    length = _number(session, scan.rest[1])
    if length > MAX_REQUEST and "n" not in flags:
        raise _WrongError(f"length cannot exceed {MAX_REQUEST} without -n, given {scan.rest[1]}")
    if flags & {"b", "c"}:
        _whole_sectors(offset, length)
    node, fua = session.image, "f" in flags
    buffers: list[memoryview] = []
    if "z" not in flags:
        buffers = _repeated(session, pattern, length) if source is None else _from_file(source, length)

    def work() -> None:
        if "b" in flags:
            from .vmstate import write_state

            write_state(node, offset, buffers)
            if session.writethrough and not session.how.no_flush:
                node.flush()
        elif "z" in flags:
            _do_zero(session, node, offset, length, unmap="u" in flags, fua=fua, fallback="n" not in flags)
        elif "c" in flags:
            _do_write_compressed(session, node, offset, buffers, length)
        else:
            _do_write(session, offset, buffers, length, fua=fua)

    taken, failure = _timed(session, work)
    if failure is not None:
        session.out.write(f"write failed: {_failed(failure)}\n")
        return 1
    if "q" not in flags:
        session.out.write(report("wrote", offset, length, length, 1, taken, bare="C" in flags))
    return 0


@_told
def writev(session: Session, words: Sequence[str]) -> int:
    """``writev``: from several buffers."""
    bare = quiet = fua = False
    pattern = FILL
    scan = Getopt(words, "CfP:q")
    for key, value in scan:
        if key == "C":
            bare = True
        elif key == "f":
            fua = True
        elif key == "P":
            pattern = _pattern(value)
        elif key == "q":
            quiet = True
        elif key == WRONG:
            return usage(session, words)
    if len(scan.rest) < 2:
        return usage(session, words)
    offset = _number(session, scan.rest[0])
    lengths = _lengths(session, scan.rest[1:])
    total = sum(lengths)
    buffers = [view for length in lengths for view in _repeated(session, pattern, length)]
    taken, failure = _timed(session, lambda: _do_write(session, offset, buffers, total, fua=fua))
    if failure is not None:
        session.out.write(f"writev failed: {_failed(failure)}\n")
        return 1
    if not quiet:
        session.out.write(report("wrote", offset, total, total, 1, taken, bare=bare))
    return 0


# aio_read, aio_write, aio_flush


@_told
def aio_read(session: Session, words: Sequence[str]) -> int:
    """``aio_read``: reads while the commands go on."""
    bare = quiet = verbose = invalid = False
    pattern: int | None = None
    scan = Getopt(words, "CP:iqv")
    for key, value in scan:
        if key == "C":
            bare = True
        elif key == "P":
            pattern = _pattern(value)
        elif key == "i":
            invalid = True
        elif key == "q":
            quiet = True
        elif key == "v":
            verbose = True
        elif key == WRONG:
            return usage(session, words)
    if invalid:
        session.out.write("injecting invalid read request\n")
        return 0
    if len(scan.rest) < 2:
        return usage(session, words)
    offset = _number(session, scan.rest[0])
    lengths = _lengths(session, scan.rest[1:])
    total = sum(lengths)
    buffer = _target(session, total)
    node = session.image
    started = monotonic_ns()

    def work() -> str:
        try:
            _do_read(session, node, offset, _cut(buffer, lengths), total)
        except (OSError, VmError) as error:
            return f"readv failed: {_failed(error)}\n"
        taken = monotonic_ns() - started
        text = ""
        if pattern is not None and not _holds(buffer, pattern):
            text = f"Pattern verification failed at offset {offset}, {total} bytes\n"
        if not quiet:
            if verbose:
                text += dump(buffer, offset)
            text += report("read", offset, total, total, 1, taken, bare=bare)
        return text

    session.queue.submit(work)
    return 0


@_told
def aio_write(session: Session, words: Sequence[str]) -> int:
    """``aio_write``: writes while the commands go on."""
    flags: set[str] = set()
    pattern = FILL
    scan = Getopt(words, "CfiP:quz")
    for key, value in scan:
        if key == WRONG:
            return usage(session, words)
        flags.add(key)
        if key == "P":
            pattern = _pattern(value)
        elif key == "i":
            session.out.write("injecting invalid write request\n")
            return 0
    if len(scan.rest) < 2:
        return usage(session, words)
    zeroes = "z" in flags
    if zeroes and len(scan.rest) != 2:
        raise _WrongError("-z supports only a single length parameter")
    if "u" in flags and not zeroes:
        raise _WrongError("-u requires -z to be specified")
    offset = _number(session, scan.rest[0])
    if zeroes:
        total = _number(session, scan.rest[1])
        buffers: list[memoryview] = []
    else:
        lengths = _lengths(session, scan.rest[1:])
        total = sum(lengths)
        buffers = [view for length in lengths for view in _repeated(session, pattern, length)]
    node, fua = session.image, "f" in flags
    started = monotonic_ns()

    def work() -> str:
        try:
            if zeroes:
                _do_zero(session, node, offset, total, unmap="u" in flags, fua=fua)
            else:
                _do_write(session, offset, buffers, total, fua=fua)
        except (OSError, VmError) as error:
            return f"aio_write failed: {_failed(error)}\n"
        taken = monotonic_ns() - started
        return "" if "q" in flags else report("wrote", offset, total, total, 1, taken, bare="C" in flags)

    session.queue.submit(work)
    return 0


def aio_flush(session: Session, words: Sequence[str]) -> int:
    """``aio_flush``: wait for all of them."""
    if session.busy:
        session.queue.flush()
    return 0


# flush, discard, truncate


def flush(session: Session, words: Sequence[str]) -> int:
    """``flush``: everything written becomes stable."""
    _, failure = _timed(session, session.image.flush)
    return 0 if failure is None else 1


@_told
def discard(session: Session, words: Sequence[str]) -> int:
    """``discard``: bytes that are no longer needed."""
    bare = quiet = False
    scan = Getopt(words, "Cq")
    for key, _ in scan:
        if key == "C":
            bare = True
        elif key == "q":
            quiet = True
        else:
            return usage(session, words)
    if len(scan.rest) != 2:
        return usage(session, words)
    offset = _number(session, scan.rest[0])
    length = _number(session, scan.rest[1])
    if length > MAX_REQUEST:
        raise _WrongError(f"length cannot exceed {MAX_REQUEST}, given {scan.rest[1]}")
    node = session.image

    def work() -> None:
        _check(session, offset, length)
        inside = min(length, node.size - offset)
        if inside > 0:
            node.discard(offset, inside)

    taken, failure = _timed(session, work)
    if failure is not None:
        session.out.write(f"discard failed: {_failed(failure)}\n")
        return 1
    if not quiet:
        session.out.write(report("discard", offset, length, length, 1, taken, bare=bare))
    return 0


@_told
def truncate(session: Session, words: Sequence[str]) -> int:
    """``truncate``: another virtual size."""
    preallocation = "off"
    scan = Getopt(words, "m:")
    for key, value in scan:
        if key == WRONG:
            return usage(session, words)
        preallocation = value
        if value not in ("off", "metadata", "falloc", "full"):
            session.tool.error(f"Invalid preallocation mode '{value}'")
            return 1
    if not scan.rest:
        return usage(session, words)
    size = _number(session, scan.rest[0])
    node = session.image

    def work() -> None:
        if preallocation == "off":
            node.truncate(size)
        else:
            from ...block.resize import grow_allocated

            grow_allocated(node, size, preallocation)

    _, failure = _timed(session, work)
    if failure is not None:
        session.tool.error(reason(failure))
        return 1
    return 0
