"""What nodes that a guest sees have in common: the limits of their size, and the policies of their user.

The policies are those of QEMU's node options: ``read-only``, ``discard`` (ignore or unmap: whether a discard does
anything and whether zeroing may give space back) and ``detect-zeroes`` (off, on: a write of zeroes becomes a zeroing,
unmap: one that may give space back).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from ..errors import BlockError
from .node import Buffer, Node
from .vectors import is_zero, total


class ImageNode(Node):
    """A format or raw node: checks each change, applies the policies, hands it on to ``_write`` and so on."""

    #: Whether a discard reaches the storage.
    discard_unmap: bool = True
    #: ``off``, ``on`` or ``unmap``.
    detect_zeroes: str = "off"

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        length = total(buffers)
        if not length:
            return
        if offset < 0 or offset + length > self.size:
            raise self._past_end()
        if self.detect_zeroes != "off" and is_zero(buffers):
            self._zero(offset, length, self.detect_zeroes == "unmap" and self.discard_unmap, fua)
        else:
            self._write(offset, length, buffers, fua)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self._past_end()
        if length:
            self._zero(offset, length, unmap and self.discard_unmap, fua)

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise self._past_end()
        if length and self.discard_unmap:
            self._discard(offset, length)

    def _past_end(self) -> BlockError:
        return BlockError.of(errno.EIO, f"request past the end of {self.filename or 'the image'}")

    def _write(self, offset: int, length: int, buffers: Sequence[Buffer], fua: bool) -> None:
        raise NotImplementedError

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        raise NotImplementedError

    def _discard(self, offset: int, length: int) -> None:
        raise NotImplementedError
