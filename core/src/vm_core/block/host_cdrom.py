"""The protocol driver ``host_cdrom``: a CD or DVD drive of this host, with a disc in it or without.

It is a host device whose medium comes and goes. Before each request the drive is asked (linux/cdrom.h): without a disc
that is ENOMEDIUM, and a disc that was put in meanwhile is read from its beginning to its own end.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BlockError, ImageError
from .host_device import HostDeviceProtocol
from .node import Buffer

if TYPE_CHECKING:
    from .passage import Hold, Span

# linux/cdrom.h
CDROM_DRIVE_STATUS = 0x5326
CDSL_CURRENT = 0x7FFFFFFF
CDS_DISC_OK = 4


class HostCdromProtocol(HostDeviceProtocol):
    """A drive. Its size is that of the disc which is in now; without one, what the kernel makes of that."""

    driver = "host_cdrom"
    removable = True

    @classmethod
    def claims(cls, filename: str) -> int:
        """A device that answers as such drives do, before any other driver of devices."""
        try:
            if not stat.S_ISBLK(os.stat(filename).st_mode):
                return 0
            fd = os.open(filename, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return 0
        try:
            return 101 if drive_status(fd) is not None else 0
        finally:
            os.close(fd)

    @classmethod
    def create(cls, options: dict[str, Any], size: int) -> None:
        """Nothing is created: a disc has to be in, and large enough."""
        fd = cls._open_target(options["filename"])
        try:
            if drive_status(fd) != CDS_DISC_OK:
                raise ImageError("", "No medium inserted")
        finally:
            os.close(fd)
        super().create(options, size)

    #: Whether there was a disc when that was last asked.
    _loaded = False

    def _query_size(self) -> int:
        self._loaded = drive_status(self._fd) == CDS_DISC_OK
        return super()._query_size()

    @property
    def present(self) -> bool:  # type: ignore[override]
        return self._look()

    @property
    def size(self) -> int:
        self._look()
        return self._size

    def _look(self) -> bool:
        """Whether a disc is in; one that is new is looked at anew."""
        present = drive_status(self._fd) == CDS_DISC_OK
        if present != self._loaded:
            if present:
                self._reopen(self.readonly, self.direct)  # the kernel reads a new disc's size when it is opened
            self.invalidate()
        return present

    def _need_disc(self) -> None:
        if not self._look():
            raise BlockError.of(errno.ENOMEDIUM)

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._need_disc()
        super().read(offset, buffers)

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self._look() and super().read_nowait(offset, buffers)

    def host_spans(
        self, offset: int, length: int, spans: list[Span], holds: list[Hold], *, write: bool, stable: bool
    ) -> bool:
        return self._look() and super().host_spans(offset, length, spans, holds, write=write, stable=stable)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        self._need_disc()
        super().write(offset, buffers, fua=fua)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        self._need_disc()
        super().zero(offset, length, unmap=unmap, fua=fua)

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        self._need_disc()
        return super().zero_fast(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._need_disc()
        super().discard(offset, length)

    def truncate(self, size: int) -> None:
        if not self._look():
            raise BlockError.of(errno.ENOMEDIUM, "No medium inserted")
        super().truncate(size)


def drive_status(fd: int) -> int | None:
    """What the drive says of its disc; None where it is no such drive."""
    if sys.platform != "linux":
        return CDS_DISC_OK
    import fcntl

    try:
        return fcntl.ioctl(fd, CDROM_DRIVE_STATUS, CDSL_CURRENT)
    except OSError:
        return None
