"""One image in turns written here and by the peer, against a bytearray; and the same changes to two images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from test_create import unique
from vhdx_images import build

from vm_core.block.open import create_image, open_node
from vm_core.testing.qemu import LONG, Qemu, differences, lockstep, take_turns

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("options", [{}, {"block_size": MIB}, {"subformat": "fixed"}], ids=str)
@pytest.mark.parametrize("seed", range(15 if LONG else 1))
def test_turns(tmp_path: Path, qemu: Qemu, options: dict[str, Any], ours: bool, seed: int) -> None:
    """Whoever made the image and whoever wrote last: both read the same, and the peer finds it sound."""
    path = tmp_path / "disk.vhdx"
    size = 19 * MIB + 1536
    if ours:
        create_image(str(path), "vhdx", size, options)
    else:
        qemu.create(path, size, options)
    take_turns(qemu, path, bytearray(size), random.Random(seed), 40 if LONG else 6)


def test_turns_with_other_layouts(tmp_path: Path, qemu: Qemu) -> None:
    """Images whose regions lie elsewhere are written by both."""
    path = tmp_path / "disk.vhdx"
    chance = random.Random(8)
    data = chance.randbytes(3 * MIB) + bytes(3 * MIB) + chance.randbytes(3 * MIB + 4096)
    path.write_bytes(build(data, MIB, chance))
    take_turns(qemu, path, bytearray(data), chance, 20 if LONG else 6)


@pytest.mark.parametrize("seed", range(20 if LONG else 3))
def test_blocks_lie_where_the_peer_puts_them(tmp_path: Path, qemu: Qemu, seed: int) -> None:
    """After the same writes, of zeroes too, and discards both images have the same bytes, headers and log apart."""
    chance = random.Random(seed)
    ours, theirs = tmp_path / "ours.vhdx", tmp_path / "theirs.vhdx"
    size, options = 40 * MIB + 512 * (seed % 2), {"block_size": chance.choice([MIB, 4 * MIB])}
    if seed % 3 == 2:
        options["block_state_zero"] = False
    create_image(str(ours), "vhdx", size, dict(options))
    qemu.create(theirs, size, options)
    lockstep(qemu, ours, theirs, chance)
    assert differences(ours, theirs, [*unique(ours), (MIB, 2 * MIB)]) == []


def test_nothing_changes_before_the_first_write(tmp_path: Path) -> None:
    """Opening for writing, reading, flushing and discarding what is not there leave every byte as it is."""
    path = tmp_path / "disk.vhdx"
    create_image(str(path), "vhdx", 20 * MIB)
    before = path.read_bytes()
    with open_node(str(path), readonly=False) as node:
        node.pread(0, 1000)
        node.discard(0, 20 * MIB)
        node.flush()
    assert path.read_bytes() == before
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"x")
    after = path.read_bytes()
    for at in (64 * KIB, 128 * KIB):
        assert after[at + 16 : at + 48] != before[at + 16 : at + 48], "both write GUIDs are new"
        assert after[at + 48 : at + 64] == bytes(16), "the log is empty"


def test_an_overwrite_changes_the_guids_too(tmp_path: Path) -> None:
    """Also where no block is allocated: by that differencing images notice."""
    path = tmp_path / "disk.vhdx"
    create_image(str(path), "vhdx", 20 * MIB, {"subformat": "fixed"})
    before = path.read_bytes()[64 * KIB : 132 * KIB]
    with open_node(str(path), readonly=False) as node:
        node.pwrite(5000, b"x")
        node.pwrite(6000, b"y")
        assert node.pread(5000, 1001) == b"x" + bytes(999) + b"y"
    after = path.read_bytes()[64 * KIB : 132 * KIB]
    assert after[32:48] != before[32:48]


def test_zeroes_give_space_back(tmp_path: Path, qemu: Qemu) -> None:
    """Zeroing blocks gives their host space back where that may be; they keep their places."""
    path = tmp_path / "disk.vhdx"
    create_image(str(path), "vhdx", 64 * MIB)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"\1" * (8 * MIB))
        node.flush()
        before = path.stat().st_blocks
        node.zero(0, 8 * MIB, unmap=True)
        node.flush()
        assert path.stat().st_blocks < before / 2
    assert qemu.read(path) == bytes(64 * MIB)
    qemu.sound(path)
