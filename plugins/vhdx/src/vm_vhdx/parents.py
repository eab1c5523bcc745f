"""Differencing images: which file is the parent (2.6.2.6.3).

The parent locator names it relative to the image, by volume and by an absolute Windows path. The first is tried as it
is; so is an absolute path without a drive. Of the others, which mean nothing here, the last part is looked for beside
the image. The parent's data write GUID must be the one that the image remembers, else the parent has been changed
since.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vm_core.block.parents import first_parent
from vm_core.errors import ImageError

from . import guids
from .headers import LENGTH, PLACES, SIGNATURE, Header, sealed

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


def find_parent(locator: dict[str, str], name: str, context: OpenContext) -> str:
    """The parent's name, relative to the image's directory. Raises ImageError where it is another or changed image.

    Where no file is there, the first of the names: opening it tells what is missing.
    """
    return first_parent(
        _names(locator),
        name,
        context,
        _data_write_guid,
        lambda found, reference, path: _check(found, locator, reference, name),
    )


def _names(locator: dict[str, str]) -> Iterator[str]:
    relative = locator.get("relative_path", "").replace("\\", "/").removeprefix("./")
    if relative:
        yield relative.rpartition("/")[2] if relative[1:2] == ":" else relative.lstrip("/")
    for key in ("absolute_win32_path", "volume_path"):
        path = locator.get(key, "").replace("\\", "/")
        if path.startswith("/") and not path.startswith("//"):
            yield path
        last = path.rpartition("/")[2]
        if last:
            yield last


def linkage(data_write_guid: bytes) -> str:
    """How a parent locator tells in which state the parent was."""
    return "{" + guids.show(data_write_guid) + "}"


def _data_write_guid(path: str) -> bytes | None:
    """The data write GUID of a VHDX image; None where the file is none. Raises OSError where it cannot be read."""
    best: Header | None = None
    with open(path, "rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return None
        for place in PLACES:
            file.seek(place)
            data = file.read(LENGTH)
            header = Header.parse(data)
            sound = len(data) == LENGTH and header.signature == b"head" and sealed(data)
            if sound and (best is None or header.sequence > best.sequence):
                best = header
    return None if best is None else best.data_write_guid


def _check(found: bytes | None, locator: dict[str, str], reference: str, name: str) -> None:
    wanted = [locator[key].strip("{}").lower() for key in ("parent_linkage", "parent_linkage2") if key in locator]
    if found is None or guids.show(found) in wanted:
        return
    raise ImageError(
        name,
        f"'{reference}' is not the parent of this image, or was changed since: its GUID is {guids.show(found)} instead "
        f"of {' or '.join(wanted) or 'none'}; backing.file.filename={reference} opens it all the same",
    )
