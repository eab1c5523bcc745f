"""Compacting sparse VMDK extents: grains move into the places of grains that are zeroes."""

from __future__ import annotations

from vm_core.testing.compaction import CompactionTests


class TestCompacting(CompactionTests):
    """The kit's tests."""

    driver = "vmdk"
    cases = (({}, 1 << 16), ({"zeroed_grain": "on"}, 1 << 16))
