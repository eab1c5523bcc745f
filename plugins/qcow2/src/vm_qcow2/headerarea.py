"""The first cluster, written anew: header, extensions, the backing file's name.

Everything behind the first sector is written and made stable before the first sector, which holds the header: what an
old header points at may be gone for a moment, but a new one never points at what is not there yet.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vm_core.block.format import BackingReference
from vm_core.errors import BlockError

from .extensions import BACKING_FORMAT, Extension, pack_extensions
from .header import MAX_BACKING_NAME, V2_LENGTH

if TYPE_CHECKING:
    from .image import Qcow2

_SECTOR = 512


def write_area(image: Qcow2, extensions: Sequence[Extension], name: bytes | None = None) -> None:
    """Make *extensions* and the backing file's *name* (None: as it is) those of the image.

    Raises BlockError: ENOSPC where they do not fit into the first cluster; nothing is changed then.
    """
    header, store = image.header, image.store
    if name is None:
        name = b""
        if header.backing_file_offset:
            name = store.file.pread(header.backing_file_offset, header.backing_file_size)
    area = pack_extensions(extensions)
    start = header.header_length
    if start + len(area) + len(name) > image.cluster_size:
        raise BlockError.of(errno.ENOSPC)
    # Header fields that a later version added and this one does not know are kept.
    fields = header.pack()[: V2_LENGTH if header.version == 2 else None]
    kept = store.file.pread(len(fields), max(0, start - len(fields)))
    header.backing_file_offset = start + len(area) if name else 0
    header.backing_file_size = len(name)
    fields = header.pack()[: V2_LENGTH if header.version == 2 else None]
    head = (fields + kept + area + name).ljust(image.cluster_size, b"\0")
    store.write(_SECTOR, head[_SECTOR:])
    store.barrier()
    store.write(0, head[:_SECTOR])
    store.barrier()
    image.extensions = list(extensions)


def change_backing(image: Qcow2, filename: str | None, format: str | None) -> None:
    """Record another backing image (None: none). Raises BlockError: EINVAL for a name that is too long, ENOSPC."""
    name = (filename or "").encode("utf-8", "surrogateescape")
    if len(name) > MAX_BACKING_NAME:
        raise BlockError.of(errno.EINVAL)
    others = [one for one in image.extensions if one.type != BACKING_FORMAT]
    if name and format:
        others.insert(0, Extension(BACKING_FORMAT, format.encode()))
    write_area(image, others, name)
    image.backing_reference = BackingReference(filename, format) if filename else None
