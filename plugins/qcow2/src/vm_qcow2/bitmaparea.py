"""Adding, changing and removing the bitmaps extension in the header's cluster, safely at every write.

The name of the backing file stands behind the extensions and has to move with their end. An extension is put at the
end of the area: its data and the new end mark go behind the old end mark, and are stable before the old end mark
becomes its head, which is one write within a sector; until then nobody reads what stands behind. The name is copied to
the end of the cluster first, and counts there while its place is written. While the header's area changes, the
auto-clear bit for bitmaps is off: they are of no value then, and nothing else is lost by a power cut.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from vm_core.errors import BlockError

from . import features
from .extensions import BITMAPS, Extension, ExtensionHead, pack_extensions

if TYPE_CHECKING:
    from .image import Qcow2

SECTOR = 512


def write_extension(image: Qcow2, data: bytes | None) -> None:
    """Make *data* the bitmaps extension (None: there is none), and set the auto-clear bit accordingly.

    Raises BlockError(ENOSPC) where the header's cluster has no room.
    """
    found = image.extensions
    number = next((index for index, one in enumerate(found) if one.type == BITMAPS), None)
    if number is None:
        if data is not None:
            _rewrite(image, len(found), [*found, Extension(BITMAPS, data)])
    elif data is None:
        _rewrite(image, number, [*found[:number], *found[number + 1 :]])
    elif data != found[number].data:
        at = _place(image, number) + ExtensionHead.LENGTH
        if at // SECTOR != (at + len(data) - 1) // SECTOR:
            _set_valid(image, valid=False)
        image.store.write(at, data)
        image.store.barrier()
        image.extensions[number] = Extension(BITMAPS, data)
    _set_valid(image, valid=data is not None)


def _set_valid(image: Qcow2, *, valid: bool) -> None:
    header = image.header
    flags = header.autoclear_features & ~features.BITMAPS | (features.BITMAPS if valid else 0)
    if flags != header.autoclear_features:
        header.autoclear_features = flags
        image.store.write_header("autoclear_features")
        image.store.barrier()


def _place(image: Qcow2, number: int) -> int:
    """Where extension *number* of the area starts."""
    before = image.extensions[:number]
    return image.header.header_length + sum(ExtensionHead.LENGTH + (len(one.data) + 7 & ~7) for one in before)


def _rewrite(image: Qcow2, number: int, wanted: list[Extension]) -> None:
    """Let the area have the extensions *wanted*, which differ from what is there from *number* on."""
    store, header = image.store, image.header
    start = _place(image, number)
    old_end = _place(image, len(image.extensions)) + ExtensionHead.LENGTH
    rest = pack_extensions(wanted[number:])
    name = b""
    if header.backing_file_offset:
        name = image.file.pread(header.backing_file_offset, header.backing_file_size)
    end = start + len(rest)
    if end + len(name) > image.cluster_size:
        raise BlockError.of(errno.ENOSPC)
    _set_valid(image, valid=False)
    spare = image.cluster_size - len(name) & ~7
    if name:
        if spare < max(end + len(name), old_end, header.backing_file_offset + len(name)):
            spare = 0  # no room for a copy: one write of all, as everybody else does it
        else:
            store.write(spare, name)
            store.barrier()
            header.backing_file_offset = spare
            store.write_header("backing_file_offset")
            store.barrier()
    head, tail = rest[: ExtensionHead.LENGTH], rest[ExtensionHead.LENGTH :] + name
    clean = max(0, old_end - end - len(name))
    tail += bytes(clean)
    removing = len(wanted) < len(image.extensions)
    if name and not spare:
        header.backing_file_offset = end
        store.write_header("backing_file_offset")
        store.write(start, head + tail)
        store.barrier()
    else:
        if removing:
            # An end mark first: nobody reads on while the rest changes.
            store.write(start, bytes(ExtensionHead.LENGTH))
            store.barrier()
        if tail:
            store.write(start + len(head), tail)
            store.barrier()
        store.write(start, head)
        store.barrier()
        if name:
            header.backing_file_offset = end
            store.write_header("backing_file_offset")
            store.barrier()
            store.write(spare, bytes(len(name)))
    image.extensions = wanted
