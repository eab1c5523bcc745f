"""Counting references (section *Consistency checking*): each cluster has one, and lies where clusters may lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tables import SECTOR, UNALLOCATED, ZERO

if TYPE_CHECKING:
    from .image import Qed


def check(image: Qed, *, fix: bool) -> dict[str, Any]:
    """Look at every reference of *image*; with *fix* those to nowhere are dropped. QEMU's ImageCheck.

    A cluster with two references is counted and left alone: whose it is cannot be known.
    """
    header, tables = image.header, image.tables
    size, table_size = header.cluster_size, header.table_size
    limit = max(tables.end, image.file.size)
    limit = -(-limit // SECTOR) * SECTOR // size * size
    used = bytearray(-(-limit // size // 8) + 1)
    corruptions = fixed = allocated = fragmented = last = 0

    def use(first: int, count: int) -> bool:
        """Count references to clusters; whether they are the first ones."""
        fresh = True
        for cluster in range(first, first + count):
            if used[cluster >> 3] >> (cluster & 7) & 1:
                fresh = False
            used[cluster >> 3] |= 1 << (cluster & 7)
        return fresh

    use(0, header.header_size if header.header_size * size <= limit else limit // size)
    use(header.l1_table_offset // size, table_size)
    for number, where in enumerate(tables.l1):
        if where == UNALLOCATED:
            continue
        good = tables.valid_table(where, limit)
        if good:
            good = use(where // size, table_size)
            if not good:
                corruptions += 1
                # The table's entries count all the same.
        else:
            corruptions += 1
            if fix:
                tables.drop_table(number)
                corruptions -= 1
                fixed += 1
            continue
        for page in range(header.entries // tables.page_entries):
            table = tables.page(number, page)
            assert table is not None
            if not any(table):
                continue
            base = number * header.entries + page * tables.page_entries
            for index, entry in enumerate(table):
                if entry in (UNALLOCATED, ZERO):
                    continue
                allocated += 1
                if last and entry != last + size:
                    fragmented += 1
                last = entry
                if not tables.valid_cluster(entry, limit):
                    corruptions += 1
                    if fix:
                        tables.set(base + index, 1, UNALLOCATED, 0)
                        corruptions -= 1
                        fixed += 1
                elif not use(entry // size, 1):
                    corruptions += 1
    if fixed:
        image.flush()
    total = limit // size
    leaks = total - sum(byte.bit_count() for byte in used)
    result: dict[str, Any] = {
        "check-errors": 0,
        "total-clusters": -(-header.image_size // size),
        "allocated-clusters": allocated,
        "fragmented-clusters": fragmented,
        "compressed-clusters": 0,
        "messages": [],
    }
    for key, value in (("corruptions", corruptions), ("leaks", leaks), ("corruptions-fixed", fixed)):
        if value:
            result[key] = value
    return result
