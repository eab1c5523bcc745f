"""Power cuts while an image is emptied, rebased or compacted: it opens, is sound, and shows what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.compact import compact
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.block.raw import RawNode
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.replay import power_cuts

KIB = 1024
SIZE = 2 * 1024 * KIB


def image(tmp_path: Path, options: dict[str, str], writes: list[tuple[int, bytes]], base: Node | None = None) -> bytes:
    """An image with *writes* (offset, data) in it, as bytes."""
    path = tmp_path / "image"
    create_image(str(path), "qcow2", SIZE, dict(options), check_backing=False)
    with open_node({"driver": "qcow2", "file.filename": str(path), "backing": base}, readonly=False) as node:
        for offset, data in writes:
            node.pwrite(offset, data)
    return path.read_bytes()


def opened(storage: Node, base: Node | None, *, readonly: bool = False) -> FormatNode:
    node = open_node({"driver": "qcow2", "file": storage, "backing": base}, readonly=readonly)
    assert isinstance(node, FormatNode)
    return node


def survive(
    data: bytes, base: Node | None, model: bytes, act: Callable[[FormatNode], None], names: tuple[str | None, ...]
) -> None:
    """Do *act* to an image and cut the power at every moment of it."""
    recorder = RecordingNode(MemoryNode(data))
    node = opened(recorder, base)
    assert node.pread(0, SIZE) == model
    act(node)
    node.close()
    count = 0
    for cut in power_cuts(recorder, seed=5, variants=3, limit=60):
        count += 1
        with opened(MemoryNode(cut.image), base) as found:
            assert found.pread(0, SIZE) == model, cut.story
            reference = found.format.backing_reference
            assert (reference.filename if reference else None) in names, cut.story
            with found.quiesce() as driver:
                result = driver.check()
            assert not result.get("corruptions"), (cut.story, result)
    assert count > 5


@pytest.mark.parametrize("options", [{}, {"cluster_size": "4k"}, {"compat": "0.10"}, {"refcount_bits": "1"}])
def test_emptying(tmp_path: Path, options: dict[str, str]) -> None:
    """An overlay whose data is in its backing image by now shows the same at every moment of being emptied."""
    writes = [(0, b"a" * 200 * KIB), (1000 * KIB, b"b" * 3000), (1900 * KIB, b"c" * 100 * KIB)]
    model = bytearray(SIZE)
    for offset, piece in writes:
        model[offset : offset + len(piece)] = piece
    base = RawNode(MemoryNode(bytes(model)))
    data = image(tmp_path, {**options, "backing_file": "base", "backing_fmt": "raw"}, writes, base)

    def act(node: FormatNode) -> None:
        with node.quiesce() as driver:
            driver.empty()
        assert node.pread(0, SIZE) == model
        node.pwrite(64 * KIB, bytes(model[64 * KIB : 66 * KIB]))  # it goes on working

    survive(data, base, bytes(model), act, ("base",))


@pytest.mark.parametrize("options", [{}, {"cluster_size": "1k"}, {"cluster_size": "512"}, {"compat": "0.10"}])
@pytest.mark.parametrize("names", [("old", "new"), ("o", "n" * 200), ("o" * 200, "n"), ("old", None), (None, "new")])
def test_another_backing_image(tmp_path: Path, options: dict[str, str], names: tuple[str | None, str | None]) -> None:
    """The name of the backing image is the old or the new one at every moment, never a mixture."""
    old, new = names
    backing = {"backing_file": old, "backing_fmt": "raw"} if old else {}
    data = image(tmp_path, {**options, **backing}, [(0, b"x" * 1000)])
    base = RawNode(MemoryNode(bytes(SIZE))) if old else None

    def act(node: FormatNode) -> None:
        with node.quiesce() as driver:
            driver.change_backing(new, "raw" if new else None)

    recorder = RecordingNode(MemoryNode(data))
    node = opened(recorder, base)
    act(node)
    node.close()
    for cut in power_cuts(recorder, seed=7, variants=4):
        found = open_node({"driver": "qcow2", "file": MemoryNode(cut.image), "backing": None}, readonly=True)
        assert isinstance(found, FormatNode)
        reference = found.format.backing_reference
        assert (reference.filename if reference else None) in names, cut.story
        assert found.pread(0, 1000) == b"x" * 1000


@pytest.mark.parametrize("options", [{}, {"cluster_size": "4k"}, {"compat": "0.10"}, {"lazy_refcounts": "on"}])
def test_compacting(tmp_path: Path, options: dict[str, str]) -> None:
    """An image shows the same at every moment of being compacted."""
    writes = [(0, b"a" * 600 * KIB), (100 * KIB, bytes(300 * KIB)), (1500 * KIB, b"b" * 300 * KIB)]
    model = bytearray(SIZE)
    for offset, piece in writes:
        model[offset : offset + len(piece)] = piece
    data = image(tmp_path, options, writes)

    def act(node: FormatNode) -> None:
        before = node.format.file.size
        assert compact(node, workers=1).zeroes >= 128 * KIB
        assert node.pread(100 * KIB, 300 * KIB) == bytes(300 * KIB)
        # What held the zeroes is free.
        with node.quiesce() as driver:
            assert not driver.check().get("leaks")
        assert node.format.file.size <= before
        assert sum(run.length for run in node.map(0, SIZE) if run.storage is not None) <= 800 * KIB

    survive(data, None, bytes(model), act, (None,))
