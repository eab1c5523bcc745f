"""New images, as qemu-img makes them.

A sparse extent: header, room for a descriptor, the redundant grain directory with its tables, the grain directory with
its tables; all tables are there from the start, so grains begin behind them at a multiple of their size.
"""

from __future__ import annotations

import os
from array import array
from typing import Any, NamedTuple

from vm_core.block.node import Node
from vm_core.block.tables import dump
from vm_core.errors import ImageError, UsageError

from . import chain
from .descriptor import NO_PARENT, NewDescriptor
from .header import (
    COMPRESSION_DEFLATE,
    FLAG_COMPRESSED,
    FLAG_MARKERS,
    FLAG_NEWLINES,
    FLAG_REDUNDANT,
    FLAG_ZEROED,
    MAGIC,
    SECTOR,
    SparseHeader,
)
from .tables import MAX_DIRECTORY

#: Bytes of guest data in an extent of a split image.
SPLIT = 2 << 30
#: Sectors of a grain, entries of a table, sectors of a table, sectors kept for a descriptor.
GRAIN, TABLE_ENTRIES, TABLE, DESCRIPTOR = 128, 512, 4, 20
#: Directory entries that are written at a time.
_STEP = 1 << 18

ADAPTERS = ("ide", "buslogic", "lsilogic", "legacyESX")


class Subformat(NamedTuple):
    """What an image consists of."""

    flat: bool = False
    split: bool = False
    stream: bool = False


SUBFORMATS = {
    "monolithicSparse": Subformat(),
    "monolithicFlat": Subformat(flat=True),
    "twoGbMaxExtentSparse": Subformat(split=True),
    "twoGbMaxExtentFlat": Subformat(flat=True, split=True),
    "streamOptimized": Subformat(stream=True),
}


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Make an image of *size* bytes, rounded up to sectors, popping *options*. Raises UsageError, ImageError."""
    size = -(-size // SECTOR) * SECTOR
    adapter = options.pop("adapter_type", None) or "ide"
    kind = options.pop("subformat", None) or "monolithicSparse"
    version = options.pop("hwversion", None)
    version = "undefined" if version is None else str(version)
    tools = options.pop("toolsversion", None)
    compat6 = options.pop("compat6", None)
    zeroed = bool(options.pop("zeroed_grain", None))
    backing = options.pop("backing_file", None) or ""
    backing_format = options.pop("backing_fmt", None)
    if adapter not in ADAPTERS:
        raise _not_among("adapter_type", adapter, ADAPTERS)
    if kind not in SUBFORMATS:
        raise _not_among("subformat", kind, tuple(SUBFORMATS))
    subformat = SUBFORMATS[kind]
    if compat6 and version != "undefined":
        raise UsageError("compat6 cannot be enabled with hwversion set")
    if version == "undefined":
        version = "6" if compat6 else "4"
    if backing_format is not None and backing_format != "vmdk":
        raise UsageError("backing_file must be a vmdk image")
    if subformat.flat and backing:
        raise UsageError("Flat image can't have backing file")
    if subformat.flat and zeroed:
        raise UsageError("Flat image can't enable zeroed grain")
    for value, what in ((version, "hwversion"), (tools or "", "toolsversion"), (backing, "backing_file")):
        if any(mark in str(value) for mark in '"\n\r\0'):
            raise UsageError(f"{what} goes into a descriptor between quotes: no quotes and line ends in it")
    parent = _parent_cid(backing, file.filename) if backing else NO_PARENT
    lines = _make_extents(file, size, subformat, zeroed)
    heads = 16 if adapter == "ide" else 255
    text = NewDescriptor(
        cid=int.from_bytes(os.urandom(4), "little"),
        parent_cid=parent,
        create_type=kind,
        parent_hint=backing,
        extents=lines,
        hardware_version=version,
        cylinders=size // SECTOR // (heads * 63),
        heads=heads,
        adapter_type=adapter,
        tools_version="2147483647" if tools is None else str(tools),
    ).text()
    data = text.encode("utf-8", "surrogateescape")
    if subformat.flat or subformat.split:
        try:
            file.pwrite(0, data)
        except OSError as error:
            raise ImageError(file.filename, f"Could not write description: {error.strerror}") from error
    else:
        if len(data) > DESCRIPTOR * SECTOR:
            raise UsageError(f"the descriptor would have {len(data)} bytes; there is room for {DESCRIPTOR * SECTOR}")
        file.pwrite(SECTOR, data)


def _not_among(option: str, value: str, known: tuple[str, ...]) -> UsageError:
    return UsageError(f"{option}={value}: one of {', '.join(known)} is needed").put(f"invalid parameter value: {value}")


def _make_extents(file: Node, size: int, subformat: Subformat, zeroed: bool) -> str:
    """Make the extents' files; returns their lines in the descriptor."""
    if not (subformat.flat or subformat.split):
        make_sparse(file, size, zeroed=zeroed, stream=subformat.stream)
        return f'RW {size // SECTOR} SPARSE "{_line_name(os.path.basename(_path(file.filename)))}"\n'
    from vm_core.block.open import create_storage

    directory, base = os.path.split(_path(file.filename))
    stem, dot, extension = base.rpartition(".")
    if not dot:
        stem, extension = base, ""
    lines = ""
    step = SPLIT if subformat.split else max(size, 1)
    for number, start in enumerate(range(0, size, step), 1):
        part = min(step, size - start)
        suffix = f"-{'f' if subformat.flat else 's'}{number:03d}" if subformat.split else "-flat"
        name = f"{stem}{suffix}{dot}{extension}"
        shown = _line_name(name)
        with create_storage(os.path.join(directory, name), 0) as node:
            if subformat.flat:
                node.truncate(part)  # its first block is on the disk at once, as with qemu-img
            else:
                make_sparse(node, part, zeroed=zeroed, stream=False)
        lines += f'RW {part // SECTOR} {"FLAT" if subformat.flat else "SPARSE"} "{shown}"'
        lines += " 0\n" if subformat.flat else "\n"
    return lines


