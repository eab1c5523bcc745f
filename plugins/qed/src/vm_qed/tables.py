"""The L1 table, and pages of L2 tables (section *Tables*).

An L2 table may have a gigabyte, so it is read in pages as they are wanted. Changed entries wait in memory until
:meth:`Tables.write_back`, which makes what they point to stable first: at every instant the tables on disk point to
nothing that is not there.
"""

from __future__ import annotations

import errno
from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from vm_core.block.tables import dump, load
from vm_core.errors import BlockError

if TYPE_CHECKING:
    from vm_core.block.node import Node

    from .header import Header

#: Entries of a page.
PAGE = 8192
#: Pages kept in memory, and changed ones that may wait.
KEPT_PAGES = 512
WAITING_PAGES = 128

#: An L1 table of up to this many bytes is read whole.
MAX_L1_BYTES = 32 << 20

SECTOR = 512
UNALLOCATED = 0
ZERO = 1


class Tables:
    """Both levels of an image's tables."""

    def __init__(self, file: Node, header: Header) -> None:
        self.file = file
        self.header = header
        span = header.entries * header.cluster_size
        # Entries past the end of the image may set clusters aside; of a very large table only those are read that the
        # image's size needs.
        count = header.entries if header.table_length <= MAX_L1_BYTES else -(-header.image_size // span)
        self.l1 = load("Q", file.pread(header.l1_table_offset, 8 * count), "little")
        self._page = min(PAGE, header.entries)
        self._pages: OrderedDict[tuple[int, int], array[int]] = OrderedDict()
        self._waiting: set[tuple[int, int]] = set()
        #: Where the next table or cluster goes: a piece of a cluster at the end of the file belongs to none. It counts
        #: in whole sectors, as for the peer.
        self.end = -(-file.size // SECTOR) * SECTOR // header.cluster_size * header.cluster_size
        self._l1_waiting: set[int] = set()

    @property
    def page_entries(self) -> int:
        """Entries of a page of these tables."""
        return self._page

    def grow(self, size: int) -> None:
        """The image has *size* bytes now."""
        span = self.header.entries * self.header.cluster_size
        known, wanted = len(self.l1), -(-size // span)
        if wanted > known:
            where = self.header.l1_table_offset + 8 * known
            self.l1.extend(load("Q", self.file.pread(where, 8 * (wanted - known)), "little"))

    def valid_table(self, offset: int, limit: int) -> bool:
        """Whether a table may lie at *offset* of a file of *limit* bytes."""
        return self.valid_cluster(offset, limit) and offset + self.header.table_length <= limit

    def valid_cluster(self, offset: int, limit: int) -> bool:
        """Whether a cluster may lie at *offset* of a file of *limit* bytes."""
        size = self.header.cluster_size
        return not offset % size and size * self.header.header_size <= offset < limit

    def page(self, number: int, page: int) -> array[int] | None:
        """Page *page* of L2 table *number*; None where there is no such table. Raises BlockError(EINVAL)."""
        key = number, page
        found = self._pages.get(key)
        if found is not None:
            self._pages.move_to_end(key)
            return found
        where = self.l1[number]
        if where == UNALLOCATED:
            return None
        if not self.valid_table(where, max(self.end, self.file.size)):
            raise BlockError(errno.EINVAL, f"L2 table {number} at {where:#x} lies outside the image file")
        length = 8 * self._page
        table = load("Q", self.file.pread(where + page * length, length), "little")
        self._keep(key, table)
        return table

    def cached(self, number: int, page: int) -> array[int] | None:
        """The page if it is in memory."""
        return self._pages.get((number, page))

    def _keep(self, key: tuple[int, int], table: array[int]) -> None:
        self._pages[key] = table
        if len(self._pages) > KEPT_PAGES:
            idle = next((one for one in self._pages if one not in self._waiting), None)
            if idle is not None:
                del self._pages[idle]

    def add_table(self, number: int, where: int) -> None:
        """L2 table *number* is new, empty, and lies at *where*."""
        self.l1[number] = where
        self._l1_waiting.add(number)
        for page in range(self.header.entries // self._page):
            key = number, page
            if page < 2:
                # Further pages are read as the zeroes that they are.
                self._keep(key, array("Q", bytes(8 * self._page)))

    def forget_table(self, number: int) -> None:
        """Undo :meth:`add_table` for the table that lies last, if nothing was written of it and nothing is in it."""
        if number in self._l1_waiting and not any(key[0] == number for key in self._waiting):
            self.end = self.l1[number]
            self.drop_table(number)
            self._l1_waiting.discard(number)

    def set(self, cluster: int, count: int, entry: int, step: int) -> None:
        """Point *count* guest clusters from *cluster* on to *entry*, *entry* + *step*, …"""
        while count:
            number, index = divmod(cluster, self.header.entries)
            page, within = divmod(index, self._page)
            table = self.page(number, page)
            assert table is not None
            run = min(count, self._page - within)
            values = range(entry, entry + run * step, step) if step else [entry] * run
            table[within : within + run] = array("Q", values)
            self._waiting.add((number, page))
            cluster, count, entry = cluster + run, count - run, entry + run * step

    @property
    def many_waiting(self) -> bool:
        """So much waits in memory that it should be written."""
        return len(self._waiting) > WAITING_PAGES

    @property
    def waiting(self) -> bool:
        """Something waits in memory."""
        return bool(self._waiting or self._l1_waiting)

    def write_back(self) -> None:
        """Bring the data that changed entries point to, then L2 tables, then the L1 table to stable storage."""
        self.file.flush()
        for key in sorted(self._waiting):
            number, page = key
            self.file.event("l2_update")
            self.file.pwrite(self.l1[number] + page * 8 * self._page, dump(self._pages[key], "little"))
        self._waiting.clear()
        if self._l1_waiting:
            self.file.flush()
            first, last = min(self._l1_waiting), max(self._l1_waiting) + 1
            self.file.event("l1_update")
            self.file.pwrite(self.header.l1_table_offset + 8 * first, dump(self.l1[first:last], "little"))
            self._l1_waiting.clear()

    def drop_table(self, number: int) -> None:
        """There is no L2 table *number* any more."""
        self.l1[number] = UNALLOCATED
        self._l1_waiting.add(number)
        for key in [key for key in self._pages if key[0] == number]:
            del self._pages[key]
            self._waiting.discard(key)
