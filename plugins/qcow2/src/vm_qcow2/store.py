"""Access to an image's metadata: reads that are checked against the file, writes, header updates, the corrupt bit."""

from __future__ import annotations

import errno
from array import array
from contextlib import suppress

from vm_core.block.node import Node
from vm_core.block.notices import notice
from vm_core.block.tables import dump, load
from vm_core.errors import BlockError, ImageError

from .features import CORRUPT, DIRTY
from .geometry import Geometry
from .header import Header


class Store:
    """The file with the metadata, and the header, which is kept as it is on disk."""

    def __init__(self, file: Node, header: Header, name: str) -> None:
        self.file = file
        self.header = header
        self.name = name
        self.geometry = Geometry(header)
        #: No changes are wanted.
        self.readonly = True
        #: Damage was found while this image was open for writing: nothing is read or written any more.
        self.corrupt = False
        #: Some damage was told.
        self._told = False
        #: Writes were made since the last barrier.
        self._unstable = False
        #: Metadata could not be written at some time: what was taken for it may be counted without being in use.
        self.failed = False
        #: Data could not be written at some time: the file may be longer than what is in use.
        self.aborted = False
        #: Bytes of the file before anything was changed.
        self.length = file.size

    def error(self, reason: str) -> ImageError:
        """An error about the image, to be raised."""
        return ImageError(self.name, reason)

    # Reading

    def check_range(self, offset: int, length: int, what: str) -> None:
        """Raise ImageError unless *what* at *offset* starts on a cluster and lies in the file."""
        if offset & (self.geometry.cluster_size - 1):
            raise self.error(f"{what} at {offset:#x} is not aligned to clusters of {self.geometry.cluster_size} bytes")
        size = self.file.size
        if offset + length > size:
            from vm_core.sizes import human

            raise self.error(f"{what} at {offset:#x} lies outside the file ({human(size)})")

    def read(self, offset: int, length: int, what: str) -> bytes:
        """The bytes of a table; *what* names it in errors."""
        self.check_range(offset, length, what)
        return self.file.pread(offset, length)

    def read_words(self, offset: int, count: int, what: str) -> array[int]:
        """A table of 64-bit entries, in the host's byte order."""
        return load("Q", self.read(offset, count * 8, what), "big")

    # Writing

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write metadata. It is stable after the next :meth:`barrier`."""
        self._unstable = True
        try:
            self.file.pwrite(offset, data)
        except BaseException:
            self.failed = True
            raise

    def write_words(self, offset: int, words: array[int], start: int = 0, stop: int | None = None) -> None:
        """Write the entries from *start* to *stop* of the table of 64-bit entries at *offset*."""
        piece = words[start:stop]
        self.write(offset + start * 8, dump(piece, "big"))

    def barrier(self) -> None:
        """Return when everything written so far is stable."""
        try:
            self.file.flush()
        except BaseException:
            self.failed = True
            raise
        self._unstable = False

    def discard(self, offset: int, length: int) -> None:
        """Give host space back that nothing points at any more. Where that fails it is kept, which harms nobody."""
        with suppress(OSError):
            self.file.discard(offset, length)

    def write_header(self, first: str, last: str = "") -> None:
        """Write the header fields from *first* to *last*, within one sector, so that a power cut leaves old or new."""
        self.write(*self.header.pack_fields(first, last))

    def update_header(self, first: str, last: str = "", **fields: int) -> None:
        """Set *fields*, which lie from *first* to *last*, on disk too, and return when that is stable.

        Where it fails they are in memory what they were; so they are on disk, too, unless that fails as well.
        """
        former = {name: getattr(self.header, name) for name in fields}
        for name, value in fields.items():
            setattr(self.header, name, value)
        try:
            self.write_header(first, last)
            self.barrier()
        except BaseException:
            for name, value in former.items():
                setattr(self.header, name, value)
            with suppress(OSError):
                self.write_header(first, last)
            raise

    # Marks in the header

    def set_dirty(self, dirty: bool) -> None:
        """Write the dirty bit, unless it is so already. The caller sees to the barriers around it."""
        old = self.header.incompatible_features
        new = old | DIRTY if dirty else old & ~DIRTY
        if old != new:
            self.header.incompatible_features = new
            self.write_header("incompatible_features")

    def mark_corrupt(self, reason: str, *, fatal: bool = True) -> BlockError:
        """Damage was found: tell it (once), and return the error to raise.

        If it is *fatal* and the image is written, all further requests are refused, and (version 3) the header says
        so to everybody else.
        """
        if fatal and not self.file.readonly and not self.readonly:
            if not self.corrupt:
                self.corrupt = True
                notice(f"qcow2: Marking image as corrupt: {reason}; further corruption events will be suppressed")
                if self.geometry.version >= 3:
                    self.header.incompatible_features |= CORRUPT
                    self.write_header("incompatible_features")
                    self.file.flush()
        elif not self._told and not self.corrupt:
            notice(f"qcow2: Image is corrupt: {reason}; further non-fatal corruption events will be suppressed")
        self._told = True
        return BlockError.of(errno.EIO, f"{self.name}: {reason}")

    def check_writable(self) -> None:
        """Raise ENOMEDIUM, as QEMU does, if damage was found before."""
        if self.corrupt:
            raise BlockError.of(errno.ENOMEDIUM)


def alternate(number: int) -> str:
    """A number as C's ``%#x`` prints it."""
    return f"{number:#x}" if number else "0"
