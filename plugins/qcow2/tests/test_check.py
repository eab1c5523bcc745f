"""Check and repair, beside the peer's."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vm_core.block.open import open_node
from vm_core.errors import BlockError
from vm_core.testing.qemu import Qemu

MIB = 1 << 20


def word(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int(struct.unpack(">Q", file.read(8))[0])


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def l2(path: Path) -> int:
    return word(path, word(path, 40)) & 0x00FF_FFFF_FFFF_FE00


def block(path: Path) -> int:
    return word(path, word(path, 48))


def leak(path: Path, first: int, count: int) -> None:
    os.truncate(path, (first + count) * 65536)
    put(path, block(path) + 2 * first, b"\0\1" * count)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "none": lambda p: None,
    "a refcount too high": lambda p: put(p, block(p) + 2 * 7, b"\0\5"),
    "leaked clusters": lambda p: leak(p, 300, 9),
    "a refcount of zero": lambda p: put(p, block(p) + 2 * 8, b"\0\0"),
    "all refcounts zero": lambda p: put(p, block(p), bytes(200)),
    "COPIED missing in L2": lambda p: put(p, l2(p) + 8, (word(p, l2(p) + 8) & ~(1 << 63)).to_bytes(8, "big")),
    "COPIED missing in L1": lambda p: put(p, word(p, 40), l2(p).to_bytes(8, "big")),
    "a data cluster used twice": lambda p: put(p, l2(p), word(p, l2(p) + 8).to_bytes(8, "big")),
    "no refcount block": lambda p: put(p, word(p, 48), bytes(8)),
}


@pytest.fixture
def image(tmp_path: Path, qemu: Qemu) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 16 * MIB)
    qemu.io(path, "write -P 7 0 1M", "write -P 8 3M 100k", "write -P 9 2M 1M")
    return path


@pytest.mark.parametrize("name", DAMAGES)
def test_finds_what_the_peer_finds(image: Path, qemu: Qemu, name: str) -> None:
    """Corruptions and leaks are counted as qemu-img counts them."""
    DAMAGES[name](image)
    theirs = qemu.check(image)
    with open_node(str(image)) as node:
        ours = node.format.check()  # type: ignore[attr-defined]
    assert ours.get("leaks", 0) == theirs.get("leaks", 0)
    if name == "no refcount block":
        assert bool(ours.get("corruptions")) == bool(theirs.get("corruptions"))
    else:
        assert ours.get("corruptions", 0) == theirs.get("corruptions", 0)
    for key in ("total-clusters", "allocated-clusters", "fragmented-clusters"):
        assert ours[key] == theirs.get(key, 0), key


@pytest.mark.parametrize("name", DAMAGES)
def test_repair_leaves_nothing_to_complain_of(image: Path, qemu: Qemu, name: str) -> None:
    """Repaired images satisfy the peer, and the guest's data is what it was."""
    DAMAGES[name](image)
    before = qemu.read(image)
    with open_node(str(image), readonly=False) as node:
        result = node.format.check(repair="all")  # type: ignore[attr-defined]
        assert not result.get("corruptions")
        assert not result.get("leaks")
        json.dumps(result)
    qemu.sound(image)
    assert qemu.read(image) == before


def test_repairing_leaks_leaves_corruption_alone(image: Path, qemu: Qemu) -> None:
    """``leaks`` only ever lowers refcounts."""
    DAMAGES["leaked clusters"](image)
    # Two entries point at a cluster that is counted once.
    put(image, l2(image), word(image, l2(image) + 8).to_bytes(8, "big"))
    with open_node(str(image), readonly=False) as node:
        result = node.format.check(repair="leaks")  # type: ignore[attr-defined]
        assert result["leaks-fixed"] == 10
        assert result["corruptions"] > 0
    found = qemu.check(image)
    assert not found.get("leaks")
    assert found["corruptions"] > 0


@pytest.mark.parametrize("place", [(1 << 63) - (1 << 30), 1 << 63, (1 << 64) - (1 << 16)])
def test_a_snapshot_that_cannot_be_read_is_not_repaired_away(image: Path, qemu: Qemu, place: int) -> None:
    """Where its table lies past all files there is nothing to count: an error, and its data is not called leaked."""
    qemu.img("snapshot", "-c", "one", image)
    qemu.io(image, "write -P 1 0 16M")
    put(image, word(image, 64), place.to_bytes(8, "big"))
    assert "Check failed: " in qemu.error("check", image)
    before = image.read_bytes()
    for repair in ("", "leaks", "all"):
        with open_node(str(image), readonly=not repair) as node, pytest.raises(BlockError, match="snapshot 1"):
            node.format.check(repair=repair)  # type: ignore[attr-defined]
    assert image.read_bytes() == before


@pytest.mark.parametrize("place", [0x94200, 0x7000000], ids=["between clusters", "past the end"])
@pytest.mark.parametrize("repair", ["leaks", "all"])
def test_what_a_snapshot_may_have_is_no_leak_to_repair(image: Path, qemu: Qemu, place: int, repair: str) -> None:
    """While a snapshot's L1 table is not where it should be, nothing that may be its own is given back."""
    qemu.io(image, "write -P 7 0 1M")
    qemu.img("snapshot", "-c", "one", image)
    qemu.io(image, "write -P 1 0 16M")
    entry = word(image, 64)
    right = image.read_bytes()[entry : entry + 8]
    put(image, entry, place.to_bytes(8, "big"))
    with open_node(str(image), readonly=False) as node:
        result = node.format.check(repair=repair)  # type: ignore[attr-defined]
    assert result["leaks"] >= 16
    assert any("left alone" in line for line in result["messages"])
    put(image, entry, right)
    qemu.img("snapshot", "-a", "one", image)
    qemu.io(image, "read -P 7 0 1M")
