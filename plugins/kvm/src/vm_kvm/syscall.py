"""System calls by ctypes: ioctl with an errno that is safe to read, and without the GIL.

``ctypes.CDLL`` gives up the GIL around the call, so a vCPU inside KVM_RUN stops no other thread. ``fcntl.ioctl`` is not
used: it copies buffers, and what it does on EINTR (which is how KVM_RUN is interrupted) depends on Python's version.
"""

from __future__ import annotations

import ctypes
import errno
import os
from ctypes import c_int, c_ulong, c_void_p
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

#: ``ioctl(fd, request, argument)`` returning -1 on errors, which ``ctypes.get_errno()`` tells apart.
raw_ioctl = libc.ioctl
raw_ioctl.argtypes = (c_int, c_ulong, c_void_p)
raw_ioctl.restype = c_int


def ioctl(fd: int, request: int, argument: Any = None) -> int:
    """An ioctl on a structure (by reference), an integer or nothing. Raises OSError; EINTR is tried again."""
    # *argument* stays referenced: an address alone would not keep a temporary structure alive.
    place = ctypes.addressof(argument) if isinstance(argument, ctypes.Structure | ctypes.Array) else argument
    while True:
        result: int = raw_ioctl(fd, request, place)
        if result != -1:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
