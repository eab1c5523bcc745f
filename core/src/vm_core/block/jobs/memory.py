"""The memory of long jobs: buffers that the system copies into quickly, and giving back what codecs leave behind.

Compressors allocate and free a few hundred KiB for every cluster, from several threads. The GNU C library keeps what is
freed in pieces that nothing fits into, and the process grows by as much again as it needs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

#: What buffers are aligned to, bytes: a page.
ALIGNMENT = 4096
#: Whoever moves fewer bytes than this gains less than it takes to find an address.
WORTH_ALIGNING = 16 * 1024 * 1024


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


def page_buffer(length: int, moved: int) -> bytearray:
    """A buffer of *length* bytes, at a page's beginning if the job moves enough (*moved* bytes) for that to pay.

    Copying out of the page cache takes half as long then: large blocks of memory begin 16 bytes into a page, where the
    processor's string moves are at their slowest.
    """
    if moved < WORTH_ALIGNING or length < ALIGNMENT:
        return bytearray(length)
    import ctypes

    found = bytearray(length + ALIGNMENT)
    address = ctypes.addressof(ctypes.c_char.from_buffer(found))
    # Neither moves what stays: a bytearray's beginning goes forward, and there is room to spare at its end.
    del found[: -address % ALIGNMENT]
    del found[length:]
    return found
