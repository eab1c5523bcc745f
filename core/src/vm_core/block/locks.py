"""Image locks between processes, understood by QEMU and its tools.

The scheme is QEMU's (docs/system/qemu-block-drivers: "Disk image file locking"), made of open-file-description locks on
single bytes of the image. What a process does with the file, it says with a read lock on byte 100 + *permission*; what
it does not want others to do, with one on byte 200 + *permission*. Whoever opens the file sets both and then tests
whether anybody's "does" meets its own "does not want", or the other way round. Read locks never conflict with each
other, so the test asks for a write lock without setting it.
"""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Iterable

from ..errors import LockError

if sys.platform != "win32":
    import fcntl

#: Permissions: the bit's number is the offset from the two bases.
CONSISTENT_READ = 0
WRITE = 1
WRITE_UNCHANGED = 2
RESIZE = 3

NAMES = ("consistent read", "write", "write unchanged", "resize")

PERMISSION_BASE = 100
UNSHARED_BASE = 200

#: struct flock: type, whence, start, len, pid, with the compiler's own padding.
_FLOCK = struct.Struct("@hhqqi4x")

#: Errors of a system or file system that has no such locks; images there are opened without.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def available() -> bool:
    """Whether this system has open-file-description locks."""
    return sys.platform == "linux"


def acquire(fd: int, filename: str, uses: Iterable[int], refuses: Iterable[int]) -> None:
    """Say that *fd* is used with the permissions *uses* and that nobody else shall have *refuses*.

    The locks last until the open file is closed; a second call adds to them. Raises LockError in one sentence where
    another process, or another opening in this one, is in the way.
    """
    if not available():
        return
    uses, refuses = tuple(uses), tuple(refuses)
    taken: list[int] = []
    try:
        for byte in [PERMISSION_BASE + bit for bit in uses] + [UNSHARED_BASE + bit for bit in refuses]:
            if not _set(fd, byte, fcntl.F_RDLCK):
                return  # a file system without locks
            taken.append(byte)
        for bit in uses:
            if _held_elsewhere(fd, UNSHARED_BASE + bit):
                raise _in_use(filename, f'"{NAMES[bit]}" lock')
        for bit in refuses:
            if _held_elsewhere(fd, PERMISSION_BASE + bit):
                raise _in_use(filename, f'shared "{NAMES[bit]}" lock')
    except LockError:
        for byte in taken:
            _set(fd, byte, fcntl.F_UNLCK)
        raise


def unrefuse(fd: int, refuses: Iterable[int]) -> None:
    """Others may have *refuses* again, which :func:`acquire` refused."""
    if available():
        for bit in refuses:
            _set(fd, UNSHARED_BASE + bit, fcntl.F_UNLCK)


def release(fd: int) -> None:
    """Give back every lock of *fd*."""
    if available():
        for bit in range(len(NAMES)):
            _set(fd, PERMISSION_BASE + bit, fcntl.F_UNLCK)
            _set(fd, UNSHARED_BASE + bit, fcntl.F_UNLCK)


def _in_use(filename: str, what: str) -> LockError:
    """The error in one sentence; QEMU has two lines."""
    failed, question = f"Failed to get {what}", f"Is another process using the image [{filename}]?"
    return LockError(filename, f"{failed}. {question}", peer=f"{failed}\n{question}")


def _set(fd: int, byte: int, kind: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _held_elsewhere(fd: int, byte: int) -> bool:
    if sys.platform != "linux":
        return False
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
