"""fallocate(2) on Linux, which the standard library does not offer, with a memory of what a file cannot do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import cache

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

#: Errors that mean "not on this file system", not "failed".
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.ENODEV})


@cache
def _libc_fallocate() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate64
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        while function(fd, mode, offset, length):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                return code
        return 0

    return call


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Do it; False where the system or the file system cannot. Raises OSError for real failures."""
    call = _libc_fallocate()
    if call is None:
        return False
    code = call(fd, mode, offset, length)
    if not code:
        return True
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))
