"""Writes that fail for want of room."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.testing.faults import Disk
from vm_core.testing.nodes import MemoryNode


@pytest.mark.parametrize("offset", [1 << 20, 3 << 30])
def test_failed_write_leaves_the_file_as_long_as_it_was(tmp_path: Path, offset: int) -> None:
    """What was taken for a write that failed lies at the end of the file, and is given back: clusters and L2 table."""
    path = tmp_path / "image"
    create_image(str(path), "qed", 4 << 30, {"table_size": "1"})
    with open_node({"driver": "qed", "file.filename": str(path)}, readonly=False) as node:
        node.pwrite(0, b"a" * 70000)
    before = path.read_bytes()
    disk = Disk(before, "full", 2)  # the mark in the header comes first
    with open_node({"driver": "qed", "file": disk.node}, readonly=False) as node:
        with pytest.raises(OSError, match="No space left"):
            node.pwrite(offset, b"b" * 200000)
        assert node.pread(offset, 512) == bytes(512)
    after = disk.data()
    assert len(after) == len(before)
    again = Disk(before, "once", 2)
    with open_node({"driver": "qed", "file": again.node}, readonly=False) as node:
        with pytest.raises(OSError, match="Input/output error"):
            node.pwrite(offset, b"b" * 200000)
        node.pwrite(offset, b"b" * 200000)
    at_once = MemoryNode(before)
    with open_node({"driver": "qed", "file": at_once}, readonly=False) as node:
        node.pwrite(offset, b"b" * 200000)
    assert again.data() == at_once.data()
    with open_node({"driver": "qed", "file": MemoryNode(after)}, readonly=False) as node:
        assert node.pread(0, 70000) == b"a" * 70000
        node.pwrite(offset, b"b" * 200000)
        assert node.pread(offset, 200000) == b"b" * 200000
