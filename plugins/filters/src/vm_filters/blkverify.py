"""``blkverify``: an image under test and a raw one that is right; what they read must be the same.

The first difference is a FatalError, and no request is carried out after it: whoever looks for a bug in a driver wants
to see the images as they were when it struck. Requests go to both. See QEMU's *docs/devel/blkverify*.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from typing import TYPE_CHECKING, Any, NoReturn, Self

from vm_core.block import names
from vm_core.block.extents import walk
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import gather, scatter, total
from vm_core.errors import BlockError, FatalError, ImageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


class Blkverify(Node):
    """Reads from both and compares."""

    driver = "blkverify"
    is_protocol = True

    def __init__(self, raw: Node, test: Node, *, owned: Sequence[Node] = ()) -> None:
        self.raw = raw
        self.test = test
        self.readonly = raw.readonly or test.readonly
        self.filename = f"blkverify:{raw.filename}:{test.filename}"
        self._owned = list(owned)
        self._closed = False
        #: The difference that was found.
        self._found: str | None = None

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """``blkverify:RAW:TEST``. Without the prefix it is the image under test."""
        if not filename.startswith("blkverify:"):
            return {"test": {"filename": filename}}
        raw, colon, test = filename.removeprefix("blkverify:").partition(":")
        if not colon:
            raise ImageError("", "blkverify requires raw copy and original image path")
        return {"raw": {"filename": raw}, "test": {"filename": test}}

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Self:
        children: list[Node] = []
        try:
            for role in ("raw", "test"):
                if role not in options:
                    raise ImageError("", f'A block device must be specified for "{role}"')
                children.append(context.open_given(role, options.pop(role), image=role == "test"))
        except BaseException:
            for node in context.owned(*children):
                node.close()
            raise
        node = cls(children[0], children[1], owned=context.owned(*children))
        node.readonly = node.readonly or context.readonly
        node.full_options = {
            "driver": cls.driver,
            "raw": node.raw.full_options,
            "test": node.test.full_options,
        }
        if any(child.filename.startswith("json:") for child in children):
            node.filename = names.json_name(node.full_options)
        return node

    @property
    def size(self) -> int:
        return self.test.size

    def _stop(self, text: str) -> NoReturn:
        self._found = f"blkverify: {text}"
        raise FatalError(self._found)

    def _check(self) -> None:
        if self._found is not None:
            raise FatalError(self._found)

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check()
        length = total(buffers)
        other = bytearray(length)
        failures: list[OSError | None] = []
        for node, target in ((self.test, list(buffers)), (self.raw, [memoryview(other)])):
            try:
                node.read(offset, target)
                failures.append(None)
            except OSError as error:
                failures.append(error)
        self._compare_failures("read", offset, length, failures)
        found = gather(buffers)
        if found != other:
            at = next(index for index in range(length) if found[index] != other[index])
            self._stop(f"read offset={offset} bytes={length} contents mismatch at offset {offset + at}")
        scatter(found, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self._both("write", offset, total(buffers), lambda node: node.write(offset, buffers, fua=fua))

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self._both("write", offset, length, lambda node: node.zero(offset, length, unmap=unmap, fua=fua))

    def discard(self, offset: int, length: int) -> None:
        """Nothing: what is read afterwards could be anything, and differ."""
        if self.readonly:
            raise self.read_only_error()

    def _both(self, what: str, offset: int, length: int, act: Any) -> None:
        self._check()
        failures: list[OSError | None] = []
        for node in (self.test, self.raw):
            try:
                act(node)
                failures.append(None)
            except OSError as error:
                failures.append(error)
        self._compare_failures(what, offset, length, failures)

    def _compare_failures(self, what: str, offset: int, length: int, failures: Sequence[OSError | None]) -> None:
        codes = [0 if failure is None else -(failure.errno or 5) for failure in failures]
        if codes[0] != codes[1]:
            self._stop(f"{what} offset={offset} bytes={length} return value mismatch {codes[0]} != {codes[1]}")
        if failures[0] is not None:
            raise failures[0]

    def flush(self) -> None:
        # Only the image under test has something of its own to bring to the disk.
        self.test.flush()

    def truncate(self, size: int) -> None:
        """Of the raw image alone, which is what the peer does too."""
        self.raw.truncate(size)

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        """Zeroes are where the raw image has them."""
        end = offset + max(0, min(length, self.size - offset))
        position = offset
        for extent in walk(self.raw, offset, end - offset):
            position = extent.end
            if extent.kind is Kind.ZERO:
                yield Mapping(Kind.ZERO, extent.offset, extent.length)
            else:
                yield Mapping(Kind.DATA, extent.offset, extent.length, self, extent.offset, not self.readonly)
        if position < end:  # the raw image is shorter
            yield Mapping(Kind.DATA, position, end - position, self, position, not self.readonly)
        if end < offset + length:
            yield Mapping(Kind.EOF, end, offset + length - end)

    def allocated(self) -> int:
        """Neither's."""
        raise BlockError.of(errno.ENOTSUP)

    def children(self) -> Dict[str, Node]:
        return {"raw": self.raw, "test": self.test}

    def claim(self) -> None:
        self.raw.claim()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for node in self._owned:
                node.close()
