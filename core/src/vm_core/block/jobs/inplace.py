"""Turning an image into one of another format where it is: its data stays, its metadata is written anew.

The order of writes, and what a power cut leaves:

1. The new format's tables go behind the end of the file, then the parts of its header that do not lie in the first
   sector, beside what the old format has there. All of it is made stable. The file is still one of the old format,
   which sees none of this (it may call the clusters at the end leaked).
2. What was written is read back through the new format's own driver, as if the switch had been made: it must find no
   damage, and each guest byte where the old format has it.
3. The first sector is written: **the switch**. The file is one of the old or one of the new format.
4. What only the old format used is of no use now: it is made zeroes, and the new format may take it over.

Failing or being interrupted before the switch cuts the file back to what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import ImageError, UsageError, VmError
from ..filter import Filter
from ..format import BackingReference
from ..formatnode import FormatNode
from ..inplace import SECTOR, Contents, HeaderPlan, Source, Space, Target
from ..mapping import Kind, Mapping

if TYPE_CHECKING:
    from ..format import Progress
    from ..gate import Gate
    from ..node import Buffer, Node


class Done(NamedTuple):
    """What a conversion came to."""

    #: The format that the image had.
    former: str
    #: Bytes of new metadata.
    metadata: int
    #: Bytes of clusters that the old format used and that went back to the host or are for the new one to use.
    reclaimed: int
    #: Bytes of clusters that are lost until the image is copied.
    lost: int


def convert_inplace(
    filename: str,
    target: str,
    *,
    format: str | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> Done:
    """Make the image *filename*, of *format* (None: probed), one of the format *target*.

    Raises ImageError, with what stands in the way by name and the command that mends it, PluginError or UsageError;
    the image is as it was then.
    """
    from ..open import open_node

    with open_node({"driver": "file", "filename": filename}, readonly=False) as file:
        file.claim()
        return convert_storage(file, target, format=format, gate=gate, progress=progress)


def convert_storage(
    file: Node,
    target: str,
    *,
    format: str | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
    backing: Node | None = None,
) -> Done:
    """The same for the image in *file*, which nobody else uses; *backing* stands in for what it names."""
    from ..open import open_node
    from ..probe import probe

    filename = file.filename
    implementation = _participant(target)
    former = format or probe(file)
    if former == target:
        raise ImageError(filename, f"is a {target} image already")
    _participant(former)
    spec: dict[str, Any] = {"driver": former, "file": file}
    if backing is not None:
        spec["backing"] = backing
    with open_node(spec, readonly=True, gate=gate, share=True, io=False) as node:
        assert isinstance(node, FormatNode)
        work = _Conversion(file, filename, node, target, implementation.inplace_target(), progress)
        return work.run(former)


def _participant(format: str) -> Any:
    """The implementation of a format that takes part. Raises UsageError."""
    from ...descriptors import FormatDriver
    from ...plugins import registry

    driver = registry().find("format", format)
    if not isinstance(driver, FormatDriver) or "inplace" not in driver.capabilities:
        able = [one.name for one in registry().all("format") if "inplace" in one.capabilities]
        raise UsageError(
            f"format '{format}' cannot be converted in place; {', '.join(sorted(able)) or 'no installed one'} can"
        )
    return driver.load()


class _Conversion:
    """One image on its way."""

    def __init__(
        self,
        file: Node,
        filename: str,
        node: FormatNode,
        format: str,
        kind: type[Target],
        progress: Progress | None,
    ) -> None:
        self.file = file
        self.filename = filename
        self.node = node
        self.format = format
        self.kind = kind
        self._progress = progress
        self._total = 2 * node.size
        self.source: Source = node.format.inplace_source()

    def run(self, former: str) -> Done:
        file = self.file
        self._refuse()
        contents = self._contents()
        end = file.size
        switched = False
        try:
            space = Space(file, contents.cluster_size)
            target = self.kind(self.filename, contents, space)
            self._map(target, space)
            kept = self.source.header_ranges()
            plan = target.finish(kept)
            _check_plan(plan, contents.cluster_size, kept)
            file.flush()
            self._verify(plan)
            for offset, data in plan.parts:
                file.pwrite(offset, data)
            file.flush()
            switched = True
            file.pwrite(0, plan.sector.ljust(SECTOR, b"\0"))
            file.flush()
        except BaseException:
            if not switched:
                with suppress(OSError, VmError):
                    file.truncate(end)
                    file.flush()
            raise
        self._clear_header(plan, contents.cluster_size)
        unused = list(space.used.gaps(0, space.end // contents.cluster_size))
        for first, count in unused:
            # As holes where the host can, so that the space is back at once.
            file.zero(first * contents.cluster_size, count * contents.cluster_size, unmap=True)
        file.flush()
        lost = target.settle(file, unused) if unused else 0
        file.flush()
        freed = sum(count for _, count in unused) - lost
        self._tell(1, 1)
        return Done(former, space.end - space.start, freed * contents.cluster_size, lost * contents.cluster_size)

    # Before anything is written

    def _refuse(self) -> None:
        """Raise ImageError for what the target cannot hold, and for damage."""
        extras = [one for one in self.source.extras() if one.word not in self.kind.understands]
        if extras:
            said = "; ".join(
                f"{one.name} ({one.remedy.replace('FILE', self.filename)})" if one.remedy else one.name
                for one in extras
            )
            raise ImageError(self.filename, f"cannot become a {self.format} image in place because of {said}")
        found = self.node.format.check()
        if found.get("corruptions") or found.get("check-errors"):
            raise ImageError(
                self.filename,
                f"is damaged ({found.get('corruptions', 0)} errors) and is not converted; "
                f"vm-img check -r all {self.filename} mends what can be mended",
            )

    def _contents(self) -> Contents:
        """The contents with the backing image's format, which not every format records."""
        contents = self.source.contents
        backing = contents.backing
        if backing is not None and not backing.format:
            if self.node.backing is None:
                raise ImageError(
                    self.filename,
                    f"the format of its backing file '{backing.filename}' is not recorded, and the file is not open",
                )
            contents = contents._replace(backing=BackingReference(backing.filename, self.node.backing.driver))
        if contents.backing is not None and self.node.backing is not None:
            self._check_probing(contents.backing)
        return contents

    def _check_probing(self, backing: BackingReference) -> None:
        """A target that cannot record the backing image's format leaves it to probing: that has to come out right."""
        from ..probe import probe

        below = self.node.backing
        assert below is not None
        if backing.format is None or self.kind.records(backing.format):
            return
        storage = below.children().get("file", below)
        found = probe(storage)
        if found != backing.format:
            raise ImageError(
                self.filename,
                f"a {self.format} image cannot record that its backing file is of format '{backing.format}', and "
                f"probing would take it for '{found}'",
            )

    # New metadata

    def _map(self, target: Target, space: Space) -> None:
        size = space.cluster_size
        limit = space.start // size
        for run in self.node.map(0, self.node.size):
            if run.kind is Kind.ZERO:
                target.zeroes(run.offset, run.length)
            elif run.kind is Kind.SPECIAL or (run.kind is Kind.DATA and run.storage is not self.file):
                raise ImageError(self.filename, "has data that is compressed, encrypted or in another file")
            elif run.kind is Kind.DATA:
                first, count = run.host // size, -(-run.length // size)
                if run.host % size or first + count > limit or first < 1:
                    raise ImageError(self.filename, f"guest data at {run.host:#x} lies where no cluster can be")
                if not space.used.add(first, count):
                    raise ImageError(self.filename, f"guest data at {run.host:#x} is used more than once")
                target.data(run.offset, run.length, run.host)
            self._tell(run.offset + run.length, self._total)

    def _verify(self, plan: HeaderPlan) -> None:
        """Read the image as it would be after the switch. Raises ImageError."""
        from ..open import open_node

        trial = _Trial(self.file, plan)
        spec: dict[str, Any] = {"driver": self.format, "file": trial, "backing": None}
        size = self.node.size
        with open_node(spec, readonly=True, share=True) as node:
            assert isinstance(node, FormatNode)
            found = node.format.check()
            if found.get("corruptions") or found.get("check-errors") or node.size != size:
                raise ImageError(
                    self.filename, f"internal: the new {self.format} metadata is not sound; nothing changed"
                )
            mine, theirs = _normal(node.map(0, size)), _normal(self.node.map(0, size))
            for new in mine:
                if new != next(theirs, None):
                    raise ImageError(
                        self.filename,
                        f"internal: the new {self.format} metadata differs at {new[1]:#x}; nothing changed",
                    )
                self._tell(size + new[1], self._total)
            if next(theirs, None) is not None:
                raise ImageError(self.filename, f"internal: the new {self.format} metadata ends early; nothing changed")

    # After the switch

    def _clear_header(self, plan: HeaderPlan, cluster_size: int) -> None:
        """What the old format had behind the first sector."""
        position = SECTOR
        for offset, data in [*sorted(plan.parts), (cluster_size, b"")]:
            if position < offset:
                self.file.zero(position, offset - position)
            position = max(position, offset + len(data))
        self.file.flush()

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def _check_plan(plan: HeaderPlan, cluster_size: int, kept: Sequence[tuple[int, int]]) -> None:
    """A target's mistake must not become a write over what the old format still needs."""
    if len(plan.sector) > SECTOR:
        raise ValueError("the new header does not fit into a sector")
    for offset, data in plan.parts:
        end = offset + len(data)
        if offset < SECTOR or end > cluster_size or any(offset < stop and start < end for start, stop in kept):
            raise ValueError("a part of the new header lies on top of the old one")


def _normal(runs: Iterator[Mapping]) -> Iterator[tuple[Kind, int, int, int]]:
    """Maximal runs: kind, offset, length, and host offset of data."""
    last: tuple[Kind, int, int, int] | None = None
    for run in runs:
        host = run.host if run.kind is Kind.DATA else -1
        if last is not None:
            kind, offset, length, where = last
            if kind is run.kind and (host < 0 or where + length == host):
                last = kind, offset, length + run.length, where
                continue
            yield last
        last = run.kind, run.offset, run.length, host
    if last is not None:
        yield last


class _Trial(Filter):
    """The file as it will be once the header is in place."""

    driver = "inplace-trial"

    def __init__(self, file: Node, plan: HeaderPlan) -> None:
        super().__init__(file, owned=False)
        self.readonly = True
        self._parts = [(0, plan.sector.ljust(SECTOR, b"\0")), *plan.parts]

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        from ..vectors import cut, scatter, total

        self.file.read(offset, buffers)
        end = offset + total(buffers)
        for start, data in self._parts:
            low, high = max(start, offset), min(start + len(data), end)
            if low < high:
                scatter(data[low - start : high - start], cut(buffers, low - offset, high - low))

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        return False

    def identity(self) -> tuple[Any, ...] | None:
        return None
