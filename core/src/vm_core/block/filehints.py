"""Hints that a new file gives its file system: no copy-on-write (btrfs), and the size of extents (XFS).

Both are wishes: a file system that knows nothing of them is none the worse, so failures are silent.
"""

from __future__ import annotations

import struct
import sys

#: linux/fs.h
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_NOCOW_FL = 0x80086601, 0x40086602, 0x00800000
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR, _FS_XFLAG_EXTSIZE = 0x801C581F, 0x401C5820, 0x00000800
#: struct fsxattr: flags, extent size, extents, project, copy-on-write extent size, padding.
_FSXATTR = struct.Struct("@5I8x")

#: The extent size that is asked for where nothing else is said; images grow in small steps and fragment without.
EXTENT_SIZE = 1 << 20


def no_copy_on_write(fd: int) -> None:
    """Turn copy-on-write off for an empty file."""
    if sys.platform != "linux":
        return
    import fcntl

    try:
        flags = struct.unpack("@l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("@l"))))[0]
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("@l", flags | _FS_NOCOW_FL))
    except OSError:
        return


def extent_size(fd: int, size: int) -> None:
    """Ask for extents of *size* bytes (0: leave it to the file system)."""
    if sys.platform != "linux" or not 0 < size < 1 << 32:
        return
    import fcntl

    try:
        fields = list(_FSXATTR.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))))
        fields[0] |= _FS_XFLAG_EXTSIZE
        fields[1] = size
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(*fields))
    except OSError:
        return
