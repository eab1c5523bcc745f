"""Power cuts at every moment, for the writers that the kit's own test does not reach: ESXi host sparse extents, whose
grain tables are made on the way, streams, and emptying.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from vmdk_images import cowd, describe

from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Node
from vm_core.block.open import open_node
from vm_core.errors import BlockError
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import PowerCut, power_cuts
from vm_vmdk.create import create
from vm_vmdk.descriptor import Descriptor
from vm_vmdk.image import Vmdk
from vm_vmdk.sparse import SparseExtent, cowd_geometry

MIB = 1 << 20
#: (moment, offset, length) of changes.
Touched = list[tuple[int, int, int]]


def verify(recorder: RecordingNode, touched: Touched, read: Callable[[PowerCut, int], bytes]) -> int:
    """Every cut opens and has what was flushed; returns how many there were."""
    since = {id(what): when for when, what in recorder.marks}
    count = 0
    for cut in power_cuts(recorder, seed=4, limit=600 if LONG else 80, variants=4):
        if cut.mark is None:
            continue
        found = read(cut, len(cut.mark))
        expected = bytearray(cut.mark)
        for moment, offset, length in touched:
            if since[id(cut.mark)] <= moment <= cut.moment:
                expected[offset : offset + length] = found[offset : offset + length]
        assert found == expected, f"flushed bytes are gone: {cut.story}"
        count += 1
    return count


def _cowd_node(file: Node, size: int, *, readonly: bool) -> FormatNode:
    text = describe(f'RW {size // 512} VMFSSPARSE "d.vmdk"', kind="vmfsSparse").encode()
    extent = SparseExtent(0, file, "d.vmdk", cowd_geometry(file, "d"), type="VMFSSPARSE", name="d", cowd=True)
    image = Vmdk(MemoryNode(text), "d", Descriptor(text, "d"), 0, [extent], readonly=readonly)
    image._children = {"extents.0": file}
    if not readonly:
        image.load_for_writing()
    return FormatNode(image)


@pytest.mark.parametrize("seed", range(4 if LONG else 1))
def test_vmfs_sparse(tmp_path: Path, seed: int) -> None:
    """A grain table is in the file before the directory points to it, a grain before the table does."""
    chance = random.Random(seed)
    size = 6 * MIB
    cowd(tmp_path / "d", size // 512, {})
    recorder = RecordingNode(MemoryNode((tmp_path / "d").read_bytes()))
    model = bytearray(size)
    touched: Touched = []
    recorder.mark(bytes(model))
    with _cowd_node(recorder, size, readonly=False) as node:
        for _ in range(40):
            if chance.random() < 0.3:
                node.flush()
                recorder.mark(bytes(model))
                continue
            length = chance.choice([100, 512, 3000])
            offset = chance.choice([chance.randrange(8192), chance.randrange(size - length)])
            data = chance.randbytes(length)
            touched.append((recorder.now(), offset, length))
            node.pwrite(offset, data)
            model[offset : offset + length] = data
    recorder.mark(bytes(model))

    def read(cut: PowerCut, length: int) -> bytes:
        with _cowd_node(MemoryNode(cut.image, readonly=True), size, readonly=True) as found:
            return found.pread(0, length)

    assert verify(recorder, touched, read) > 50


def test_streams(tmp_path: Path, qemu: Qemu) -> None:
    """A compressed grain is in the file before the table points to it."""
    chance = random.Random(2)
    size = 4 * MIB
    file = MemoryNode()
    create(file, size, {"subformat": "streamOptimized"})
    recorder = RecordingNode(file)
    model = bytearray(size)
    touched: Touched = []
    recorder.mark(bytes(model))
    with open_node({"driver": "vmdk", "file": recorder}, readonly=False) as node:
        for offset in chance.sample(range(0, size, 65536), 24):
            data = chance.randbytes(100) * 655 + bytes(36)
            touched.append((recorder.now(), offset, 65536))
            node.pwrite(offset, data)
            model[offset : offset + 65536] = data
            if chance.random() < 0.3:
                node.flush()
                recorder.mark(bytes(model))
    recorder.mark(bytes(model))

    def read(cut: PowerCut, length: int) -> bytes:
        with open_node({"driver": "vmdk", "file": MemoryNode(cut.image, readonly=True)}) as found:
            data = bytearray()
            for start in range(0, length, 65536):
                try:
                    data += found.pread(start, 65536)
                except BlockError as error:
                    raise AssertionError(f"{cut.story}: {error}") from error
            return bytes(data)

    assert verify(recorder, touched, read) > 50
    path = tmp_path / "d.vmdk"
    path.write_bytes(file.data())
    assert qemu.read(path) == model


def test_emptying(tmp_path: Path, qemu: Qemu) -> None:
    """An overlay that is emptied while the power fails shows each grain, or its parent, which has the same in it."""
    base, overlay = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    qemu.create(base, 4 * MIB)
    qemu.io(base, "write -P 7 0 4M")
    qemu.create(overlay, 4 * MIB, {"backing_file": "base.vmdk", "backing_fmt": "vmdk"})
    with open_node(str(overlay), readonly=False) as node:
        node.pwrite(100_000, b"\7" * MIB)
    recorder = RecordingNode(MemoryNode(overlay.read_bytes()))
    below = open_node(str(base))
    with open_node({"driver": "vmdk", "file": recorder, "backing": below}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        recorder.mark(True)
        with node.quiesce() as driver:
            driver.empty()
            driver.flush()
    for cut in power_cuts(recorder, seed=1, variants=6):
        with open_node({"driver": "vmdk", "file": MemoryNode(cut.image, readonly=True), "backing": below}) as node:
            assert node.pread(0, 4 * MIB) == b"\7" * (4 * MIB), cut.story
    below.close()
