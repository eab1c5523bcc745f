"""The contract between formats for turning an image of one into an image of another without touching its data.

Theory of operation
-------------------
An image is data clusters, and metadata that says where they are. So another format's metadata over the same clusters
is the same image: only the metadata is written anew, into space that the old format does not use, and one write of the
first sector, where every format of this kind has its header, changes what the file is.

A *source* (:class:`Source`) says what the image holds, in words that every format understands (its size, its backing
image), and by name what it holds beyond that (:class:`Extra`): snapshots, compressed clusters and the like; where its
data is, every open image tells anyway. A *target* (:class:`Target`) takes runs of data and zeroes, writes tables for
them into the :class:`Space` that it is given, and makes a header. Neither knows the other. What an image has beyond
what its target understands is a reason to refuse. The work between the two, and the order of writes, is
``jobs/inplace.py``.

A format takes part by the capability ``inplace`` and the calls :meth:`~vm_core.block.format.Format.inplace_source` and
:meth:`~vm_core.block.format.Format.inplace_target`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .format import BackingReference
    from .node import Node

#: What is written at once when the file becomes one of the other format: a power cut leaves old or new.
SECTOR = 512


class Contents(NamedTuple):
    """What any two formats can tell each other of an image."""

    #: The virtual size in bytes.
    size: int
    #: Data lies in clusters of this many bytes, aligned to them in the file.
    cluster_size: int
    #: The backing image, with its format.
    backing: BackingReference | None


class Extra(NamedTuple):
    """Something that an image holds beyond its :class:`Contents`."""

    #: A word for it, by which a target says that it understands it.
    word: str
    #: What it is, for people: ``internal snapshots``.
    name: str
    #: What to do about it, a command where there is one; FILE stands for the image.
    remedy: str


class HeaderPlan(NamedTuple):
    """The first cluster of the new image: the first sector, and what stands behind it (offset, bytes)."""

    sector: bytes
    parts: Sequence[tuple[int, bytes]] = ()


class Clusters:
    """A set of host clusters, by number."""

    def __init__(self) -> None:
        self._pieces: dict[int, int] = {}

    _BITS = 12

    def add(self, first: int, count: int) -> bool:
        """Add clusters; returns False, with nothing promised, where one was there already."""
        size = 1 << self._BITS
        fresh = True
        while count:
            number, low = first >> self._BITS, first & size - 1
            step = min(count, size - low)
            mask = (1 << step) - 1 << low
            have = self._pieces.get(number, 0)
            fresh = fresh and not have & mask
            self._pieces[number] = have | mask
            first += step
            count -= step
        return fresh

    def gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs (first, count) of clusters from *start* to below *stop* that are not in the set."""
        size = 1 << self._BITS
        begin = -1
        position = start
        while position < stop:
            number, low = position >> self._BITS, position & size - 1
            length = min(stop - position, size - low)
            word = (self._pieces.get(number, 0) >> low) & (1 << length) - 1
            at = 0
            while at < length:
                rest = word >> at
                if rest & 1:
                    # The end of the clusters that are in the set.
                    ones = (~rest & rest + 1).bit_length() - 1
                    if begin >= 0:
                        yield begin, position + at - begin
                        begin = -1
                    at += min(ones, length - at)
                else:
                    if begin < 0:
                        begin = position + at
                    at = length if not rest else at + (rest & -rest).bit_length() - 1
            position += length
        if begin >= 0:
            yield begin, stop - begin


class Space:
    """Free space for a target's metadata: behind all that the file has. Nothing else can be written through it."""

    def __init__(self, file: Node, cluster_size: int) -> None:
        self._file = file
        self.cluster_size = cluster_size
        #: Where it begins: a multiple of the cluster size.
        self.start = -(-file.size // cluster_size) * cluster_size
        #: Where it ends so far.
        self.end = self.start
        #: Clusters of the file that the new image uses, the header's and all that was taken included.
        self.used = Clusters()
        self.used.add(0, 1)

    def take(self, length: int) -> int:
        """Space for *length* bytes, in whole clusters; returns its offset. It reads as zeroes."""
        offset = self.end
        count = -(-length // self.cluster_size)
        self.used.add(offset // self.cluster_size, count)
        self.end += count * self.cluster_size
        if self._file.size < self.end:
            self._file.truncate(self.end)
        return offset

    def write(self, offset: int, data: bytes) -> None:
        """Write metadata into space that was taken."""
        if offset < self.start or offset + len(data) > self.end:
            raise ValueError(f"metadata at {offset:#x} outside of the space for it")
        self._file.pwrite(offset, data)


class Source(ABC):
    """An open image that is to become one of another format. It is not changed through this."""

    contents: Contents

    @abstractmethod
    def extras(self) -> list[Extra]:
        """What the image holds beyond :attr:`contents`, its being damaged or not closed included."""

    def header_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of what the format reads in the first cluster behind the first sector.

        It has to stay there until the file is one of the other format.
        """
        return []


class Target(ABC):
    """Metadata of another format over clusters that stay where they are.

    The calls come in this order: made, :meth:`data` and :meth:`zeroes` with ascending offsets, :meth:`finish`; then the
    file is switched; then :meth:`settle`.
    """

    #: Words of the :class:`Extra` that this target can take over.
    understands: frozenset[str] = frozenset()

    @classmethod
    def records(cls, backing_format: str) -> bool:
        """Whether the format can record that its backing image is of this format; else it is probed."""
        return True

    @abstractmethod
    def __init__(self, name: str, contents: Contents, space: Space) -> None:
        """Raises ImageError(*name*) for what the format cannot hold, by name."""

    @abstractmethod
    def data(self, offset: int, length: int, host: int) -> None:
        """Guest clusters at *offset* lie in a row from *host* on. The last may be cut off at the image's end."""

    @abstractmethod
    def zeroes(self, offset: int, length: int) -> None:
        """Guest clusters at *offset* read as zeroes."""

    @abstractmethod
    def finish(self, kept: Sequence[tuple[int, int]]) -> HeaderPlan:
        """Write what is left to write, and plan the header's cluster around the ranges *kept* (start, end)."""

    def settle(self, file: Node, unused: Sequence[tuple[int, int]]) -> int:
        """The file is one of this format now: deal with the clusters (first, count) that nobody uses any more.

        They read as zeroes. Everything written here has to be safe at every power cut too. Returns how many clusters
        are lost until the image is copied.
        """
        return 0


def place_beside(length: int, end: int, kept: Sequence[tuple[int, int]]) -> int | None:
    """A place for *length* bytes behind the first sector and before *end*, beside the ranges *kept*; None: no room."""
    position = SECTOR
    for start, stop in sorted(kept):
        if stop <= position:
            continue
        if position + length <= start:
            break
        position = max(position, -(-stop // 8) * 8)
    return position if position + length <= end else None
