"""The format ``raw``: the bytes of a file, or a window of them.

It keeps no metadata, so it needs none of the locks of other formats and passes requests straight through.

A raw image that was recognised only because nothing else matched is guarded: a guest could write the header of another
format into it, with a backing file of its choice, and have it believed at the next open. Writes after which the image
would probe as something else fail with EPERM, as they do in QEMU; naming the format lifts the guard.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..errors import BlockError, ImageError, UsageError
from .imagenode import ImageNode
from .mapping import Kind, Mapping
from .node import Buffer, Node, sectors_up
from .vectors import cut, fill, gather, total

if TYPE_CHECKING:
    from .open import OpenContext
    from .passage import Hold, Span

#: Bytes at the start and at the end of an image that its probe looks at.
GUARDED = 64 * 1024

#: What the image would be taken for, from its first and last bytes.
Guess = Callable[[bytes, bytes], str]


def _check_window(file: Node, offset: int, size: int | None) -> None:
    """Raise UsageError or ImageError where *file* has no such bytes."""
    if offset < 0 or (size is not None and size < 0):
        raise UsageError("raw: offset and size cannot be negative")
    if offset > file.size:
        raise ImageError(
            file.filename,
            f"raw: offset {offset} is past the end of the file ({file.size} bytes)",
            peer=f"Offset ({offset}) cannot be greater than size of the containing file ({file.size})",
        )
    if size is not None and offset + size > file.size:
        raise ImageError(
            file.filename,
            f"raw: offset {offset} and size {size} reach past the end of the file ({file.size} bytes)",
            peer=f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size "
            f"of the containing file ({file.size})",
        )


class RawNode(ImageNode):
    """*size* bytes of *file* from *offset* on; to its end where *size* is None."""

    driver = "raw"
    transparent = True

    def __init__(
        self,
        file: Node,
        *,
        offset: int = 0,
        size: int | None = None,
        readonly: bool | None = None,
        owned: Sequence[Node] = (),
    ) -> None:
        _check_window(file, offset, size)
        self.file = file
        self.filename = file.filename
        self.readonly = file.readonly if readonly is None else readonly or file.readonly
        self.request_alignment = file.request_alignment
        self.watched = file.watched
        self._watch = file.event if file.watched else None
        self.offset = offset
        self._window = size
        self._guess: Guess | None = None
        self._owned = list(owned)
        self._closed = False

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Node:
        file = context.open_file(options)
        size = options.pop("size", None)
        try:
            if size is not None and size % 512:
                raise UsageError(f"raw: size={size} is no multiple of 512").put("Specified size is not multiple of 512")
            return cls(
                file,
                offset=int(options.pop("offset", 0)),
                size=size,
                readonly=context.readonly,
                owned=context.owned(file),
            )
        except BaseException:
            for node in context.owned(file):
                node.close()
            raise

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        """Give *file* *size* bytes of zeroes, rounded up to sectors of 512."""
        size = sectors_up(size)
        preallocation = options.pop("preallocation", "off")
        file.truncate(size)
        if preallocation != "off" and size:
            from .resize import set_aside

            set_aside(file, 0, size, full=preallocation == "full")

    @classmethod
    def measure(cls, size: int, data: Iterable[tuple[int, int]], options: dict[str, Any]) -> dict[str, int]:
        """QEMU's BlockMeasureInfo: every byte counts, whether it is written or not."""
        return {"required": size, "fully-allocated": size}

    def guard(self, guess: Guess) -> None:
        """Refuse writes after which *guess* would not say ``raw``."""
        self._guess = guess

    @property
    def guarded(self) -> bool:
        """Whether writes are looked at because the format was a guess."""
        return self._guess is not None

    @property
    def size(self) -> int:
        return max(0, self.file.size - self.offset) if self._window is None else self._window

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self._window is not None:
            length = total(buffers)
            if offset + length > self._window:
                inside = max(0, self._window - offset)
                fill(cut(buffers, inside, length - inside))
                buffers = cut(buffers, 0, inside)
                if not inside:
                    return
        if self._watch is not None:
            self._watch("read_aio")
        self.file.read(self.offset + offset, buffers)

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        if self._window is not None and offset + total(buffers) > self._window:
            return False
        return self.file.read_nowait(self.offset + offset, buffers)

    def host_spans(
        self, offset: int, length: int, spans: list[Span], holds: list[Hold], *, write: bool, stable: bool
    ) -> bool:
        if self._watch is not None or offset + length > self.size:
            return False
        if write and (
            self.readonly
            or self.detect_zeroes != "off"
            or (self._guess is not None and not self._unguarded(offset, length))
        ):
            return False
        return self.file.host_spans(self.offset + offset, length, spans, holds, write=write, stable=stable)

    def _write(self, offset: int, length: int, buffers: Sequence[Buffer], fua: bool) -> None:
        if self._guess is not None:
            self._check_guard(offset, length, buffers)
        if self._watch is not None:
            self._watch("write_aio")
        self.file.write(self.offset + offset, buffers, fua=fua)

    def _unguarded(self, offset: int, length: int) -> bool:
        """Whether a write there changes nothing that a probe looks at."""
        return offset >= GUARDED and offset + length <= self.size - GUARDED

    def _check_guard(self, offset: int, length: int, buffers: Sequence[Buffer]) -> None:
        assert self._guess is not None
        if self._unguarded(offset, length):
            return
        size = self.size
        head = bytearray(self.pread(0, min(size, GUARDED)))
        start = max(0, size - GUARDED)
        tail = bytearray(self.pread(start, size - start))
        for target, base in ((head, 0), (tail, start)):
            begin, end = max(offset, base), min(offset + length, base + len(target))
            if begin < end:
                target[begin - base : end - base] = gather(cut(buffers, begin - offset, end - begin))
        guess = self._guess(bytes(head), bytes(tail))
        if guess != self.driver:
            raise BlockError.of(
                errno.EPERM, f"{self.filename}: the write would make this raw image look like {guess}; open it as raw"
            )

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        self.file.zero(self.offset + offset, length, unmap=unmap, fua=fua)

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        if self.readonly:
            raise self.read_only_error()
        if offset + length > self.size:
            raise self._past_end()
        return self.file.zero_fast(self.offset + offset, length, unmap=unmap and self.discard_unmap)

    def _discard(self, offset: int, length: int) -> None:
        self.file.discard(self.offset + offset, length)

    def flush(self) -> None:
        if not self.readonly:
            if self._watch is not None:
                self._watch("flush_to_os")
                self._watch("flush_to_disk")
            self.file.flush()

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        inside = max(0, min(length, self.size - offset))
        if inside:
            yield Mapping(Kind.DATA, offset, inside, self.file, self.offset + offset, not self.readonly)
        if inside < length:
            yield Mapping(Kind.EOF, offset + inside, length - inside)

    def truncate(self, size: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        if self._window is not None:
            raise ImageError(self.filename, "raw: an image with a fixed size cannot be resized")
        self.file.truncate(self.offset + size)

    def reconfigure(self, options: dict[str, Any]) -> None:
        """Another window: the options ``offset`` and ``size``. Raises UsageError, ImageError."""
        from ..options import parse_size

        offset = parse_size(options.get("offset", self.offset), "offset")
        size = parse_size(options["size"], "size") if "size" in options else self._window
        _check_window(self.file, offset, size)
        self.offset, self._window = offset, size

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        self.file.reserve(self.offset + offset, length, full=full)

    def allocated(self) -> int:
        return self.file.allocated()

    def children(self) -> Dict[str, Node]:
        return {"file": self.file}

    def event(self, name: str) -> None:
        self.file.event(name)

    def reopen(self, *, readonly: bool) -> None:
        if readonly != self.readonly:
            if readonly:
                self.flush()
            self.file.reopen(readonly=readonly)
            self.readonly = readonly

    def alone(self) -> AbstractContextManager[None]:
        return self.file.alone()

    def claim(self) -> None:
        self.file.claim()

    def invalidate(self) -> None:
        self.file.invalidate()

    def identity(self) -> tuple[Any, ...] | None:
        return self.file.identity()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            for node in self._owned:
                node.close()
