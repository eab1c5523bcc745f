"""The order in which changes reach the disk. All of them go through :meth:`Order.write_back`.

At every instant the disk must hold an image that is free of corruption (clusters that are counted but not used are
allowed: leaks) and that has everything in it that was flushed. Between two barriers writes may reach the disk in any
order, each sector old or new. From that the steps follow:

1. Guest data, copies made for copy-on-write, increments of refcounts, and tables at which nothing points yet are
   written. Then a **barrier**: what will be pointed at exists, and is counted.
2. New refcount blocks are linked into the refcount table; a barrier (only where there are any).
3. L2 tables in place and L1 entries are written; they point only at what steps 1 and 2 made stable. Then a barrier:
   what was flushed is in the image, and nothing on disk points any more at what was given back.
4. Only now clusters that were given back may be used for something else, or their space returned to the host: their
   refcounts go down. If that does not reach the disk, it is a leak.

Header fields that move a table (the refcount table in ``allocator.py``, the L1 table in ``resize.py``) are written
between barriers of their own: new table stable, header, old table given back.

With *lazy refcounts* the refcounts of step 1 and step 2 are left out. Instead the dirty bit is on disk before anything
else of step 3, and whoever opens such an image counts anew. It is taken away again when the image is closed.
"""

from __future__ import annotations

import errno
import os

from vm_core.block.notices import report
from vm_core.errors import BlockError

from .allocator import Allocator
from .refcounts import Refcounts
from .store import Store
from .tables import Tables


class Order:
    """Writes back what ``tables``, ``refcounts`` and ``allocator`` hold."""

    def __init__(self, store: Store, tables: Tables, refcounts: Refcounts, allocator: Allocator, *, lazy: bool) -> None:
        self.store = store
        self.tables = tables
        self.refcounts = refcounts
        self.allocator = allocator
        self.lazy = lazy
        #: Something that is new is being made part of what the disk has.
        self._linking = False
        #: Whether freed space is given back to the host where the guest discards.
        self.pass_discard = True
        #: The same where snapshots are deleted or left.
        self.pass_discard_snapshot = True
        #: The same where clusters are given up because their data has moved.
        self.pass_discard_other = False

    def relieve(self) -> None:
        """Write back if more is kept in memory than should be."""
        if self.tables.pressure or self.allocator.pressure or self.refcounts.pressure:
            self._linking = False
            self._write_back()
            if self.lazy:
                self.refcounts.settle()
            self.tables.trim()
            self.refcounts.trim()

    def write_back(self) -> None:
        """Bring everything to stable storage. After an error it can be called again."""
        self._linking = False
        try:
            self._write_back()
        except OSError:
            # What was taken for data that could not be written need not be there, unless the disk may point at it.
            if self._linking or self.store.corrupt or not (self.tables.forget_empty() | self.allocator.forget_unused()):
                raise
            self._write_back()

    def _write_back(self) -> None:
        store, tables, refcounts = self.store, self.tables, self.refcounts
        store.check_writable()
        broken = self.allocator.metadata.broken
        if broken is not None and (tables.dirty or refcounts.dirty):
            # It is not known what would be overwritten.
            raise BlockError.of(broken.code)
        if tables.dirty:
            # Step 1
            written = []
            if self.lazy:
                store.set_dirty(True)
            else:
                written = refcounts.write_blocks()
            unlinked = tables.write_unlinked()
            store.barrier()
            for block in written:
                block.clean()
            # Step 2
            if not self.lazy and refcounts.unlinked:
                self._linking = True
                refcounts.write_links()
                store.barrier()
                refcounts.linked()
            # Step 3
            self._linking = True
            linked = tables.write_linked()
            tables.write_l1()
            store.barrier()
            for table in linked:
                table.clean()
            for table in unlinked:
                table.clean()
                table.linked = True
            tables.changed.clear()
        elif not self.lazy and refcounts.dirty:
            refcounts.settle()
        else:
            store.barrier()
        # Step 4
        if self.allocator.pending:
            released = self.allocator.release()
            if not self.lazy:
                for block in refcounts.write_blocks():
                    block.clean()
            bits = store.geometry.cluster_bits
            for first, count in released:
                store.discard(first << bits, count << bits)

    def close(self) -> None:
        """Write back, and take away the dirty bit."""
        self.write_back()
        self.refcounts.settle()
        self._clean()

    def finish(self) -> None:
        """The same for the last time: whatever cannot be written is told, and the rest is written all the same.

        Raises the first error.
        """
        failure: OSError | None = None
        steps = (("L2 table cache", self._finish_tables), ("refcount block cache", self._finish_refcounts))
        for what, write in steps:
            try:
                write()
            except OSError as error:
                report(f"Failed to flush the {what}: {os.strerror(error.errno or errno.EIO)}")
                failure = failure or error
        if failure is not None:
            raise failure
        self._clean()

    def _finish_tables(self) -> None:
        if self.tables.dirty:
            self.write_back()
        else:
            self.store.barrier()

    def _finish_refcounts(self) -> None:
        if not self.tables.dirty:
            self.write_back()
        # Else the tables on disk are old ones, and counts that went up meanwhile do them no harm.
        self.refcounts.settle()
        self.store.barrier()

    def _clean(self) -> None:
        store = self.store
        if self.lazy:
            store.set_dirty(False)
            store.barrier()
