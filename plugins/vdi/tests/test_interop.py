"""One image in turns written here and by the peer, against a bytearray; and the same changes to two images."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.testing.qemu import LONG, Qemu, differences, lockstep, take_turns

MIB = 1 << 20


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_turns(tmp_path: Path, qemu: Qemu, static: bool, ours: bool, seed: int) -> None:
    """Whoever made the image and whoever wrote last: both read the same, and the peer finds it sound."""
    path = tmp_path / "disk.vdi"
    size = 9 * MIB + 1536
    if ours:
        create_image(str(path), "vdi", size, {"static": static})
    else:
        qemu.create(path, size, {"static": static})
    take_turns(qemu, path, bytearray(size), random.Random(seed), 40 if LONG else 8)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_blocks_lie_where_the_peer_puts_them(tmp_path: Path, qemu: Qemu, seed: int, static: bool) -> None:
    """After the same writes, of zeroes too, and discards both images have the same bytes, but for their UUIDs."""
    ours, theirs = tmp_path / "ours.vdi", tmp_path / "theirs.vdi"
    size = 40 * MIB + 512 * (seed % 2)
    create_image(str(ours), "vdi", size, {"static": static})
    qemu.create(theirs, size, {"static": static})
    lockstep(qemu, ours, theirs, random.Random(seed))
    assert differences(ours, theirs, [(392, 424)]) == []
    assert map_of(qemu, ours) == map_of(qemu, theirs)


def map_of(qemu: Qemu, path: Path) -> object:
    """Where the peer says that data is; that of a static image is as it is in the file, holes and all."""
    return json.loads(qemu.img("map", "--output=json", path))


def test_zeroes_give_space_back(tmp_path: Path, qemu: Qemu) -> None:
    """Zeroing blocks gives their host space back where that may be; they keep their places."""
    path = tmp_path / "disk.vdi"
    create_image(str(path), "vdi", 64 * MIB)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"\1" * (8 * MIB))
        node.flush()
        before = path.stat().st_blocks
        node.zero(0, 8 * MIB, unmap=True)
        node.flush()
        assert path.stat().st_blocks < before / 2
    assert qemu.read(path) == bytes(64 * MIB)
    qemu.sound(path)


def test_holes_of_a_static_image_are_known(tmp_path: Path, qemu: Qemu) -> None:
    """A static image is as the guest sees it in the file, so what was never written is not read."""
    from vm_core.block.extents import walk
    from vm_core.block.mapping import Kind

    path = tmp_path / "disk.vdi"
    qemu.create(path, 64 * MIB, {"static": True})
    qemu.io(path, "write -P 1 32M 64k")
    with open_node(str(path)) as node:
        data = [extent for extent in walk(node) if extent.kind is Kind.DATA]
        assert sum(extent.length for extent in data) < MIB
        assert any(extent.offset <= 32 * MIB < extent.end for extent in data)
