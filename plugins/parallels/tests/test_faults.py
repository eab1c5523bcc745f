"""An image whose opening fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.testing.nodes import FailingNode, MemoryNode


def test_mark_is_taken_back(tmp_path: Path) -> None:
    """Where the mark of an open image cannot be made stable, the image does not keep it: nobody has to repair that."""
    path = tmp_path / "image"
    create_image(str(path), "parallels", 1 << 20, {})
    storage = MemoryNode(path.read_bytes())
    flushes = [0]

    def decide(operation: str, offset: int, length: int) -> int:
        flushes[0] += operation == "flush"
        return errno.EIO if operation == "flush" and flushes[0] == 1 else 0

    with pytest.raises(Exception, match="Input/output error"):
        open_node({"driver": "parallels", "file": FailingNode(storage, decide)}, readonly=False)
    with open_node({"driver": "parallels", "file": MemoryNode(storage.data())}, readonly=False) as node:
        assert node.size == 1 << 20
