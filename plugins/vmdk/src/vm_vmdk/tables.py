"""The grain directory and grain tables of a sparse extent: found when needed, kept as long as there is room, changed in
memory, and written in an order that a power cut cannot hurt.

*Virtual Disk Format 5.0*, "Grain Directory" and "Grain Table": the directory has a sector number for each grain table,
a table one for each grain. Hosted sparse extents have everything twice; readers go by the one, and can fall back to the
redundant one.

Order on disk: what tables say must be true before they say it. So :meth:`Tables.write_back` makes the grains stable,
then writes the tables, redundant ones first; tables that are new in the file are made stable before the directory
points to them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vm_core.block.tables import dump, load, run_length
from vm_core.errors import ImageError

from .header import SECTOR

if TYPE_CHECKING:
    from vm_core.block.node import Node

#: Bytes of tables kept in memory, and of changed ones after which they are written back unasked.
CACHE_BYTES = 32 << 20
DIRTY_BYTES = 16 << 20
#: Bytes of neighbouring tables read at once.
AHEAD_BYTES = 256 << 10
#: Directory entries, at most (QEMU's limit: 128 MiB of them).
MAX_DIRECTORY = 1 << 25


class Tables:
    """The grain tables of one extent, by number."""

    def __init__(
        self,
        file: Node,
        name: str,
        *,
        offset: int,
        count: int,
        entries: int,
        redundant: int | None = None,
        empty: int = -1,
    ) -> None:
        """A directory of *count* entries at *offset* (bytes), for tables of *entries* grains each.

        *redundant* is where the second directory is. A directory entry of *empty* stands for a table of such entries.
        """
        self.file = file
        self.name = name
        self.entries = entries
        self.bytes = entries * 4
        self._offset = offset
        self._redundant_offset = redundant
        self._empty = empty
        self.directory = self._read_directory(offset, count, "grain directory")
        self.redundant: array[int] | None = None
        self._cache: dict[int, array[int]] = {}
        self._most = max(CACHE_BYTES // self.bytes, 4)
        self._most_dirty = max(DIRTY_BYTES // self.bytes, 2)
        self._dirty: set[int] = set()
        #: Tables that are not in the file yet.
        self._new: set[int] = set()

    def _read_directory(self, offset: int, count: int, what: str) -> array[int]:
        size = count * 4
        if offset + size > self.file.size:
            raise ImageError(
                self.name,
                f"the {what} ({size} bytes at {offset:#x}) reaches past the end of the file ({self.file.size} bytes)",
            )
        return load("I", self.file.pread(offset, size), "little")

    def load_redundant(self) -> None:
        """Read the redundant directory too, before anything is written. Raises ImageError."""
        if self.redundant is None and self._redundant_offset is not None:
            self.redundant = self._read_directory(
                self._redundant_offset, len(self.directory), "redundant grain directory"
            )

    # Reading

    def get(self, number: int) -> array[int] | None:
        """The table *number*, None where there is none: none of its grains is there. Raises ImageError."""
        table = self._cache.get(number)
        if table is None and self.directory[number]:
            table = self._load(number)
        return table

    def cached(self, number: int) -> bool:
        """Whether :meth:`get` needs no I/O."""
        return number in self._cache or not self.directory[number]

    def absent(self, number: int, stop: int) -> int:
        """The first table from *number* to *stop* that is there."""
        return number + run_length(self.directory, number, stop, 0) if not self.directory[number] else number

    def _load(self, number: int) -> array[int]:
        place = self.directory[number]
        if place == self._empty:
            table = array("I", (self._empty,)) * self.entries
            self._keep({number: table})
            return table
        step = -(-self.bytes // SECTOR)
        stop = min(len(self.directory), number + max(AHEAD_BYTES // self.bytes, 1))
        count = run_length(self.directory, number, stop, step) if self.bytes % SECTOR == 0 else 1
        offset = place * SECTOR
        size = self.file.size
        if offset + self.bytes > size:
            raise ImageError(
                self.name,
                f"grain table {number} ({self.bytes} bytes at {offset:#x}) reaches past the end of the file "
                f"({size} bytes)",
            )
        count = min(count, (size - offset) // self.bytes)
        data = self.file.pread(offset, count * self.bytes)
        found = {}
        for index in range(count):
            if number + index not in self._cache:
                found[number + index] = load("I", data[index * self.bytes : (index + 1) * self.bytes], "little")
        self._keep(found)
        return found[number]

    def _keep(self, found: dict[int, array[int]]) -> None:
        cache = self._cache
        if len(cache) + len(found) > self._most:
            room = self._most - min(len(found), self._most - 1)
            for number in [number for number in cache if number not in self._dirty][: max(len(cache) - room, 0)]:
                del cache[number]
        cache.update(found)

    # Changing

    @property
    def end(self) -> int:
        """Where the last of the tables ends (bytes)."""
        places = [max(one) for one in (self.directory, self.redundant) if one]
        return max(places, default=0) * SECTOR + self.bytes

    @property
    def full(self) -> bool:
        """So much has changed that it should be written back now."""
        return len(self._dirty) >= self._most_dirty

    @property
    def dirty(self) -> bool:
        """Something has changed."""
        return bool(self._dirty)

    def missing(self, number: int) -> bool:
        """The table has no place in the file yet."""
        return self.directory[number] in (0, self._empty)

    def check_writable(self, number: int) -> None:
        """Whether table *number* may be written where the redundant directory has it. Raises ImageError."""
        if self.redundant is None:
            return
        place = self.redundant[number] * SECTOR
        if place and (place + self.bytes > self.file.size or place == self.directory[number] * SECTOR):
            raise ImageError(
                self.name, f"redundant grain table {number} at {place:#x} lies where no table can be: not written to"
            )

    def add(self, number: int, place: int, redundant: int | None) -> None:
        """Give a table that is missing a place (sectors) in the file."""
        table = self._cache.get(number)
        if table is None:
            table = array("I", (self.directory[number],)) * self.entries
        self._cache[number] = table
        self.directory[number] = place
        if self.redundant is not None and redundant is not None:
            self.redundant[number] = redundant
        self._dirty.add(number)
        self._new.add(number)

    def set(self, number: int, index: int, values: array[int]) -> None:
        """Change entries of a table that has a place."""
        table = self.get(number)
        assert table is not None
        table[index : index + len(values)] = values
        self._cache[number] = table  # loading neighbours may have pushed it out
        self._dirty.add(number)

    def write_back(self) -> None:
        """Bring changes to stable storage, what they point to first."""
        if not self._dirty:
            return
        file = self.file
        file.flush()
        numbers = sorted(self._dirty)
        if self.redundant is not None:
            self._write_tables(numbers, self.redundant)
        self._write_tables(numbers, self.directory)
        file.flush()
        if self._new:
            for directory, offset in ((self.redundant, self._redundant_offset), (self.directory, self._offset)):
                if directory is not None and offset is not None:
                    for first, count in _ranges(sorted(self._new)):
                        file.pwrite(offset + first * 4, dump(directory[first : first + count], "little"))
            file.flush()
            self._new.clear()
        self._dirty.clear()

    def _write_tables(self, numbers: Sequence[int], directory: array[int]) -> None:
        """Write whole tables, neighbours with one call."""
        size = self.bytes
        pending: list[memoryview] = []
        start = 0
        for number in numbers:
            place = directory[number] * SECTOR
            if not place:
                continue  # it has no redundant table
            if pending and (place != start + len(pending) * size or len(pending) >= 512):
                self.file.write(start, pending)
                pending = []
            if not pending:
                start = place
            pending.append(memoryview(dump(self._cache[number], "little")))
        if pending:
            self.file.write(start, pending)


def _ranges(numbers: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Runs of consecutive *numbers*: first, count."""
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
