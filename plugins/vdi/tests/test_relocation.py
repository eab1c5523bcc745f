"""Compacting VDI images: blocks move into the places of blocks that are zeroes."""

from __future__ import annotations

from vm_core.testing.compaction import CompactionTests


class TestCompacting(CompactionTests):
    """The kit's tests."""

    driver = "vdi"
    cases = (({}, 1 << 20),)
    tolerated = ("ERROR: allocated blocks mismatch",)
