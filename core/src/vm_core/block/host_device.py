"""The protocol driver ``host_device``: a disk, partition or other block device of this host.

It is the file driver with another idea of size (the device's own, which no write changes), of blocks (the device says
what O_DIRECT wants) and of discarding and zeroing (ioctls of the block layer, linux/fs.h). A character device that can
be read at positions works too.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import BlockError, ImageError
from .fallocate import UNSUPPORTED
from .file import FileProtocol
from .mapping import Kind, Mapping
from .node import Buffer
from .vectors import total

# linux/fs.h
BLKSSZGET = 0x1268
BLKGETSIZE64 = 0x80081272
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
# sys/disk.h of macOS
DKIOCGETBLOCKSIZE = 0x40046418
DKIOCGETBLOCKCOUNT = 0x40086419

_RANGE = struct.Struct("=QQ")


class HostDeviceProtocol(FileProtocol):
    """A block device. It neither grows nor shrinks; writing past its end is an error."""

    driver = "host_device"

    @classmethod
    def claims(cls, filename: str) -> int:
        try:
            mode = os.stat(filename).st_mode
        except OSError:
            return 0
        return 100 if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else 0

    @classmethod
    def _check_type(cls, fd: int, filename: str) -> None:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            told = f"'{cls.driver}' driver requires '{filename}' to be either a character or block device"
            raise ImageError(filename, told)

    @classmethod
    def create(cls, options: dict[str, Any], size: int) -> None:
        """Nothing is created: the device is there, and has to be large enough."""
        filename = options.pop("filename")
        fd = cls._open_target(filename)
        try:
            if _device_size(fd) < size:
                raise ImageError(filename, f"Device is too small: {size} bytes are needed")
        finally:
            os.close(fd)

    @classmethod
    def _open_target(cls, filename: str) -> int:
        """A descriptor of the device that an image is to be made on. Raises ImageError."""
        try:
            fd = os.open(filename, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise cls._no_target("", f"Could not open '{filename}': {error.strerror}") from None
        try:
            cls._check_type(fd, filename)
        except ImageError as error:
            os.close(fd)
            raise cls._no_target(filename, error.reason) from None
        return fd

    @classmethod
    def _no_target(cls, filename: str, reason: str) -> ImageError:
        told = f"Protocol driver '{cls.driver}' does not support image creation, and opening the image failed: {reason}"
        return ImageError(filename, reason, peer=told)

    def _query_size(self) -> int:
        return _device_size(self._fd)

    def _grown(self, end: int) -> None:
        """A device does not grow."""

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if offset + total(buffers) > self._size:
            raise BlockError.of(errno.ENOSPC)
        super().write(offset, buffers, fua=fua)

    def truncate(self, size: int) -> None:
        """Smaller than the device is fine, as nothing needs to be done; larger is not possible."""
        if self.readonly:
            raise self.read_only_error()
        self.invalidate()
        if size > self._size:
            raise BlockError.of(errno.EINVAL, "Cannot grow device files")

    def allocated(self) -> int:
        return 0

    def _ioctl_range(self, request: int, offset: int, length: int) -> bool:
        """Have the block layer do it; False where it cannot."""
        if sys.platform != "linux":
            return False
        import fcntl

        try:
            fcntl.ioctl(self._fd, request, _RANGE.pack(offset, length))
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return False
            raise
        return True

    def _sector(self) -> int:
        return max(self.request_alignment, 512)

    def _punch(self, offset: int, length: int) -> bool:
        # BLKDISCARD promises nothing about what is read afterwards, so zeroing never goes through it.
        return False

    def _zero_range(self, offset: int, length: int) -> bool:
        if offset + length > self._size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not self._can_zero or (offset | length) % self._sector():
            return False
        if not self._ioctl_range(BLKZEROOUT, offset, length):
            self._can_zero = False
            return False
        return True

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        sector = self._sector()
        end = min(offset + length, self._size)
        start, stop = -(-offset // sector) * sector, end - end % sector
        if not self.unmap or start >= stop or not self._can_punch:
            return
        try:
            if not self._ioctl_range(BLKDISCARD, start, stop - start):
                self._can_punch = False
        except OSError as error:
            raise BlockError.of(error.errno or errno.EIO, error.strerror or "") from None
        finally:
            self._written = next(self._writes)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        self.zero(offset, length)

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        inside = max(0, min(length, self._size - offset))
        if inside:
            yield Mapping(Kind.DATA, offset, inside, self, offset, not self.readonly)
        if inside < length:
            yield Mapping(Kind.EOF, offset + inside, length - inside)

    def identity(self) -> tuple[Any, ...]:
        return ("device", os.fstat(self._fd).st_rdev)

    def _find_alignment(self) -> int:
        if sys.platform == "linux" and stat.S_ISBLK(os.fstat(self._fd).st_mode):
            import fcntl

            return int(struct.unpack("=i", fcntl.ioctl(self._fd, BLKSSZGET, bytes(4)))[0])
        return super()._find_alignment()


def _device_size(fd: int) -> int:
    """Bytes of the open device. Raises OSError."""
    if sys.platform == "linux" and stat.S_ISBLK(os.fstat(fd).st_mode):
        import fcntl

        return int(struct.unpack("=Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])
    if sys.platform == "darwin":
        import fcntl

        (size,) = struct.unpack("=I", fcntl.ioctl(fd, DKIOCGETBLOCKSIZE, bytes(4)))
        (blocks,) = struct.unpack("=Q", fcntl.ioctl(fd, DKIOCGETBLOCKCOUNT, bytes(8)))
        return int(size) * int(blocks)
    return os.lseek(fd, 0, os.SEEK_END)
