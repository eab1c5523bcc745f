"""The node: it passes requests on to the node below, unless a rule wants them to fail.

With ``align`` it behaves as storage that takes whole blocks alone: a write that is none reads the blocks at its ends,
changes them and writes them back, and excludes others from them meanwhile; the events ``pwritev_rmw_…`` come on the
way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from vm_core.block import names
from vm_core.block.filter import Filter
from vm_core.block.mapping import Mapping
from vm_core.block.node import Buffer, Node
from vm_core.block.vectors import cut, total, zero_views
from vm_core.errors import ImageError

from .blocklock import BlockLock
from .engine import Engine
from .limits import Limits, fragments, pieces
from .rules import BLOCK_STATUS, DISCARD, FLUSH, READ, SECTIONS, WRITE, WRITE_ZEROES, Rule, make

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

#: Zeroes are written in pieces of this many bytes where they are too short for the node's alignment.
ZERO_STEP = 1 << 20
PERMISSIONS = ("consistent-read", "write", "write-unchanged", "resize")


class Blkdebug(Filter):
    """Errors and breakpoints."""

    driver = "blkdebug"
    watched = True
    is_protocol = True

    def __init__(self, file: Node, rules: Sequence[Rule] = (), limits: Limits | None = None, *, owned: bool = True):
        super().__init__(file, owned=owned)
        self.watched = True
        self.engine = Engine(rules)
        self.breakpoints = self.engine
        self.limits = limits or Limits({}, file.request_alignment)
        self._align = max(self.limits.align, 1)
        self.request_alignment = max(self._align, file.request_alignment)
        self._blocks = BlockLock() if self._align > 1 else None
        #: Something was changed since the last flush: others are not passed on.
        self._changed = False
        #: Something was changed since a format last said that it flushes to the disk.
        self._unsettled = False
        self.engine.event("none")

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """``blkdebug:CONFIG:IMAGE``; CONFIG may be empty. Without the prefix it is the image."""
        if not filename.startswith("blkdebug:"):
            return {"image": {"filename": filename}}
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise ImageError("", "blkdebug requires both config file and image path")
        options: dict[str, Any] = {"image": {"filename": image}}
        if config:
            options["config"] = config
        return options

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Self:
        image = options.pop("image", None)
        config = options.pop("config", None)
        rules: list[Rule] = []
        if config is not None:
            from .configfile import read

            rules = read(config)
        given = names.flat(options)
        for section in SECTIONS:
            rules += _rules(section, options.pop(section, []))
        take, unshare = (_permissions(options.pop(f"{word}-child-perms", [])) for word in ("take", "unshare"))
        if image is None:
            raise ImageError("", 'A block device must be specified for "image"')
        file = context.open_given("image", image)
        owned = bool(context.owned(file))
        try:
            limits = Limits(options, file.request_alignment)
            if take or unshare:
                _lock(file, take, unshare)
            node = cls(file, rules, limits, owned=owned)
        except BaseException:
            if owned:
                file.close()
            raise
        node.readonly = file.readonly or context.readonly
        node._call(config, given)
        return node

    def _call(self, config: str | None, given: dict[str, Any]) -> None:
        """What the node is called: its own form of name where that says everything, else ``json:``."""
        below = self.file
        self.full_options = {
            "driver": self.driver,
            **({} if config is None else {"config": config}),
            **given,
            "image": below.full_options,
        }
        if given or below.filename.startswith("json:"):
            self.filename = names.json_name(self.full_options)
        else:
            self.filename = f"blkdebug:{config or ''}:{below.filename}"

    # Requests

    def event(self, name: str) -> None:
        self.engine.event(name)
        if name == "flush_to_os":
            # What was flushed by now was so of its own accord, by QEMU's format as well.
            self._unsettled = self._changed
        elif name == "flush_to_disk" and self._unsettled:
            # Formats here flush behind their last change themselves, QEMU's leave that to the flush which comes now.
            self._changed, self._unsettled = True, False

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return False

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = total(buffers)
        start, end = self._hull(offset, length)
        with self._ticket(start, end, exclusive=False):
            for begin, step in pieces(start, end - start, self.limits.max_transfer):
                self.engine.check(READ, begin, step)
                first, last = max(begin, offset), min(begin + step, offset + length)
                if first < last:
                    self.file.read(first, cut(buffers, first - offset, last - first))

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        length = total(buffers)
        start, end = self._hull(offset, length)
        padded = (start, end) != (offset, offset + length)
        with self._ticket(start, end, exclusive=padded):
            vector = self._pad(offset, length, start, end, buffers) if padded else buffers
            self._write_blocks(start, end - start, vector, fua)

    def _pad(self, offset: int, length: int, start: int, end: int, buffers: Sequence[Buffer]) -> list[Buffer]:
        """*buffers* with the bytes around them that fill the blocks at both ends."""
        vector = list(buffers)
        align = self._align
        if start < offset:
            self.engine.event("pwritev_rmw_head")
            head = self._read_block(start)
            self.engine.event("pwritev_rmw_after_head")
            vector.insert(0, head[: offset - start])
            if end - start == align and offset + length < end:
                vector.append(head[offset + length - start :])
                return vector
        if offset + length < end:
            self.engine.event("pwritev_rmw_tail")
            tail = self._read_block(end - align)
            self.engine.event("pwritev_rmw_after_tail")
            vector.append(tail[offset + length - (end - align) :])
        return vector

    def _read_block(self, offset: int) -> memoryview:
        self.engine.check(READ, offset, self._align)
        return memoryview(self.file.pread(offset, self._align))

    def _write_blocks(self, offset: int, length: int, buffers: Sequence[Buffer], fua: bool) -> None:
        self._changed = self._unsettled = True
        self.engine.event("pwritev")
        for begin, step in pieces(offset, length, self.limits.max_transfer):
            self.engine.check(WRITE, begin, step)
            self.file.write(begin, cut(buffers, begin - offset, step), fua=fua)
        self.engine.event("pwritev_done")

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        limits = self.limits
        self._changed = self._unsettled = True
        self.engine.event("pwritev_zero")
        for begin, step in fragments(offset, length, self._align, limits.opt_zero, limits.max_zero):
            if begin % self._align or step % self._align or step < limits.opt_zero:
                self._write_zeroes(begin, step)
            else:
                with self._ticket(begin, begin + step, exclusive=False):
                    self.engine.check(WRITE_ZEROES, begin, step)
                    self.file.zero(begin, step, unmap=unmap)
        if fua:
            self.flush()
        self.engine.event("pwritev_done")

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        if self.readonly:
            raise self.read_only_error()
        if offset % self._align or length % self._align or length < self.limits.opt_zero:
            return False
        self._changed = self._unsettled = True
        self.engine.check(WRITE_ZEROES, offset, length)
        return self.file.zero_fast(offset, length, unmap=unmap)

    def _write_zeroes(self, offset: int, length: int) -> None:
        for begin, step in pieces(offset, length, ZERO_STEP):
            self.write(begin, zero_views(step))

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()
        limits = self.limits
        self._changed = self._unsettled = True
        for begin, step in fragments(offset, length, self._align, limits.opt_discard, limits.max_discard):
            if not (begin % self._align or step % self._align):  # parts of blocks cannot be given back
                self.engine.check(DISCARD, begin, step)
                self.file.discard(begin, step)

    def truncate(self, size: int) -> None:
        self._changed = self._unsettled = True
        super().truncate(size)

    def flush(self) -> None:
        if self._changed:
            self.engine.check(FLUSH)
            self.file.flush()
            self._changed = False

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        self.engine.check(BLOCK_STATUS, offset, length)
        return super().map(offset, length)

    def children(self) -> Dict[str, Node]:
        return {"image": self.file}

    def close(self) -> None:
        self.engine.release()
        super().close()

    # Blocks

    def _hull(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the whole blocks of a request."""
        align = self._align
        return offset - offset % align, -(-(offset + length) // align) * align

    @contextmanager
    def _ticket(self, start: int, end: int, *, exclusive: bool) -> Iterator[None]:
        """Keep others from blocks that are read, changed and written back."""
        blocks = self._blocks
        if blocks is None:
            yield
            return
        request = blocks.acquire(start, end, exclusive=exclusive)
        try:
            yield
        finally:
            blocks.release(request)


def _rules(section: str, members: Any) -> list[Rule]:
    """The rules of an option such as ``inject-error.0.event=…``. Raises ImageError."""
    if isinstance(members, dict):
        # One rule may be written without its number.
        number = next((key for key in members if key.isdigit() or isinstance(members[key], dict)), None)
        if number is not None:
            inner = members[number]
            path = f"{number}.{next(iter(inner))}" if isinstance(inner, dict) and inner else number
            raise ImageError("", f"Unused option '{path}' for [{section}]")
        members = [members]
    if not isinstance(members, list):
        raise ImageError("", f"Block protocol 'blkdebug' doesn't support the option '{section}'")
    rules = []
    for number, member in enumerate(members):
        if not isinstance(member, dict):
            raise ImageError("", f"[{section}] section (index {number}) does not consist of keys")
        unknown = next((key for key in member if key not in SECTIONS[section]), None)
        if unknown is not None:
            raise ImageError("", f"[{section}] section doesn't support the option '{unknown}'")
        rules.append(make(section, member))
    return rules


def _permissions(words: Any) -> list[int]:
    """Numbers of the permissions that *words* name. Raises ImageError."""
    found = []
    for word in words if isinstance(words, list) else [words]:
        if word not in PERMISSIONS:
            raise ImageError("", f"Parameter 'null' does not accept value '{word}'")
        found.append(PERMISSIONS.index(word))
    return found


def _lock(file: Node, take: list[int], unshare: list[int]) -> None:
    """Say to other processes what is done with the file below. Raises LockError."""
    from vm_core.block import locks
    from vm_core.block.file import FileProtocol

    current: Node | None = file
    while current is not None and not isinstance(current, FileProtocol):
        current = current.children().get("file")
    if current is not None:
        locks.acquire(current.fileno(), current.filename, take, unshare)
