"""The commands that move data or change it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from ...errors import BlockError, ImageError, UsageError, VmError
from ..getopt import UNKNOWN, LibraryGetopt
from ..img.common import reason
from .commands import usage
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


class _UsageError(Exception):
    """The command's words are wrong; it ends with how it is to be used."""


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
        except _UsageError:
            return usage(session, words)

    return run


def _scan(
    session: Session, words: Sequence[str], short: str, *, numbers: str = "", until: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """A command's options with their values, and its operands.

    The value of ``-P`` is a byte, those of the options among *numbers* are numbers. The scan ends with an option among
    *until*.
    """
    given: dict[str, Any] = {}
    scan = LibraryGetopt(words, short)
    for key, value in scan:
        if key == UNKNOWN:
            raise _UsageError
        given[key] = _pattern(value) if key == "P" else _number(session, value) if key in numbers else value
        if key in until:
            break
    return given, scan.rest


def _place(session: Session, operands: Sequence[str]) -> tuple[int, int]:
    """Offset and length, the two operands of a command."""
    if len(operands) != 2:
        raise _UsageError
    return _number(session, operands[0]), _number(session, operands[1])


def _places(session: Session, operands: Sequence[str]) -> tuple[int, list[int]]:
    """Offset and lengths of the buffers, the operands of a vectored command."""
    if len(operands) < 2:
        raise _UsageError
    offset = _number(session, operands[0])
    lengths: list[int] = []
    for text in operands[1:]:
        length = _number(session, text)
        if length > MAX_REQUEST:
            raise _WrongError(f"Argument '{text}' exceeds maximum size {MAX_REQUEST}")
        if sum(lengths) > MAX_REQUEST - length:
            raise _WrongError(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
        lengths.append(length)
    return offset, lengths


def _found(
    given: dict[str, Any], buffer: memoryview, offset: int, taken: int, first: int = 0, count: int | None = None
) -> tuple[int, str]:
    """Exit status of a read, and what is to be said about it; *first* and *count* are of the bytes to compare."""
    part = buffer[first:] if count is None else buffer[first : first + count]
    status, text = 0, ""
    if "P" in given and not _holds(part, given["P"]):
        status, text = 1, f"Pattern verification failed at offset {offset + first}, {len(part)} bytes\n"
    if "q" not in given:
        if "v" in given:
            text += dump(buffer, offset)
        text += report("read", offset, len(buffer), len(buffer), 1, taken, bare="C" in given)
    return status, text


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
    """Raise EIO where a request passes the image's end, ENOMEDIUM where there is no medium."""
    if session.empty:
        raise BlockError.of(errno.ENOMEDIUM)
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
    given, operands = _scan(session, words, "bCl:pP:qs:v", numbers="ls")
    offset, length = _place(session, operands)
    if length > MAX_REQUEST:
        raise _WrongError(f"length cannot exceed {MAX_REQUEST}, given {operands[1]}")
    if "P" not in given and ("s" in given or "l" in given):
        raise _UsageError
    first = given.get("s", 0)
    count = given.get("l", length - first)
    if count < 0 or count > length - first:
        raise _WrongError("pattern verification range exceeds end of read data")
    state = "b" in given
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
    status, text = _found(given, buffer, offset, taken, first, count)
    session.out.write(text)
    return status


def _whole_sectors(offset: int, length: int) -> None:
    for value, name in ((offset, "offset"), (length, "count")):
        if value % SECTOR:
            raise _WrongError(f"{value} is not a sector-aligned value for '{name}'")


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
    given, operands = _scan(session, words, "CP:qv")
    offset, lengths = _places(session, operands)
    total = sum(lengths)
    buffer = _target(session, total)
    node = session.image
    taken, failure = _timed(session, lambda: _do_read(session, node, offset, _cut(buffer, lengths), total))
    if failure is not None:
        session.out.write(f"readv failed: {_failed(failure)}\n")
        return 1
    status, text = _found(given, buffer, offset, taken)
    session.out.write(text)
    return status


# write, writev


@_told
def write(session: Session, words: Sequence[str]) -> int:
    """``write``: a pattern, a file's bytes, zeroes by metadata, compressed, or to the machine's state."""
    given, operands = _scan(session, words, "bcCfnpP:qs:uz")
    flags, source = set(given), given.get("s")
    if len(operands) != 2:
        raise _UsageError
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
    offset, length = _place(session, operands)
    if length > MAX_REQUEST and "n" not in flags:
        raise _WrongError(f"length cannot exceed {MAX_REQUEST} without -n, given {operands[1]}")
    if flags & {"b", "c"}:
        _whole_sectors(offset, length)
    node, fua = session.image, "f" in flags
    buffers: list[memoryview] = []
    if "z" not in flags:
        buffers = _from_file(source, length) if source is not None else _repeated(session, given.get("P", FILL), length)

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
    given, operands = _scan(session, words, "CfP:q")
    offset, lengths = _places(session, operands)
    total = sum(lengths)
    buffers = [view for length in lengths for view in _repeated(session, given.get("P", FILL), length)]
    taken, failure = _timed(session, lambda: _do_write(session, offset, buffers, total, fua="f" in given))
    if failure is not None:
        session.out.write(f"writev failed: {_failed(failure)}\n")
        return 1
    if "q" not in given:
        session.out.write(report("wrote", offset, total, total, 1, taken, bare="C" in given))
    return 0


# aio_read, aio_write, aio_flush


@_told
def aio_read(session: Session, words: Sequence[str]) -> int:
    """``aio_read``: reads while the commands go on."""
    given, operands = _scan(session, words, "CP:iqv")
    if "i" in given:
        session.out.write("injecting invalid read request\n")
        return 0
    offset, lengths = _places(session, operands)
    total = sum(lengths)
    buffer = _target(session, total)
    node = session.image
    started = monotonic_ns()

    def work() -> str:
        try:
            _do_read(session, node, offset, _cut(buffer, lengths), total)
        except (OSError, VmError) as error:
            return f"readv failed: {_failed(error)}\n"
        return _found(given, buffer, offset, monotonic_ns() - started)[1]

    session.queue.submit(work)
    return 0


@_told
def aio_write(session: Session, words: Sequence[str]) -> int:
    """``aio_write``: writes while the commands go on."""
    flags, operands = _scan(session, words, "CfiP:quz", until="i")
    if "i" in flags:
        session.out.write("injecting invalid write request\n")
        return 0
    zeroes = "z" in flags
    if len(operands) < 2:
        raise _UsageError
    if zeroes and len(operands) != 2:
        raise _WrongError("-z supports only a single length parameter")
    if "u" in flags and not zeroes:
        raise _WrongError("-u requires -z to be specified")
    buffers: list[memoryview] = []
    if zeroes:
        offset, total = _place(session, operands)
    else:
        offset, lengths = _places(session, operands)
        total = sum(lengths)
        buffers = [view for length in lengths for view in _repeated(session, flags.get("P", FILL), length)]
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
    given, operands = _scan(session, words, "Cq")
    offset, length = _place(session, operands)
    if length > MAX_REQUEST:
        raise _WrongError(f"length cannot exceed {MAX_REQUEST}, given {operands[1]}")
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
    if "q" not in given:
        session.out.write(report("discard", offset, length, length, 1, taken, bare="C" in given))
    return 0


@_told
def truncate(session: Session, words: Sequence[str]) -> int:
    """``truncate``: another virtual size."""
    preallocation = "off"
    scan = LibraryGetopt(words, "m:")
    for key, value in scan:
        if key == UNKNOWN:
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
        from ...block.resize import NOT_RESIZABLE, grow_allocated, resizable

        if session.empty:
            raise UsageError("No medium inserted")
        if not resizable(node):
            raise UsageError(NOT_RESIZABLE)
        if preallocation == "off":
            node.truncate(size)
        else:
            grow_allocated(node, size, preallocation)

    _, failure = _timed(session, work)
    if failure is not None:
        session.tool.error(reason(failure))
        return 1
    return 0
