"""Compacting VHDX images: blocks move into the places of blocks that are zeroes."""

from __future__ import annotations

from vm_core.testing.compaction import CompactionTests


class TestCompacting(CompactionTests):
    """The kit's tests."""

    driver = "vhdx"
    cases = (({"block_size": "1M"}, 1 << 20), ({"block_size": "2M"}, 1 << 21))
    cut = 1
    repair = True
    stop_units = 8
