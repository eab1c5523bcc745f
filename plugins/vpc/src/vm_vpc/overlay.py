"""Making images differencing ones: the parent's names and marks, as they are written (*Parent Locators*).

The parent is named relative to the image and absolutely, both as Windows writes paths; on other systems the absolute
path has no drive. Its UUID has to stay what it is; by the time at which its file was last changed a change is noticed.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from vm_core.block.node import Node
from vm_core.block.parents import parent_image, parent_names
from vm_core.errors import UsageError

from .create import BLOCK_SIZE, new_uuid, stamp, write_dynamic
from .footer import (
    ABSOLUTE,
    COOKIE,
    DIFFERENCING,
    FOOTER_LENGTH,
    RELATIVE,
    SECTOR,
    DynamicHeader,
    Footer,
    Locator,
    with_locators,
)
from .geometry import MAX_SECTORS, QEMU, QEMU_BY_SIZE, geometry_for


class Parent(NamedTuple):
    """What a differencing image tells about its parent."""

    uuid: bytes
    #: When the file was last changed, in the format's seconds.
    timestamp: int
    #: Paths as Windows writes them.
    relative: str
    absolute: str

    def describe(self, header: DynamicHeader, place: int) -> tuple[bytes, bytes]:
        """The bytes of *header* with this parent, whose names are at *place* in the file, and those of the names."""
        header.parent_uuid = self.uuid
        header.parent_timestamp = self.timestamp
        header.parent_name = self.relative.rpartition("\\")[2].encode("utf-16-be")
        locators, data = [], b""
        for code, text in ((RELATIVE, self.relative), (ABSOLUTE, self.absolute)):
            stored = text.encode("utf-16-le")
            space = -(-len(stored) // SECTOR)
            locators.append(Locator(code=code, space=space, length=len(stored), offset=place + len(data)))
            data += stored.ljust(space * SECTOR, b"\0")
        return with_locators(header, locators), data


def changed(path: str) -> int:
    """When the file *path* was last changed, in the format's seconds."""
    return stamp(os.stat(path).st_mtime)


def look_at(reference: str, image: str) -> tuple[Parent, Footer, int]:
    """The parent that *image* is to have: what to tell about it, its footer, and its size in bytes.

    Raises UsageError, ImageError.
    """
    relative, absolute = parent_names(reference, image)
    if not relative.startswith("..\\"):
        relative = f".\\{relative}"
    with parent_image(reference, image, "vpc") as (path, driver, size):
        return Parent(driver.footer.uuid, changed(path), relative, absolute), driver.footer, size


def create_overlay(file: Node, size: int, reference: str) -> None:
    """Write an empty differencing image on the parent *reference*. Raises UsageError, ImageError."""
    parent, below, whole = look_at(reference, file.filename)
    if size != whole and geometry_for(-(-size // SECTOR)).total * SECTOR != whole:
        raise other_size(reference, whole, size)
    by_geometry = below.cylinders * below.heads * below.sectors * SECTOR == whole
    if below.current_size > MAX_SECTORS * SECTOR:
        raise UsageError(
            f"the footer of '{reference}' says {below.current_size} bytes, where a VHD image has "
            f"{MAX_SECTORS * SECTOR} at the most"
        )
    footer = Footer(
        cookie=COOKIE,
        data_offset=FOOTER_LENGTH,
        timestamp=stamp(time.time()),
        creator=QEMU if by_geometry else QEMU_BY_SIZE,
        creator_version=0x00050003,
        creator_os=b"Wi2k",
        original_size=below.current_size,
        current_size=below.current_size,
        cylinders=below.cylinders,
        heads=below.heads,
        sectors=below.sectors,
        disk_type=DIFFERENCING,
        uuid=new_uuid(),
    )
    write_dynamic(file, footer, -(-max(below.current_size, whole) // BLOCK_SIZE), parent)
    file.flush()


def other_size(reference: str, whole: int, size: int) -> UsageError:
    """The error of an image of *size* bytes whose parent has *whole*."""
    return UsageError(f"a VHD image is as large as the one below it: '{reference}' has {whole} bytes instead of {size}")