def _path(filename: str) -> str:
    return filename.removeprefix("file:")


def _line_name(name: str) -> str:
    """A file's name for an extent line."""
    if any(mark in name for mark in '"\n\r'):
        raise UsageError(f"{name!r} cannot stand in a descriptor: a name without quotes and line ends is needed")
    return name


def make_sparse(file: Node, size: int, *, zeroed: bool, stream: bool) -> None:
    """An empty sparse extent of *size* bytes."""
    capacity = size // SECTOR
    tables = -(-capacity // (GRAIN * TABLE_ENTRIES))
    if tables > MAX_DIRECTORY:
        raise UsageError("The image size is too large for file format 'vmdk'")
    directory = -(-tables * 4 // SECTOR)
    redundant = 1 + DESCRIPTOR
    primary = redundant + directory + tables * TABLE
    overhead = -(-(primary + directory + tables * TABLE) // GRAIN) * GRAIN
    header = SparseHeader(
        version=3 if stream else 2 if zeroed else 1,
        flags=FLAG_NEWLINES
        | FLAG_REDUNDANT
        | (FLAG_COMPRESSED | FLAG_MARKERS if stream else 0)
        | (FLAG_ZEROED if zeroed else 0),
        capacity=capacity,
        grain_size=GRAIN,
        descriptor_offset=1,
        descriptor_size=DESCRIPTOR,
        table_entries=TABLE_ENTRIES,
        rgd_offset=redundant,
        gd_offset=primary,
        overhead=overhead,
        compress_algorithm=COMPRESSION_DEFLATE if stream else 0,
    )
    file.truncate(overhead * SECTOR)
    for place in (redundant, primary):
        first = place + directory
        for start in range(0, tables, _STEP):
            count = min(_STEP, tables - start)
            numbers = array("I", range(first + start * TABLE, first + (start + count) * TABLE, TABLE))
            file.pwrite(place * SECTOR + start * 4, dump(numbers, "little"))
    # The header last: before it is there, this is no extent at all.
    file.pwrite(0, header.pack())


def _parent_cid(backing: str, image: str) -> int:
    """The content ID of the backing image. Raises ImageError."""
    from vm_core.block.create import backing_path
    from vm_core.block.gate import SCHEME
    from vm_core.block.open import open_node

    from .descriptor import Descriptor
    from .probe import probe

    path = backing_path(backing, image)
    found: int | None = None
    if SCHEME.match(path) and not path.startswith("file:"):
        # Neither extents nor its own backing image matter here.
        with open_node(path, share=True, backing=False) as node:
            found = getattr(getattr(node, "format", None), "content_id", None)
    else:
        with open_node({"driver": "file", "filename": _path(path)}, share=True) as node:
            size = min(node.size, 64 * 1024)
            head = node.pread(0, size)
        if head.startswith(MAGIC):
            found = Descriptor(chain.embedded_text(head), path).cid
        elif probe(head, size, path):
            found = Descriptor(head, path).cid
    if found is None:
        raise ImageError("", f"{path} has no content ID: it is no VMDK image", peer="Failed to read parent CID")
    return found
