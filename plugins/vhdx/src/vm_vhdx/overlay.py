"""Making images differencing ones: the parent locator, as it is written (2.6.2.6.3)."""

from __future__ import annotations

from typing import NamedTuple

from vm_core.block.parents import parent_image, parent_names
from vm_core.errors import UsageError

from .parents import linkage


class Parent(NamedTuple):
    """What a differencing image takes from its parent."""

    #: Keys and values of the parent locator.
    locator: dict[str, str]
    #: Bytes of a logical sector.
    sector_size: int


def look_at(reference: str, image: str, size: int) -> Parent:
    """The parent that *image*, of *size* bytes, is to have. Raises UsageError, ImageError."""
    relative, absolute = parent_names(reference, image)
    with parent_image(reference, image, "vhdx") as (_, driver, whole):
        if size < whole:
            raise UsageError(f"'{reference}' has {whole} bytes: a VHDX image is no smaller than the one below it")
        locator = {
            "parent_linkage": linkage(driver.headers.current.data_write_guid),
            "relative_path": relative if relative.startswith("..\\") else f".\\{relative}",
            "absolute_win32_path": absolute,
        }
        return Parent(locator, driver.metadata.sector_size)
