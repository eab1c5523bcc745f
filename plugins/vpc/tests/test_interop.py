"""One image in turns written here and by the peer, against a bytearray; and the same changes to two images."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from vhd_images import build, footer, reseal

from vm_core.block.extents import walk
from vm_core.block.mapping import Kind
from vm_core.block.open import create_image, open_node
from vm_core.testing.qemu import LONG, Qemu, differences, lockstep, take_turns

MIB = 1 << 20


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("options", [{"force_size": True}, {}, {"subformat": "fixed"}], ids=str)
@pytest.mark.parametrize("seed", range(15 if LONG else 1))
def test_turns(tmp_path: Path, qemu: Qemu, options: dict[str, Any], ours: bool, seed: int) -> None:
    """Whoever made the image and whoever wrote last: both read the same."""
    path = tmp_path / "disk.vhd"
    size = 11 * MIB + 1536
    if ours:
        create_image(str(path), "vpc", size, options)
    else:
        qemu.create(path, size, options)
    with open_node(str(path), format="vpc") as node:
        size = node.size
    take_turns(qemu, path, bytearray(size), random.Random(seed), 40 if LONG else 8, check=False)


@pytest.mark.parametrize("block", [4096, 32768, 256 << 10, 8 << 20])
def test_turns_with_other_blocks(tmp_path: Path, qemu: Qemu, block: int) -> None:
    """Images with blocks that neither makes are written by both."""
    path = tmp_path / "disk.vhd"
    chance = random.Random(block)
    data = b"".join(chance.choice([bytes(512), chance.randbytes(512)]) for _ in range(3000))
    path.write_bytes(build(data, block, chance))
    take_turns(qemu, path, bytearray(data), chance, 20 if LONG else 6, check=False, longest=200_000)


@pytest.mark.parametrize("options", [{}, {"subformat": "fixed"}], ids=str)
@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_blocks_lie_where_the_peer_puts_them(tmp_path: Path, qemu: Qemu, seed: int, options: dict[str, Any]) -> None:
    """After the same writes, of zeroes too, and discards both images have the same bytes but for what is unique."""
    ours, theirs = tmp_path / "ours.vhd", tmp_path / "theirs.vhd"
    size = 40 * MIB
    create_image(str(ours), "vpc", size, dict(options))
    qemu.create(theirs, size, options)
    lockstep(qemu, ours, theirs, random.Random(seed))
    end = theirs.stat().st_size - 512
    assert differences(ours, theirs, [(b + x, b + y) for b in (0, end) for x, y in ((24, 28), (64, 84))]) == []


CREATORS = [
    b"qemu",
    b"qem2",
    b"vpc ",
    b"win ",
    b"d2v ",
    b"d2v\0",
    b"tap\0",
    b"tap ",
    b"CXS\0",
    b"vbox",
    b"vs  ",
    bytes(4),
]


@pytest.mark.parametrize("calculation", ["", "chs", "current_size"])
@pytest.mark.parametrize("creator", CREATORS, ids=str)
def test_sizes_are_the_peers(tmp_path: Path, qemu: Qemu, creator: bytes, calculation: str) -> None:
    """Whose images are as large as their geometry, and whose as their size; and what force_size_calc changes."""
    path = tmp_path / "disk.vhd"
    for geometry in ((300, 4, 17), (65535, 16, 255), (0, 4, 17)):
        image = bytearray(build(bytes(9 * MIB)))
        for at in (0, len(image) - 512):
            image[at + 28 : at + 32] = creator
            struct.pack_into(">QHBB", image, at + 48, 9 * MIB + 100, *geometry)
            reseal(image, at, 512, 64)
        struct.pack_into(">I", image, 512 + 28, 6)
        path.write_bytes(image)
        spec = f"driver=vpc,file.filename={path}" + (f",force_size_calc={calculation}" if calculation else "")
        import json

        theirs = json.loads(qemu.img("info", "--output=json", "--image-opts", spec))["virtual-size"]
        with open_node(spec) as node:
            assert node.size == theirs, geometry


def test_holes_of_a_fixed_image_are_known(tmp_path: Path, qemu: Qemu) -> None:
    """What was never written of a fixed image is not read."""
    path = tmp_path / "disk.vhd"
    qemu.create(path, 64 * MIB, {"subformat": "fixed", "force_size": True})
    qemu.io(path, "write -P 1 32M 64k")
    with open_node(str(path), format="vpc") as node:
        data = [extent for extent in walk(node) if extent.kind is Kind.DATA]
        assert sum(extent.length for extent in data) < MIB
        assert any(extent.offset <= 32 * MIB < extent.end for extent in data)


def test_zeroes_give_space_back(tmp_path: Path, qemu: Qemu) -> None:
    """Zeroing blocks gives their host space back where that may be; they keep their places."""
    path = tmp_path / "disk.vhd"
    create_image(str(path), "vpc", 64 * MIB)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"\1" * (8 * MIB))
        node.flush()
        before = path.stat().st_blocks
        node.zero(0, 8 * MIB, unmap=True)
        node.flush()
        assert path.stat().st_blocks < before / 2
        size = node.size
    assert qemu.read(path) == bytes(size)


@pytest.mark.parametrize("lost", ["start", "end", "end cut off"])
def test_a_lost_footer_is_recovered(tmp_path: Path, qemu: Qemu, lost: str) -> None:
    """A dynamic image is read by whichever of its footers is left, and gets the other back when it is written."""
    path = tmp_path / "disk.vhd"
    data = random.Random(5).randbytes(3 * MIB)
    image = bytearray(build(data))
    if lost == "start":
        image[:512] = bytes(512)
    elif lost == "end":
        image[-512:] = b"x" * 512
    else:
        del image[-512:]
    path.write_bytes(image)
    with open_node(str(path), format="vpc") as node:
        assert node.pread(0, node.size) == data
    with open_node(str(path), format="vpc", readonly=False) as node:
        node.pwrite(0, b"new")
    after = path.read_bytes()
    assert after[:8] == after[-512:-504] == b"conectix"
    assert after[:512] == after[-512:]
    assert qemu.read(path) == b"new" + data[3:]


def test_a_511_byte_footer_is_read(tmp_path: Path) -> None:
    """Old versions of Virtual PC wrote one byte less."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(b"a" * MIB + footer(MIB, 2)[:-1])
    with open_node(str(path), format="vpc") as node:
        assert node.pread(0, MIB) == b"a" * MIB
