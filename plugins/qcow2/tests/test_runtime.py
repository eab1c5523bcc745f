"""The options with which an image is opened."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.errors import BlockError, UsageError
from vm_core.testing.qemu import Qemu

MIB = 1 << 20

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"cache-size": "1M", "l2-cache-size": "1M", "refcount-cache-size": "1M"}, "may not be set at the same time"),
    ({"cache-size": "1M", "l2-cache-size": "2M"}, "l2-cache-size may not exceed cache-size"),
    ({"cache-size": "1M", "refcount-cache-size": "2M"}, "refcount-cache-size may not exceed cache-size"),
    ({"l2-cache-entry-size": "256"}, "L2 cache entry size must be a power of two between 512 and the cluster size"),
    ({"l2-cache-entry-size": "131072"}, "L2 cache entry size must be a power of two between 512 and the cluster size"),
    ({"refcount-cache-size": "256T"}, "Refcount cache size too big"),
    ({"cache-clean-interval": "42949672960"}, "Cache clean interval too big"),
    ({"overlap-check": "blubb"}, "Unsupported value 'blubb' for qcow2 option 'overlap-check'"),
    ({"overlap-check.template": "blubb"}, "Allowed are any of the following: none, constant, cached, all"),
]


@pytest.fixture
def image(tmp_path: Path, qemu: Qemu) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 4 << 30)
    qemu.io(path, "write -P 7 0 1M", "write -P 8 1G 1M", "write -P 9 2G 1M")
    return path


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda value: str(value))
def test_wrong_values_have_the_peers_sentences(image: Path, options: dict[str, Any], words: str) -> None:
    """Sizes and words that cannot be are refused."""
    with pytest.raises(UsageError, match=re.escape(words)):
        open_node({"driver": "qcow2", "file.filename": str(image), **options})


def test_lazy_refcounts_need_version_3(tmp_path: Path, qemu: Qemu) -> None:
    """Version 2 has no place for the mark."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB, {"compat": "0.10"})
    with pytest.raises(UsageError, match=r"Lazy refcounts require a qcow2 image with at least qemu 1\.1"):
        open_node({"driver": "qcow2", "file.filename": str(path), "lazy-refcounts": "on"})


def test_unused_tables_leave_memory(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that was not used for the interval is read again when it is needed."""
    from vm_qcow2 import tables

    now = time.monotonic()
    monkeypatch.setattr(tables, "monotonic", lambda: now)
    with open_node({"driver": "qcow2", "file.filename": str(image), "cache-clean-interval": "60"}) as node:
        assert isinstance(node, FormatNode)
        cache: Any = node.format.tables  # type: ignore[attr-defined]
        node.pread(0, 512)
        node.pread(1 << 30, 512)
        assert cache.cached(0)
        now += 61
        node.pread(1 << 30, 512)
        now += 61
        node.pread(1 << 30, 512)
        assert cache.cached(0) is None
        assert cache.cached(2)
        assert node.pread(0, 512) == b"\7" * 512


@pytest.mark.parametrize(("check", "refused"), [("cached", True), ("none", False), ("constant", False)])
def test_overlap_checks_are_the_users_choice(
    image: Path, capfd: pytest.CaptureFixture[str], check: str, refused: bool
) -> None:
    """An L2 entry that points at an L2 table: the write is refused where such tables are looked up."""
    import struct

    with image.open("r+b") as file:
        file.seek(40)
        file.seek(struct.unpack(">Q", file.read(8))[0])
        first, _, second = struct.unpack(">3Q", file.read(24))
        file.seek(first & ~(1 << 63))
        file.write(struct.pack(">Q", second))
    node = open_node({"driver": "qcow2", "file.filename": str(image), "overlap-check": check}, readonly=False)
    if refused:
        with pytest.raises(BlockError, match="overlaps with active L2 table"):
            node.pwrite(0, b"x" * 512)
        assert "Marking image as corrupt" in capfd.readouterr().err
    else:
        node.pwrite(0, b"x" * 512)
    node.close()
