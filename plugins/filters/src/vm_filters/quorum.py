"""``quorum``: several images with the same contents. All are written; what enough of them agree on is read.

Theory of operation. A read goes to every child; the answers are counted whole, buffer against buffer. The one with the
most votes is given out if it has at least *vote-threshold*. With *blkverify* the first difference is a FatalError, and
no request is carried out after it. With *rewrite-corrupted* those that said something else are
written over. The pattern *fifo* asks one child after the other until one can be read, and does not vote. A write or
flush succeeds if it did on *vote-threshold* children; else the error that most of them had is reported.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from vm_core.block import names
from vm_core.block.extents import Extent, walk
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import gather, scatter, total
from vm_core.errors import BlockError, FatalError, ImageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

PATTERNS = ("quorum", "fifo")


class Quorum(Node):
    """*threshold* of the *nodes* have to agree."""

    driver = "quorum"

    #: Nobody may take the bytes from one child.
    opaque = True

    def __init__(
        self,
        nodes: Sequence[Node],
        threshold: int,
        *,
        verify: bool = False,
        rewrite: bool = False,
        fifo: bool = False,
        owned: Sequence[Node] = (),
    ) -> None:
        self.nodes = list(nodes)
        self.threshold = threshold
        self.readonly = any(node.readonly for node in nodes)
        self.request_alignment = max(node.request_alignment for node in nodes)
        self._verify = verify
        self._rewrite = rewrite
        self._fifo = fifo
        self._owned = list(owned)
        self._closed = False
        #: The difference that was found (*verify*).
        self._found: str | None = None

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Self:
        given = {key: value for key, value in options.items() if key != "children"}
        children = options.pop("children", None)
        if isinstance(children, dict):
            raise ImageError("", "Option children is not a valid array")
        if not isinstance(children, list) or not children:
            raise ImageError("", "Number of provided children must be 1 or more")
        threshold = _number(options.pop("vote-threshold", 0))
        if threshold < 1:
            raise ImageError("", "Parameter 'vote-threshold' expects a value >= 1")
        if threshold > len(children):
            raise ImageError("", "threshold may not exceed children count")
        pattern = options.pop("read-pattern", "quorum")
        if pattern not in PATTERNS:
            raise ImageError("", "Please set read-pattern as fifo or quorum")
        verify, rewrite = (_switch(name, options.pop(name, False)) for name in ("blkverify", "rewrite-corrupted"))
        if pattern == "quorum":
            if verify and (len(children) != 2 or threshold != 2):
                raise ImageError(
                    "", "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
                )
            if verify and rewrite:
                raise ImageError("", "rewrite-corrupted=on cannot be used with blkverify=on")
        nodes: list[Node] = []
        try:
            for number, child in enumerate(children):
                nodes.append(context.open_given(f"children.{number}", child, image=True))
            node = cls(
                nodes,
                threshold,
                verify=verify,
                rewrite=rewrite,
                fifo=pattern == "fifo",
                owned=context.owned(*nodes),
            )
            if len({each.size for each in nodes}) != 1:
                raise ImageError("", "Could not refresh total sector count: Input/output error")
        except BaseException:
            for one in context.owned(*nodes):
                one.close()
            raise
        node.readonly = node.readonly or context.readonly
        node.full_options = {"driver": cls.driver, **given, "children": [each.full_options for each in nodes]}
        node.full_options["vote-threshold"] = threshold
        node.filename = names.json_name(node.full_options)
        return node

    @property
    def size(self) -> int:
        return self.nodes[0].size

    # Reading

    def _check(self) -> None:
        if self._found is not None:
            raise FatalError(self._found)

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check()
        if self._fifo:
            self._read_first(offset, buffers)
        else:
            self._read_voted(offset, buffers)

    def _read_first(self, offset: int, buffers: Sequence[Buffer]) -> None:
        failure: OSError = BlockError.of(errno.EIO)
        for node in self.nodes:
            try:
                node.read(offset, buffers)
                return
            except OSError as error:
                failure = error
        raise failure

    def _read_voted(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = total(buffers)
        answers: list[tuple[Node, bytes]] = []
        failures: list[OSError] = []
        for node in self.nodes:
            try:
                answers.append((node, node.pread(offset, length)))
            except OSError as error:
                failures.append(error)
        if len(answers) < self.threshold:
            raise _most(failures)
        votes: dict[bytes, int] = {}
        for _, data in answers:
            votes[data] = votes.get(data, 0) + 1
        if self._verify and len(votes) > 1:
            one, two = list(votes)[:2]
            at = next(index for index in range(length) if one[index] != two[index])
            self._found = f"quorum: offset={offset} bytes={length} contents mismatch at offset {offset + at}"
            raise FatalError(self._found)
        winner, count = max(votes.items(), key=lambda entry: entry[1])
        if count < self.threshold:
            raise BlockError.of(errno.EIO)
        scatter(winner, buffers)
        if self._rewrite and len(votes) > 1:
            for node, data in answers:
                if data != winner and not node.readonly:
                    with suppress(OSError):
                        node.pwrite(offset, winner)

    # Changing

    def _all(self, act: Callable[[Node], None]) -> None:
        failures: list[OSError] = []
        for node in self.nodes:
            try:
                act(node)
            except OSError as error:
                failures.append(error)
        if len(self.nodes) - len(failures) < self.threshold:
            raise _most(failures)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self._check()
        # What is written is the same for all even if somebody changes the buffers meanwhile.
        data = [memoryview(gather(buffers))]
        self._all(lambda node: node.write(offset, data, fua=fua))

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self._check()
        self._all(lambda node: node.zero(offset, length, unmap=unmap, fua=fua))

    def discard(self, offset: int, length: int) -> None:
        """Nothing: children may read differently afterwards."""
        if self.readonly:
            raise self.read_only_error()

    def flush(self) -> None:
        self._all(lambda node: node.flush())

    def truncate(self, size: int) -> None:
        raise ImageError("", "Image format driver does not support resize")

    # What it is

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        """Zeroes are where every child has them. Data goes as far as it does in the child where it goes farthest."""
        end = offset + max(0, min(length, self.size - offset))
        children = [_Zeroes(node, offset, end) for node in self.nodes]
        position = offset
        while position < end:
            runs = [child.at(position) for child in children]
            data = [after for zero, after in runs if not zero]
            after = max(data) if data else min([after for _, after in runs])
            if data:
                yield Mapping(Kind.DATA, position, after - position, self, position, not self.readonly)
            else:
                yield Mapping(Kind.ZERO, position, after - position)
            position = after
        if end < offset + length:
            yield Mapping(Kind.EOF, end, offset + length - end)

    def info(self) -> dict[str, Any]:
        """Each child could say something else."""
        raise BlockError.of(errno.ENOTSUP)

    def allocated(self) -> int:
        return sum(node.allocated() for node in self.nodes)

    def children(self) -> Dict[str, Node]:
        return {f"children.{number}": node for number, node in enumerate(self.nodes)}

    def claim(self) -> None:
        for node in self.nodes:
            node.claim()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for node in self._owned:
                node.close()


class _Zeroes:
    """Where a node reads as zeroes, as far as metadata tells; asked at positions that go up."""

    def __init__(self, node: Node, offset: int, end: int) -> None:
        self._extents = walk(node, offset, end - offset)
        self._next: Extent | None = next(self._extents, None)
        self._zero, self._after, self._end = False, offset, end

    def at(self, position: int) -> tuple[bool, int]:
        """Whether there are zeroes at *position*, and where that changes."""
        while self._after <= position:
            extent = self._next
            if extent is None:  # a child that is shorter
                return False, self._end
            self._zero, self._after = extent.kind is Kind.ZERO, extent.end
            self._next = next(self._extents, None)
            while self._next is not None and (self._next.kind is Kind.ZERO) == self._zero:
                self._after, self._next = self._next.end, next(self._extents, None)
        return self._zero, self._after


def _most(failures: Sequence[OSError]) -> OSError:
    """The error that most of *failures* are; the first of equals."""
    codes = [failure.errno for failure in failures]
    return failures[codes.index(max(codes, key=codes.count))]


def _number(value: Any) -> int:
    try:
        return value if isinstance(value, int) else int(str(value), 0)
    except ValueError:
        raise ImageError("", "Parameter 'vote-threshold' expects a number") from None


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise ImageError("", f"Parameter '{name}' expects 'on' or 'off'")
