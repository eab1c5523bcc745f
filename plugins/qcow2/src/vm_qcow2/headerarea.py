"""The first cluster, written anew: header, extensions, the backing file's name.

The header is in the first sector, which is written at once: old or new. Where all that it refers to in its cluster is
in that sector too, nothing else is needed. Otherwise what the old header refers to would be overwritten before the new
one is there, so it goes over a header in between: the backing file's name is copied to the end of the cluster, and the
extensions are cut down to those that matter and fit into the first sector.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.format import BackingReference
from vm_core.errors import BlockError

from .extensions import BACKING_FORMAT, FEATURE_NAME_TABLE, Extension, pack_extensions
from .header import MAX_BACKING_NAME, V2_LENGTH, Header

if TYPE_CHECKING:
    from .image import Qcow2

_SECTOR = 512


class NoRoomError(BlockError):
    """The header's cluster has no room for what should be in it."""


def write_area(
    image: Qcow2, extensions: Sequence[Extension], name: bytes | None = None, *, header: Header | None = None
) -> None:
    """Make *extensions* and the backing file's *name* (None: as it is) those of the image, with the header's fields.

    *header*: another one, of another version perhaps, instead of the image's own, which it is not put in the place of.
    Raises BlockError: NoRoomError where they do not fit into the first cluster; nothing is changed then.
    """
    store = image.store
    former = Header.parse(store.file.pread(0, Header.LENGTH))
    former_length = V2_LENGTH if former.version == 2 else former.header_length
    former_name = b""
    if former.backing_file_offset:
        former_name = store.file.pread(former.backing_file_offset, former.backing_file_size)
    if name is None:
        name = former_name
    header = image.header if header is None else header
    area = pack_extensions(extensions)
    start = V2_LENGTH if header.version == 2 else header.header_length
    end = start + len(area) + len(name)
    if end > image.cluster_size:
        raise NoRoomError.of(errno.ENOSPC)
    former_fields = header.backing_file_offset, header.backing_file_size
    header.backing_file_offset = start + len(area) if name else 0
    header.backing_file_size = len(name)
    fixed = _fixed(header, start)
    if header.version == former.version:
        # Header fields that a later version added and this one does not know are kept.
        fixed += store.file.pread(len(fixed), max(0, start - len(fixed)))
    head = (fixed.ljust(start, b"\0") + area + name).ljust(image.cluster_size, b"\0")
    former_end = former_length + len(pack_extensions(image.extensions))
    if former_name:
        former_end = max(former_end, former.backing_file_offset + len(former_name))
    parked = 0
    if max(end, former_end) > _SECTOR:
        parked = _park(image, former_length, former_name, max(end, former_end))
    stop = parked or image.cluster_size
    try:
        store.write(_SECTOR, head[_SECTOR:stop])
        store.barrier()
        store.write(0, head[:_SECTOR])
        store.barrier()
    except BaseException:
        header.backing_file_offset, header.backing_file_size = parked or former_fields[0], former_fields[1]
        raise
    image.extensions = list(extensions)
    if parked:
        store.write(parked, head[parked:])
        store.barrier()


def _fixed(header: Header, length: int) -> bytes:
    return header.pack()[: V2_LENGTH if header.version == 2 else length]


def _park(image: Qcow2, header_length: int, name: bytes, end: int) -> int:
    """Let the header on disk refer to nothing between its sector and what is returned; 0 where that cannot be."""
    store = image.store
    place = image.cluster_size - (len(name) + 7 & ~7)
    place -= place % _SECTOR
    area = pack_extensions([one for one in image.extensions if one.type != FEATURE_NAME_TABLE])
    if place < end or header_length + len(area) > _SECTOR:
        return 0
    sector = store.file.pread(0, header_length)
    header = Header.parse(sector)
    if name:
        store.write(place, name.ljust(image.cluster_size - place, b"\0"))
        store.barrier()
        header.backing_file_offset = place
        at, field = header.pack_fields("backing_file_offset")
        sector = sector[:at] + field + sector[at + len(field) :]
    store.write(0, (sector + area).ljust(_SECTOR, b"\0"))
    store.barrier()
    return place


def change_backing(image: Qcow2, filename: str | None, format: str | None) -> None:
    """Record another backing image (None: none). Raises BlockError: EINVAL, ENOSPC.

    EINVAL: the name is too long, or the data file is raw, which holds all that the guest sees.
    """
    name = (filename or "").encode("utf-8", "surrogateescape")
    if len(name) > MAX_BACKING_NAME or (name and image.raw_data):
        raise BlockError.of(errno.EINVAL)
    others = [one for one in image.extensions if one.type != BACKING_FORMAT]
    if name and format:
        others.insert(0, Extension(BACKING_FORMAT, format.encode()))
    write_area(image, others, name)
    image.backing_reference = BackingReference(filename, format) if filename else None
