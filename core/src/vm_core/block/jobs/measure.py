"""Measure: how many bytes a new image would take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..extents import walk
from ..formatnode import FormatNode
from ..mapping import Kind
from ..node import Node, sectors_up

#: Bytes of a bitmap directory entry before the name, and what entries are aligned to (QCOW2's specification, "Bitmap
#: directory").
_ENTRY, _ENTRY_ALIGNMENT = 24, 8


def data_ranges(node: Node) -> Iterator[tuple[int, int]]:
    """The (offset, length) of everything in *node* and its backing images that is not known to be zero."""
    for extent in walk(node):
        if extent.kind is not Kind.ZERO:
            yield extent.offset, extent.length


def measure(driver: Any, size: int, source: Node | None, options: dict[str, Any]) -> dict[str, int]:
    """Bytes that a new image of the format *driver* (its descriptor) takes: QEMU's BlockMeasureInfo.

    Of *size* bytes and empty, or (with *source*) with that image's data. ``bitmaps`` is there where both formats keep
    bitmaps. Raises UsageError for formats that do not say, and for wrong *options*.
    """
    implementation = driver.load()
    ranges = iter(()) if source is None else data_ranges(source)
    compat = str(options.get("compat") or "")
    cluster = int(options.get("cluster_size") or 65536)
    result: dict[str, int] = implementation.measure(sectors_up(size), ranges, options)
    if (
        isinstance(source, FormatNode)
        and "bitmaps" in driver.capabilities
        and compat not in ("0.10", "v2")
        and _keeps_bitmaps(source)
    ):
        with source.quiesce() as held:
            bitmaps = list(held.bitmaps())
        result = {"bitmaps": _bitmaps(bitmaps, sectors_up(size), cluster), **result}
    return result


def _keeps_bitmaps(source: FormatNode) -> bool:
    from ...plugins import find

    return "bitmaps" in find("format", source.driver).capabilities and source.info().get("compat") != "0.10"


def _bitmaps(bitmaps: list[dict[str, Any]], size: int, cluster: int) -> int:
    """Bytes for *bitmaps* of an image of *size* bytes: bits, tables and directory, in whole clusters."""
    total = directory = 0
    for bitmap in bitmaps:
        bits = -(-size // bitmap["granularity"])
        stored = -(-bits // 8)
        clusters = -(-stored // cluster)
        total += clusters * cluster + -(-clusters * 8 // cluster) * cluster
        entry = _ENTRY + len(bitmap["name"].encode())
        directory += -(-entry // _ENTRY_ALIGNMENT) * _ENTRY_ALIGNMENT
    return total + -(-directory // cluster) * cluster
