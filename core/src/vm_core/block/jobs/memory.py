"""Memory that codecs gave back to the C library and that the C library keeps.

Compressors allocate and free a few hundred KiB for every cluster, from several threads. The GNU C library keeps what is
freed in pieces that nothing fits into, and the process grows by as much again as it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], object] | None:
    if sys.platform != "linux":
        return None
    import ctypes

    found: Callable[[int], object] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


def trim() -> None:
    """Have the C library return what is free to the system, where it can be asked to."""
    call = _malloc_trim()
    if call is not None:
        call(0)
