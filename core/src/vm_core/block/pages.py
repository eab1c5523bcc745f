"""Pieces of metadata of one size, kept in memory: those that wait to be written, and some that are on disk as they are.

How many wait is up to the owner, who asks :attr:`Pages.many` and writes what is :meth:`~Pages.pending`.
"""

from __future__ import annotations

from collections import OrderedDict

from .node import Node


class Pages:
    """Pages of a file by their position (bytes), read when they are first asked for."""

    def __init__(self, file: Node, length: int, most: int) -> None:
        """Each is *length* bytes; *most* of them are kept although they are on disk, and *most* may wait."""
        self._file = file
        self._length = length
        self._most = most
        #: Those that are on disk as they are, the longest unused first.
        self._clean: OrderedDict[int, bytearray] = OrderedDict()
        self._dirty: dict[int, bytearray] = {}

    def get(self, at: int) -> bytearray:
        """The page at *at*, not to be changed."""
        found = self._dirty.get(at)
        if found is None:
            found = self._clean.get(at)
            if found is None:
                found = self._clean[at] = bytearray(self._file.pread(at, self._length))
                self._trim()
            else:
                self._clean.move_to_end(at)
        return found

    def change(self, at: int) -> bytearray:
        """The page at *at*, to be changed: it waits to be written from now on."""
        found = self._dirty[at] = self.get(at)
        self._clean.pop(at, None)
        return found

    def new(self, at: int) -> None:
        """There are zeroes at *at*, which wait to be written."""
        self._clean.pop(at, None)
        self._dirty[at] = bytearray(self._length)

    def holds(self, at: int) -> bool:
        """Whether :meth:`get` needs no reading."""
        return at in self._dirty or at in self._clean

    @property
    def dirty(self) -> bool:
        """Something waits to be written."""
        return bool(self._dirty)

    @property
    def many(self) -> bool:
        """So many wait to be written that they should be."""
        return len(self._dirty) > self._most

    def pending(self) -> list[tuple[int, bytes]]:
        """What has to be written, as (position, contents), in order."""
        return [(at, bytes(page)) for at, page in sorted(self._dirty.items())]

    def clean(self) -> None:
        """All of that is on disk."""
        self._clean.update(self._dirty)
        self._dirty.clear()
        self._trim()

    def _trim(self) -> None:
        while len(self._clean) > self._most:
            self._clean.popitem(last=False)
