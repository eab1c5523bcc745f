"""Which file is the parent of a differencing image, and whether it still is what it was.

The header names the parent several times (*Parent Locators*): relative to the image, absolutely, as a file URL, and by
its bare name. They are tried in this order; an absolute path of Windows with a drive means nothing here, but the file
may lie beside the image by now. The parent must have the UUID that the image remembers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vm_core.block.node import Node
from vm_core.block.parents import first_parent
from vm_core.errors import ImageError

from .footer import (
    ABSOLUTE,
    COOKIE,
    EPOCH,
    FILE_URL,
    FOOTER_LENGTH,
    RELATIVE,
    DynamicHeader,
    Footer,
    locators,
)

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

#: Bytes of a locator that are looked at, at most.
MAX_LOCATOR = 64 << 10


def find_parent(file: Node, header: DynamicHeader, raw: bytes, name: str, context: OpenContext) -> str:
    """The parent's name, relative to the image's directory or absolute. Raises ImageError where it is another image.

    Where no file is there, the first of the names: opening it tells what is missing.
    """

    def check(footer: Footer | None, reference: str, path: str) -> None:
        if footer is not None:
            _check(footer, header, reference, path, name, context)

    return first_parent(_names(file, header, raw), name, context, _read_footer, check)


def _names(file: Node, header: DynamicHeader, raw: bytes) -> Iterator[str]:
    found: dict[bytes, str] = {}
    for locator in locators(raw):
        if locator.length > MAX_LOCATOR or locator.offset + locator.length > file.size:
            continue
        data = file.pread(locator.offset, locator.length)
        if locator.code in (RELATIVE, ABSOLUTE):
            text = data.decode("utf-16-le", "replace")
        elif locator.code == FILE_URL:
            text = data.decode("utf-8", "replace")
        else:
            continue
        text = text.split("\0", 1)[0]
        if text:
            found.setdefault(locator.code, text)
    if RELATIVE in found:
        path = found[RELATIVE].replace("\\", "/").removeprefix("./")
        # A path that is relative to nothing is no relative path.
        yield _last(path) if path[1:2] == ":" else path.lstrip("/")
    if ABSOLUTE in found:
        path = found[ABSOLUTE].replace("\\", "/")
        if path.startswith("/") and not path.startswith("//"):
            yield path
        yield _last(path)
    if FILE_URL in found:
        path = _url_path(found[FILE_URL])
        if path:
            yield path
            yield _last(path)
    text = header.parent_name.decode("utf-16-be", "replace").split("\0", 1)[0]
    if text:
        yield _last(text)


def _last(path: str) -> str:
    """The file's own name."""
    return path.replace("\\", "/").rpartition("/")[2]


def _url_path(url: str) -> str:
    if not url.startswith("file://"):
        return ""
    from urllib.parse import unquote

    rest = unquote(url[7:])
    return rest if rest.startswith("/") else "/" + rest.partition("/")[2]


def _read_footer(path: str) -> Footer | None:
    """The footer of a file; None where it has none. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(FOOTER_LENGTH)
        if not data.startswith(COOKIE):
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - FOOTER_LENGTH))
            data = file.read(FOOTER_LENGTH)
    return Footer.parse(data) if data.startswith(COOKIE) else None


def _check(footer: Footer, header: DynamicHeader, reference: str, path: str, name: str, context: OpenContext) -> None:
    if footer.uuid != header.parent_uuid:
        raise ImageError(
            name,
            f"'{reference}' is not the parent of this image: its UUID is {footer.uuid.hex()} instead of "
            f"{header.parent_uuid.hex()}; backing.file.filename={reference} opens it all the same",
        )
    try:
        changed = int(os.stat(path).st_mtime) - EPOCH
    except OSError:
        changed = 0
    # Which of the two a program remembers differs; a copy has neither as it was, so this alone is no reason to refuse.
    if header.parent_timestamp not in (0, footer.timestamp, changed):
        context.warn(
            f"The parent '{reference}' of '{name}' may have been changed since: its time stamp is not the one that "
            "the image remembers"
        )
