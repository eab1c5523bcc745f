"""Differencing images: which image is the parent.

An image names its parent by UUID alone, never by file name. So the headers of the images beside it are looked at, as
far as the gate lets them be opened; VirtualBox keeps differencing images in a folder below that of the first parent, so
the folder above is looked at where the gate trusts it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from vm_core.block.parents import parent_image
from vm_core.errors import GateError, ImageError, UsageError

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
    if context.gate.closed or context.backing_given:
        return missing

    def allowed(reference: str, path: str) -> bool:
        try:
            context.gate.check(name, "backing", reference, path)
        except GateError:
            return False
        return True

    changed: tuple[str, Header] | None = None
    for reference, found in _candidates(directory, own, allowed):
        if found.uuid_image != header.uuid_link:
            continue
        if header.uuid_parent in (NO_UUID, found.uuid_last_snap):
            return reference
        # A copy of it that was not changed may follow.
        changed = changed or (reference, found)
    if changed is None:
        return missing
    reference, found = changed
    # Who only asks for the name gets it.
    if context.follow_backing:
        raise ImageError(
            name,
            f"the parent '{reference}' has been changed since (modification UUID "
            f"{show_uuid(found.uuid_last_snap)} instead of {show_uuid(header.uuid_parent)}): "
            f"backing.file.filename={reference} opens it all the same",
        )
    return reference


def look_at(reference: str, image: str) -> tuple[Header, int]:
    """The header of the parent that *image* is to have, and its size in bytes. Raises UsageError, ImageError.

    It has to be where it will be looked for.
    """
    with parent_image(reference, image, "vdi") as (path, driver, size):
        header: Header = driver.header
    if header.uuid_image == NO_UUID:
        raise UsageError(f"'{reference}' has no UUID, by which a VDI image knows its parent")
    for candidate, found in _candidates(os.path.dirname(image), os.path.basename(image), lambda *_: True):
        if found.uuid_image == header.uuid_image:
            there = os.path.join(os.path.dirname(image), candidate)
            if os.path.samefile(there, path):
                return header, size
            raise UsageError(
                f"'{there}' has the UUID of '{reference}' and would be taken for it: a VDI image knows its parent by "
                "that alone"
            )
    raise UsageError(
        f"'{reference}' would not be found: a VDI image knows its parent by its UUID alone, and it is looked for among "
        "the *.vdi files in the image's directory and the one above that"
    )


def _candidates(directory: str, own: str, allowed: Callable[[str, str], bool]) -> Iterator[tuple[str, Header]]:
    """The images beside the one called *own* and in the folder above that *allowed* lets be looked at: name, header."""
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
                return
            reference = os.path.join(folder, candidate)
            path = os.path.join(directory, reference)
            if allowed(reference, path):
                header = _read(path)
                if header is not None:
                    yield reference, header


def _read(path: str) -> Header | None:
    """The header of a file that may be a VDI image; None if it is none."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            header = Header.parse(file.read(SECTOR))
    except OSError:
        return None
    return header if header.signature == SIGNATURE else None
