"""The system calls, which the C library wraps only in part, through ctypes.

ctypes lets go of the interpreter's lock while a call lasts. Numbers: ``asm/unistd.h`` of each architecture; those of
io_uring (Linux 5.1 and later) are the same everywhere but on Alpha.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

from vm_core.errors import UsageError

IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427


class AioNumbers(NamedTuple):
    """Numbers of Linux AIO's calls."""

    setup: int
    destroy: int
    getevents: int
    submit: int


_AIO = {
    "x86_64": AioNumbers(206, 207, 208, 209),
    "i386": AioNumbers(245, 246, 247, 248),
    "i686": AioNumbers(245, 246, 247, 248),
    "aarch64": AioNumbers(0, 1, 4, 2),
    "riscv64": AioNumbers(0, 1, 4, 2),
    "loongarch64": AioNumbers(0, 1, 4, 2),
    "armv7l": AioNumbers(243, 244, 245, 246),
    "ppc64le": AioNumbers(227, 228, 229, 230),
    "ppc64": AioNumbers(227, 228, 229, 230),
    "s390x": AioNumbers(243, 244, 245, 246),
}

_long = ctypes.c_long
_pointer = ctypes.c_void_p


def _function(*arguments: type) -> ctypes._NamedFuncPointer:
    """The C library's ``syscall`` for a call with these arguments."""
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.argtypes = [_long, *arguments]
    function.restype = _long
    return function


def require_linux(engine: str) -> None:
    """Raise UsageError on other systems."""
    if sys.platform != "linux":
        raise UsageError(
            f"aio={engine} is a facility of Linux, and this is {sys.platform}; aio=threads works everywhere"
        )


def aio_numbers() -> AioNumbers:
    """This architecture's. Raises UsageError."""
    machine = os.uname().machine
    if sys.maxsize < 1 << 32:  # a program of 32 bits on a kernel of 64
        machine = {"x86_64": "i686", "aarch64": "armv7l"}.get(machine, machine)
    try:
        return _AIO[machine]
    except KeyError:
        raise UsageError(
            f"aio=native: the system calls of {machine} are not known here, those of {', '.join(_AIO)} are; "
            "aio=io_uring and aio=threads do not need them"
        ) from None


def uring_setup(entries: int, parameters: ctypes.Array[ctypes.c_char]) -> int:
    """io_uring_setup(2). Raises OSError."""
    return _checked(int(_function(_long, _pointer)(IO_URING_SETUP, entries, ctypes.addressof(parameters))))


#: io_uring_enter(2): (number, fd, to_submit, min_complete, flags, None, 0) → entries consumed, or -1 and errno.
uring_enter = _function(_long, _long, _long, _long, _pointer, _long)

#: io_setup, io_destroy, io_submit, io_getevents: (number, …) → -1 and errno.
aio_setup = _function(_long, _pointer)
aio_destroy = _function(_long)
aio_submit = _function(_long, _long, _pointer)
aio_getevents = _function(_long, _long, _long, _pointer, _pointer)


def last_error() -> int:
    """The errno of this thread's last call."""
    return ctypes.get_errno()


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
