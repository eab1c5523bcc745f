"""``preallocate``: host space is set aside in large pieces, ahead of a file that grows write by write.

Theory of operation. Between a format and its file: where a write reaches past the space that is there, the file is
extended by zeroes to *prealloc-size* bytes behind the write's end, rounded up to *prealloc-align*, and following writes
find their blocks allocated. What the format sees as the file's end stays where writes have put it; the space behind is
cut off when the file is closed, becomes read-only or is resized. Drivers that let the file grow by a block and then
write that block are served likewise: the step goes into the space that is there, and a write after it sets more aside.

Three positions say it all, in this order: up to *used* there may be data; *end* is where the file ends for the format;
*room* is where it ends on the host. From *used* to *room* there are zeroes. A write below *used* changes none of them.

That space cannot be had is no reason for a write to fail: it is then not asked for again until the length is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from vm_core.block.filter import Filter
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import total
from vm_core.errors import ImageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext
    from vm_core.block.passage import Hold, Span

#: Bytes.
ALIGN = 1 << 20
SIZE = 128 << 20
SECTOR = 512
#: A file that grows by more is resized: that shall leave holes.
STEP = 32 << 20
#: Where files end at the latest.
FARTHEST = (1 << 63) - 1


class Preallocate(Filter):
    """Options and sizes are QEMU's (*BlockdevOptionsPreallocate*)."""

    driver = "preallocate"

    def __init__(self, file: Node, *, align: int = ALIGN, size: int = SIZE, owned: bool = True) -> None:
        super().__init__(file, owned=owned)
        self._align = align
        self._ahead = size
        self._lock = Lock()
        self._refused = False
        #: The file grew by a step since it had room ahead.
        self._stepped = False
        #: Meaningless until something is written.
        self._known = False
        self._used = self._end = self._room = 0

    def configure(self, options: dict[str, Any], context: OpenContext) -> None:
        self._ahead = options.pop("prealloc-size", SIZE)
        align = options.pop("prealloc-align", ALIGN)
        name = "prealloc-align parameter of preallocate filter is not aligned to"
        if align % SECTOR:
            raise ImageError("", f"{name} {SECTOR}")
        if align % self.request_alignment:
            raise ImageError("", f"{name} underlying node request alignment ({self.request_alignment})")
        self._align = align or 1

    @property
    def size(self) -> int:
        return self._end if self._known else self.file.size

    # Requests

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        end = offset + total(buffers)
        if end <= self._used or self.readonly:
            super().write(offset, buffers, fua=fua)
            return
        self._extend(offset, end)
        try:
            super().write(offset, buffers, fua=fua)
        except OSError:
            self._fallen_short()
            raise

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly or offset + length <= self._used:
            super().zero(offset, length, unmap=unmap, fua=fua)
            return
        if self._extend(offset, offset + length, zeroes=not (unmap or fua)):
            return
        try:
            super().zero(offset, length, unmap=unmap, fua=fua)
        except OSError:
            self._fallen_short()
            raise

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        if self.readonly or offset + length <= self._used:
            return super().zero_fast(offset, length, unmap=unmap)
        if self._extend(offset, offset + length, zeroes=not unmap):
            return True
        try:
            done = super().zero_fast(offset, length, unmap=unmap)
        except OSError:
            self._fallen_short()
            raise
        if not done:
            self._fallen_short()
        return done

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return self.file.read_nowait(offset, buffers)

    def host_spans(
        self, offset: int, length: int, spans: list[Span], holds: list[Hold], *, write: bool, stable: bool
    ) -> bool:
        if write and (self.readonly or offset + length > self._used):
            return False
        return self.file.host_spans(offset, length, spans, holds, write=write, stable=stable)

    # Space

    def _extend(self, offset: int, end: int, *, zeroes: bool = False) -> bool:
        """Something comes at *offset* that ends at *end*. True: *zeroes*, and they are there already."""
        with self._lock:
            self._learn()
            if end > self._room or self._stepped:
                self._preallocate(max(end, self._end))
            there = zeroes and offset >= self._used and end <= self._room
            self._end = max(self._end, end)
            self._room = max(self._room, end)
            if not there:
                self._used = max(self._used, end)
            return there

    def _learn(self) -> None:
        if not self._known:
            self._used = self._end = self._room = self.file.size
            self._known = True

    def _preallocate(self, end: int) -> None:
        room = self._room
        self._stepped = False
        target = -(-(end + self._ahead) // self._align) * self._align
        if self._refused or target > FARTHEST:
            return
        try:
            done = self.file.zero_fast(room, target - room)
        except OSError:
            done = False
            # A part of it may have been set aside.
            self.file.invalidate()
            if self.file.size > room:
                self.file.truncate(room)
        if done:
            self._room = target
        else:
            self._refused = True

    def _fallen_short(self) -> None:
        """A request past the file's end failed: where there was no room ahead of it, the file tells its length."""
        with self._lock:
            self._known = self._known and self._room > self._end

    def _drop(self) -> None:
        """Cut off what is ahead. Called with the lock."""
        if self._known:
            if self._room > self._end:
                self.file.truncate(self._end)
            self._known = False
            self._used = 0
        self._refused = self._stepped = False

    def truncate(self, size: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        with self._lock:
            self._learn()
            if self._end <= size <= self._end + STEP:
                if size > self._room:
                    self.file.truncate(size)
                    self._room = size
                    self._stepped = True
                self._end = size
            else:
                self._drop()
                self.file.truncate(size)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        with self._lock:
            if not full and self._known and offset >= self._used and offset + length <= self._room:
                self._end = max(self._end, offset + length)
                return
            self._drop()
            self.file.reserve(offset, length, full=full)

    # The rest

    def reopen(self, *, readonly: bool) -> None:
        if readonly and not self.readonly:
            with self._lock:
                self._drop()
        super().reopen(readonly=readonly)

    def close(self) -> None:
        if self._closed:
            return
        try:
            with self._lock:
                self._drop()
        finally:
            super().close()
