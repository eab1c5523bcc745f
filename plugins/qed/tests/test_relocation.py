"""Compacting QED images: clusters move into the places of clusters that are zeroes."""

from __future__ import annotations

from vm_core.testing.compaction import CompactionTests


class TestCompacting(CompactionTests):
    """The kit's tests."""

    driver = "qed"
    cases = (({}, 1 << 16), ({"cluster_size": "4k", "table_size": "2"}, 1 << 12))
