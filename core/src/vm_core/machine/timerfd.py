"""A timer descriptor of Linux: an alarm that any thread sets with one system call, without waking the loop.

Python has ``os.timerfd_create`` from 3.13 on only, so libc is called. It is called with the interpreter's lock held
(``PyDLL``): the calls take less time than giving the lock away and asking for it again.

Source: timerfd_create(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

CLOCK_MONOTONIC = 1
TFD_NONBLOCK, TFD_CLOEXEC = os.O_NONBLOCK if hasattr(os, "O_NONBLOCK") else 0, getattr(os, "O_CLOEXEC", 0)
_SECOND = 1_000_000_000


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class TimerFd:
    """One timer; its descriptor is readable when it has gone off."""

    def __init__(self) -> None:
        """Raises OSError where there is no such thing."""
        if not sys.platform.startswith("linux"):
            raise OSError("timer descriptors are Linux'")
        try:
            libc = ctypes.PyDLL(None, use_errno=True)
            create, self._settime = libc.timerfd_create, libc.timerfd_settime
        except AttributeError:
            raise OSError("this libc has no timer descriptors") from None
        self._settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self.fd: int = create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._spec = _Itimerspec()
        self._address = ctypes.addressof(self._spec)

    def set(self, nanoseconds: int | None) -> None:
        """Go off after *nanoseconds*, in place of what was set before; None: never."""
        value = self._spec.value
        # Zero would disarm it.
        value.seconds, value.nanoseconds = (0, 0) if nanoseconds is None else divmod(max(1, nanoseconds), _SECOND)
        if self.fd >= 0:
            self._settime(self.fd, 0, self._address, None)

    def clear(self) -> None:
        """Take back that it has gone off."""
        with contextlib.suppress(BlockingIOError):  # it was set anew meanwhile
            os.read(self.fd, 8)

    def close(self) -> None:
        """Release the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)
