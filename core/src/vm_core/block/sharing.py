"""Copying inside the host: blocks shared between files (reflinks), and ``copy_file_range``."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import suppress

#: ``FICLONERANGE`` of Linux' uapi/linux/fs.h: ``struct file_clone_range`` is source descriptor, offset, length, target.
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")

#: Errors that mean "not between these files" or "not this range"; anything else is a failure.
_CANNOT = frozenset(
    {
        errno.EBADF,
        errno.EINVAL,
        errno.EISDIR,
        errno.ENOSYS,
        errno.ENOTTY,
        errno.EOPNOTSUPP,
        errno.EPERM,
        errno.ETXTBSY,
        errno.EXDEV,
        errno.EOVERFLOW,
    }
)


def share_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> bool:
    """Let descriptor *target* share the blocks of *source*; False where the file system cannot do that to this range.

    Raises OSError for real failures.
    """
    try:
        import fcntl

        fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(source, source_offset, length, target_offset))
    except ImportError:
        return False
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """Have the kernel copy; returns the bytes copied, fewer where it cannot go on. Raises OSError for failures."""
    call = getattr(os, "copy_file_range", None)
    done = 0
    while call is not None and done < length:
        try:
            count = call(source, target, length - done, source_offset + done, target_offset + done)
        except OSError as error:
            if error.errno in _CANNOT:
                break
            raise
        if not count:
            break
        done += count
    return done


def can_share(source: int, target: str) -> bool:
    """Whether files in the directory of *target* can share blocks with *source*: tried on a file without a name."""
    flags = getattr(os, "O_TMPFILE", None)
    if flags is None:
        return False
    with suppress(OSError):
        if os.fstat(source).st_dev != os.stat(target).st_dev:
            return False
        fd = os.open(os.path.dirname(target) or ".", flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            return share_range(source, 0, fd, 0, os.fstatvfs(source).f_bsize)
        finally:
            os.close(fd)
    return False
