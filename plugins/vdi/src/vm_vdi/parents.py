"""Differencing images: which image is the parent.

An image names its parent by UUID alone, never by file name. So the headers of the images beside it are looked at, as
far as the gate lets them be opened; VirtualBox keeps differencing images in a folder below that of the first parent, so
the folder above is looked at where the gate trusts it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vm_core.errors import GateError, ImageError

from .header import NO_UUID, SECTOR, SIGNATURE, Header, show_uuid

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

#: Files whose headers are looked at, at most.
_MOST = 10_000


def find_parent(header: Header, name: str, context: OpenContext) -> str:
    """The parent's file name, relative to the image's directory. Raises ImageError where its contents have changed.

    Where it is not found, the name that VirtualBox would give it: opening that tells which image is missing.
    """
    directory = os.path.dirname(name)
    own = os.path.basename(name)
    missing = f"{{{show_uuid(header.uuid_link)}}}.vdi"
    if context.gate.closed or context.backing_given or not context.follow_backing:
        return missing
    count = 0
    for folder in ("", ".."):
        try:
            names = sorted(os.listdir(os.path.join(directory, folder) or "."))
        except (OSError, ValueError):
            continue
        for candidate in names:
            if not candidate.lower().endswith(".vdi") or (not folder and candidate == own):
                continue
            count += 1
            if count > _MOST:
                return missing
            reference = os.path.join(folder, candidate)
            found = _read(os.path.join(directory, reference), reference, name, context)
            if found is None or found.uuid_image != header.uuid_link:
                continue
            if header.uuid_parent not in (NO_UUID, found.uuid_last_snap):
                raise ImageError(
                    name,
                    f"the parent '{reference}' has been changed since (modification UUID "
                    f"{show_uuid(found.uuid_last_snap)} instead of {show_uuid(header.uuid_parent)}): "
                    f"backing.file.filename={reference} opens it all the same",
                )
            return reference
    return missing


def _read(path: str, reference: str, name: str, context: OpenContext) -> Header | None:
    """The header of a file that may be a VDI image; None if it is none or may not be opened."""
    try:
        context.gate.check(name, "backing", reference, path)
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            header = Header.parse(file.read(SECTOR))
    except (OSError, GateError):
        return None
    return header if header.signature == SIGNATURE else None
