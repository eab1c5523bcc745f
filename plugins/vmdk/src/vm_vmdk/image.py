"""The driver: one open VMDK image.

An image is a row of extents (``extent.py``, ``sparse.py``, ``sesparse.py``). Its descriptor says which: a file of its
own that names the extents' files, or text embedded in the only extent, which then is all that counts. Every file that
a descriptor names is opened through the gate, relative to the descriptor.

The content ID in the descriptor changes with the first write after opening, so that children notice. No run is told to
be writable before; so the first write of any kind comes to :meth:`Vmdk.allocate`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from vm_core.block.format import BackingReference, Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.errors import BlockError, ImageError

from . import chain
from .descriptor import FLAT_TYPES, MAX_LENGTH, NO_PARENT, Descriptor, ExtentLine
from .extent import Extent, FlatExtent, NoAccessExtent, ZeroExtent, at
from .header import COWD_MAGIC, MAGIC, SECTOR, SparseHeader
from .sparse import SparseExtent, cowd_geometry, hosted_geometry, pack_grain, read_header

if TYPE_CHECKING:
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext
    from vm_core.block.relocation import Relocation

#: ``createType`` of images whose extents are those of the descriptor. What kind each extent is, its line says.
_TYPES = frozenset(
    name.lower()
    for name in (
        "monolithicSparse",
        "monolithicFlat",
        "streamOptimized",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "2GbMaxExtentSparse",
        "2GbMaxExtentFlat",
        "vmfs",
        "vmfsThin",
        "vmfsPreallocated",
        "vmfsEagerZeroedThick",
        "vmfsSparse",
        "seSparse",
        "custom",
        "fullDevice",
        "partitionedDevice",
    )
)

#: Largest virtual size: what fits into an offset.
_MAX_SIZE = (1 << 63) - SECTOR


class Vmdk(Format):
    """One open image."""

    backing_format_failure = "backing_file must be a vmdk image"
    zero_parts = False
    copy_step = 1024 * 1024

    def __init__(
        self, file: Node, name: str, descriptor: Descriptor, place: int, extents: Sequence[Extent], *, readonly: bool
    ) -> None:
        """*place* is where in *file* the descriptor's text begins."""
        self.file = file
        self.readonly = readonly
        self.name = name
        self.descriptor = descriptor
        self.extents = list(extents)
        self._place = place
        self._starts = [extent.start for extent in self.extents]
        self._size = self.extents[-1].end if self.extents else 0
        self._touched = False
        self._parent: Node | None = None
        #: Why the backing image is not the parent; empty where it is.
        self._parent_reason = ""
        self._children: dict[str, Node] = {}
        grained = [extent for extent in self.extents if extent.grain]
        self.cluster_size = unit = max([extent.grain for extent in grained], default=1)
        if any(extent.start % extent.grain or unit % extent.grain for extent in grained):
            # Grains that do not lie at multiples of any one number: whatever is done is done to the whole image.
            self.cluster_size = max(self._size, 1)
        self.special_unit = max([extent.grain for extent in self.extents if extent.compressed], default=None)
        self.compressed_only = any(extent.compressed for extent in self.extents)
        self.sparse = all(isinstance(extent, FlatExtent) for extent in self.extents) and bool(self.extents)
        self.emptied_first = self.sparse

    # Opening

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Vmdk:
        name = context.filename or file.filename
        size = file.size
        if not size:
            raise ImageError(name, "File is too small, not a valid image")
        magic = file.pread(0, min(size, 4))
        if magic == MAGIC:
            found = _open_monolithic(file, name, context)
        elif magic == COWD_MAGIC:
            cowd_geometry(file, name)
            raise ImageError(
                name,
                "this is an extent of an image, not a whole one: open the descriptor that names it",
                peer=f"Could not open '{name}': Invalid argument",
            )
        else:
            found = _open_descriptor(file, name, 0, file.pread(0, min(size, MAX_LENGTH + 1)), context)
        hint = found.descriptor.parent_hint
        if hint:
            found.backing_reference = BackingReference(chain.find_parent(found.descriptor, name, context), "vmdk")
        if not found.readonly:
            found.load_for_writing()
        return found

    @property
    def size(self) -> int:
        return self._size

    @property
    def content_id(self) -> int:
        """``CID``: changes with the first write after the image is opened."""
        return self.descriptor.cid or 0

    def children(self) -> dict[str, Node]:
        return self._children

    def load_for_writing(self) -> None:
        """Read what only writing needs. Raises ImageError."""
        for extent in self.extents:
            extent.load_for_writing()

    def backing_changed(self, node: Node | None) -> None:
        self._parent = node
        self._parent_reason = chain.check_parent(self.descriptor, node) if node is not None else ""

    # Reading

    def map(self, offset: int, length: int) -> Iterable[Mapping]:
        writable = self._touched and not self.readonly
        pending: Mapping | None = None
        for extent, start, stop in at(self.extents, self._starts, offset, length):
            for run in extent.runs(start, stop, writable):
                if run.kind is Kind.UNALLOCATED and self._parent_reason:
                    # The parent has to be what it was when this image was made.
                    raise BlockError.of(errno.EINVAL)
                if pending is None:
                    pending = run
                elif _adjoins(pending, run):
                    pending = pending._replace(length=pending.length + run.length)
                else:
                    yield pending
                    pending = run
        if pending is not None:
            yield pending

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        if all(extent.cached(start, stop) for extent, start, stop in at(self.extents, self._starts, offset, length)):
            return list(self.map(offset, length))
        return None

    def read_special(self, mapping: Mapping) -> bytes:
        extent, place, index = mapping.token
        data: bytes = extent.read_special(place, index)
        start = mapping.offset - extent.start - index * extent.grain
        return data if not start and mapping.length == len(data) else data[start : start + mapping.length]

    # Writing

    def _touch(self) -> None:
        """The first write is about to happen: a new content ID."""
        if self._touched:
            return
        new = self.descriptor.new_cid()
        if new is not None:
            at_byte, digits = new
            self.file.pwrite(self._place + at_byte, digits)
            if not self._place:
                self._fill_sector()
        self._touched = True

    def _fill_sector(self) -> None:
        """Have a descriptor of its own file end with a sector, as qemu-img leaves one that was written to."""
        size = self.file.size
        if size % SECTOR:
            self.file.pwrite(size, bytes(-size % SECTOR))

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Extent, int, int]]:
        """The extents that a write touches. Raises BlockError where one cannot be written."""
        parts = list(at(self.extents, self._starts, offset, length))
        for extent, _, _ in parts:
            if extent.readonly:
                raise BlockError.of(errno.EACCES, f"{self.name}: the descriptor says that an extent is read-only")
        self._touch()
        return iter(parts)

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        return [one for extent, start, stop in self._parts(offset, length) for one in extent.allocate(start, stop)]

    def commit(self, allocations: Sequence[Allocation]) -> None:
        for one in allocations:
            one.token.commit(one)

    def abort(self, allocations: Sequence[Allocation]) -> None:
        """Grains that no table knows are lost space at the worst: what is behind them may be in use already."""

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        parts = list(at(self.extents, self._starts, offset, length))
        if not all(extent.can_zero(start, stop) for extent, start, stop in parts):
            return False
        self._touch()
        for extent, start, stop in parts:
            extent.zero(start, stop)
        return True

    def blank(self, offset: int, length: int) -> bool:
        parts = list(at(self.extents, self._starts, offset, length))
        if not all(extent.can_blank(start, stop) for extent, start, stop in parts):
            return False
        self._touch()
        for extent, start, stop in parts:
            extent.blank(start, stop)
        return True

    def encode(self, offset: int, data: bytes | memoryview) -> bytes | None:
        from .compression import deflate

        extent, start, _ = next(at(self.extents, self._starts, offset, 1))
        if not extent.compressed:
            return None
        return pack_grain(start // SECTOR, deflate(data))

    def allocate_encoded(self, offset: int, length: int) -> Allocation:
        for extent, start, _ in self._parts(offset, 1):
            if isinstance(extent, SparseExtent):
                return extent.allocate_encoded(start, length)
        raise BlockError.of(errno.EINVAL)

    # The whole image

    def flush(self) -> None:
        if self.readonly:
            return
        for extent in self.extents:
            extent.flush()
        self.file.flush()

    def relocation(self) -> Relocation | None:
        from .relocation import VmdkRelocation

        found = VmdkRelocation(self)
        return found if found.possible else None

    def truncate(self, size: int) -> None:
        """As in QEMU: no."""
        raise BlockError.of(errno.ENOTSUP)

    def empty(self) -> None:
        """Forget all grains. The parent is what it is now, since all that this image had is in it."""
        if self._parent is None or any(not isinstance(extent, SparseExtent) for extent in self.extents):
            raise BlockError.of(errno.ENOTSUP)
        new = self.descriptor.new_parent_cid(getattr(getattr(self._parent, "format", None), "content_id", NO_PARENT))
        self._touch()
        if new is not None:
            at_byte, digits = new
            self.file.pwrite(self._place + at_byte, digits)
            self.file.flush()
            self.backing_changed(self._parent)
        for extent in self.extents:
            extent.empty()

    def reopen(self, *, readonly: bool) -> None:
        if not readonly:
            _check_writable(self.extents, self.name)
            for extent in self.extents:
                if extent.file is not None and extent.file is not self.file and not extent.readonly:
                    extent.file.reopen(readonly=False)
            self.load_for_writing()
        else:
            self.flush()
            for node in self._children.values():
                node.reopen(readonly=True)
        self.readonly = readonly
        self._touched = False

    def close(self) -> None:
        """All that has to be written was, by the flush before."""

    def info(self) -> dict[str, Any]:
        parent = self.descriptor.parent_cid
        return {
            "create-type": self.descriptor.create_type,
            "cid": self.content_id,
            "parent-cid": NO_PARENT if parent is None else parent,
            "extents": [extent.info() for extent in self.extents],
        }

    def check(self, *, repair: str = "") -> dict[str, Any]:
        from .check import check

        return check(self, repair=repair)

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .create import create

        create(file, size, options)


def _adjoins(one: Mapping, two: Mapping) -> bool:
    return (
        one.kind is two.kind
        and one.kind is not Kind.SPECIAL
        and one.storage is two.storage
        and (one.host < 0 if two.host < 0 else one.host + one.length == two.host)
        and one.writable == two.writable
    )


_Image = TypeVar("_Image", bound=Vmdk)


def open_embedded(cls: type[_Image], file: Node, name: str, context: OpenContext) -> _Image:
    """A sparse extent with a descriptor in it, which is all of the image. Raises ImageError."""
    return _open_sparse(cls, SparseHeader.parse(file.pread(0, SECTOR)), file, name, context)


def _open_monolithic(file: Node, name: str, context: OpenContext) -> Vmdk:
    """A sparse extent with a descriptor in it; or one that is nothing but its descriptor."""
    head = SparseHeader.parse(file.pread(0, SECTOR))
    if head.version > 3:
        raise ImageError(name, f"Unsupported VMDK version {head.version}")
    if not head.capacity:
        # Nothing but a descriptor, of extents elsewhere; or an image of no size.
        place, length = chain.embedded_place(head, file.size)
        return _open_descriptor(file, name, place, file.pread(place, length), context)
    return _open_sparse(Vmdk, head, file, name, context)


def _open_sparse(cls: type[_Image], head: SparseHeader, file: Node, name: str, context: OpenContext) -> _Image:
    place, length = chain.embedded_place(head, file.size)
    geometry = hosted_geometry(file, name, read_header(file, name))
    readonly = context.readonly
    if geometry.version >= 3 and not geometry.compressed and not readonly:
        readonly = _only_readable("VMDK version 3 must be read only", name, context)
    extent = SparseExtent(0, file, file.filename, geometry, type="", name=name)
    _check_size([extent], name)
    descriptor = _parse(file.pread(place, length), name)
    return cls(file, name, descriptor, place, [extent], readonly=readonly)


def _parse(text: bytes, name: str) -> Descriptor:
    descriptor = Descriptor(text, name)
    if descriptor.cid is None:
        raise ImageError(
            name,
            "there is no descriptor with a content ID (CID) in it; extents of an image are opened by its descriptor",
            peer=f"Could not open '{name}': Invalid argument",
        )
    return descriptor


def _open_descriptor(file: Node, name: str, place: int, text: bytes, context: OpenContext) -> Vmdk:
    """A descriptor that names its extents' files."""
    if len(text) > MAX_LENGTH:
        raise ImageError(
            name,
            f"a descriptor of more than {MAX_LENGTH} bytes is not read",
            peer=f"Could not open '{name}': Invalid argument",
        )
    descriptor = Descriptor(text, name)
    kind = descriptor.create_type
    if not kind:
        raise ImageError(name, "invalid VMDK image descriptor")
    if kind.lower() not in _TYPES:
        raise ImageError(name, f"Unsupported image type '{kind}'")
    lines = descriptor.extents()
    if place:
        # An image of no size has nothing but itself as an extent.
        lines = [line for line in lines if line.sectors]
    extents: list[Extent] = []
    children: dict[str, Node] = {}
    readonly = context.readonly
    for line in lines:
        start = extents[-1].end if extents else 0
        extent = _open_extent(line, start, children, file, name, context, readonly)
        extents.append(extent)
    _check_size(extents, name)
    if not readonly:
        try:
            _check_writable(extents, name)
        except ImageError as error:
            readonly = _only_readable(error.reason, name, context)
    descriptor = _parse(text, name)
    image = Vmdk(file, name, descriptor, place, extents, readonly=readonly)
    image._children = children
    return image


def _open_extent(
    line: ExtentLine,
    start: int,
    children: dict[str, Node],
    file: Node,
    name: str,
    context: OpenContext,
    readonly: bool,
) -> Extent:
    length = line.sectors * SECTOR
    if line.type == "ZERO":
        return ZeroExtent(start, length)
    if line.access == "NOACCESS":
        return NoAccessExtent(start, length, line.type)
    role = f"extents.{len(children)}"
    if not context.located and not os.path.isabs(line.filename):
        raise ImageError(
            name,
            f"Cannot use relative paths with VMDK descriptor file '{name}': "
            f"Cannot generate a base directory for {file.driver} nodes",
        )
    protected = line.access == "RDONLY"
    node = context.open_child(
        role, line.filename, storage=True, beside=True, readonly=readonly or protected or line.type == "SESPARSE"
    )
    children[role] = node
    shown = node.filename
    if line.type in FLAT_TYPES:
        offset = line.offset * SECTOR
        return FlatExtent(start, length, node, shown, type=line.type, offset=offset, readonly=protected)
    if line.type == "SESPARSE":
        from .sesparse import SeSparseExtent

        return SeSparseExtent(start, node, shown, type=line.type, name=name)
    magic = node.pread(0, min(node.size, 4))
    if magic == MAGIC:
        geometry = hosted_geometry(node, name, read_header(node, name))
        if geometry.version >= 3 and not geometry.compressed and not readonly:
            protected = _only_readable("VMDK version 3 must be read only", name, context)
    elif magic == COWD_MAGIC:
        geometry = cowd_geometry(node, name)
    else:
        raise ImageError(name, "Image not in VMDK format")
    sparse = SparseExtent(start, node, shown, geometry, type=line.type, name=name, cowd=magic == COWD_MAGIC)
    sparse.readonly = protected
    return sparse


def _check_writable(extents: Sequence[Extent], name: str) -> None:
    for extent in extents:
        if extent.type == "SESPARSE":
            raise ImageError(name, "No write support for seSparse images available")


def _only_readable(reason: str, name: str, context: OpenContext) -> bool:
    """An image that cannot be written is opened read-only where that will do. Raises ImageError with *reason*."""
    if not context.auto_readonly:
        raise ImageError(name, reason)
    context.readonly = True
    return True


def _check_size(extents: Sequence[Extent], name: str) -> None:
    if extents and extents[-1].end > _MAX_SIZE:
        raise ImageError(
            name,
            f"a virtual size of {extents[-1].end} bytes is more than an image can have",
            peer="Could not refresh total sector count: File too large",
        )
