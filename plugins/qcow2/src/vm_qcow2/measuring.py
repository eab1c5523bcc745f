"""How many bytes a new image takes: every table for the whole of its size, and the clusters of its data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vm_core.errors import UsageError

from .geometry import MAX_L1_BYTES

#: Bytes of an entry in the L1 table, in L2 tables (with subclusters) and in the refcount table.
_ENTRY, _EXTENDED_ENTRY = 8, 16


def measure(size: int, data: Iterable[tuple[int, int]], options: dict[str, Any]) -> dict[str, int]:
    """QEMU's BlockMeasureInfo for an image of *size* bytes with the *data* ranges in it. Raises UsageError."""
    from .create import plan

    given = dict(options)
    encryption = _encryption_header(given)
    preallocation = given.pop("preallocation", None) or "off"
    backing = bool(given.get("backing_file"))
    header, _, _ = plan(0, given, preallocation)
    cluster = 1 << header.cluster_bits
    entry = _EXTENDED_ENTRY if options.get("extended_l2") else _ENTRY
    whole = _up(size, cluster)
    if -(-whole // cluster * entry // cluster) * _ENTRY > MAX_L1_BYTES:
        raise UsageError("The image size is too large (try using a larger cluster size)")
    fully = metadata(whole, cluster, header.refcount_order, entry) + whole
    if preallocation in ("falloc", "full") or backing:
        # How much of a backing chain a new image shares with it is not known: all of it may be its own.
        required = fully
    else:
        required = fully - whole + _clusters(data, cluster) * cluster
    extra = _up(encryption, cluster)
    return {"required": required + extra, "fully-allocated": fully + extra}


def _encryption_header(options: dict[str, Any]) -> int:
    """Bytes of a LUKS header; takes the options of encryption. Raises UsageError."""
    given = {name: options.pop(name) for name in list(options) if name.startswith(("encrypt.", "encryption"))}
    if given.get("encrypt.format") != "luks":
        return 0
    from .encryption import plan

    chosen = plan(given)
    return chosen.header_length if chosen is not None else 0


def metadata(size: int, cluster: int, refcount_order: int, entry: int = _ENTRY) -> int:
    """Bytes of header, L1 and L2 tables, and refcounts, where each of *size* bytes has its cluster."""
    clusters = size // cluster
    tables = _up(clusters * entry, cluster)
    pointers = _up(tables // cluster * _ENTRY, cluster)
    known = cluster + tables + pointers
    return known + _refcounts((known + size) // cluster, cluster, refcount_order)


def _refcounts(clusters: int, cluster: int, order: int) -> int:
    """Bytes of the refcount table and blocks that count *clusters* and themselves."""
    per_block = cluster * 8 >> order
    per_table = cluster // _ENTRY
    blocks = table = 0
    while True:
        count = clusters + blocks + table
        more = -(-count // per_block)
        more_table = -(-more // per_table)
        if (more, more_table) == (blocks, table):
            return (blocks + table) * cluster
        blocks, table = more, more_table


def _clusters(data: Iterable[tuple[int, int]], cluster: int) -> int:
    """How many clusters the ascending ranges touch."""
    count = reached = 0
    for offset, length in data:
        first = max(offset // cluster, reached)
        stop = -(-(offset + length) // cluster)
        if stop > first:
            count += stop - first
            reached = stop
    return count


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
