"""Failures of the system, told in QEMU's words: what was being done, then what the system said."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vm_core.errors import BlockError


@contextmanager
def told(text: str, *, nested: bool = False) -> Iterator[None]:
    """An OSError from in here becomes a BlockError that says *text* and the system's word for it.

    *nested*: the error has a sentence of its own, which stands there instead.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or errno.EIO
        reason = error.strerror if nested and error.strerror else os.strerror(code)
        raise BlockError.of(code, f"{text}: {reason}") from error
