"""The signal that gets a thread out of KVM_RUN.

Theory of operation. ``immediate_exit`` in the shared kvm_run page makes the *next* KVM_RUN return EINTR; a thread that
is already inside returns EINTR when a signal with a handler reaches it (5, "immediate_exit"). A kick therefore writes
the byte first and signals second, and the vCPU clears the byte first and asks ``must_return`` second: whichever comes
first, none is lost.

The handler must exist, or the signal would be ignored without interrupting anything, and must not be a Python one:
Python's would only wake the main thread. It is libc's ``abs``, a pure function of one int, which is as near to nothing
as a C library offers by address. SA_RESTART spares the thread's other system calls; KVM_RUN returns EINTR regardless.
SIGURG is what Go's scheduler uses for the same purpose, for the same reasons: its default is to be ignored, debuggers
pass it, libraries leave it alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from ctypes import c_int, c_ulong, c_void_p
from typing import Final

from .syscall import libc

KICK_SIGNAL: Final = signal.SIGURG

_SA_RESTART: Final = 0x10000000


class _SigAction(ctypes.Structure):
    """struct sigaction of glibc and of musl on x86-64 (not the kernel's): the mask has 1,024 bits."""

    _fields_ = (
        ("handler", c_void_p),
        ("mask", c_ulong * 16),
        ("flags", c_int),
        ("restorer", c_void_p),
    )


@functools.cache
def install_handler() -> None:
    """Give the kick signal its handler, once in a process."""
    nothing = ctypes.cast(libc.abs, c_void_p)
    action = _SigAction(handler=nothing.value, flags=_SA_RESTART)
    if libc.sigaction(int(KICK_SIGNAL), ctypes.byref(action), None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def accept_in_this_thread() -> None:
    """Let the signal reach the calling thread, whatever mask it inherited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {KICK_SIGNAL})
