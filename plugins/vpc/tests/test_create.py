"""New images: the same bytes as qemu-img's, but for UUID, time and check sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError
from vm_core.testing.qemu import LONG, Qemu, differences
from vm_vpc.geometry import geometry_for

MIB = 1 << 20
SIZES = [0, 1, 512, 1000, 34816, 35328, 65536, MIB, 7 * MIB, 33 * MIB, 63 * MIB, 505 * MIB, 1 << 30, 31 << 30]
SIZES += [32 << 30, 65 << 30, 127 << 30, 130557 * MIB, 136899993600, 136900000001, 128 << 30, 1 << 40, 2040 << 30]


def unique(size: int) -> list[tuple[int, int]]:
    """Where time, check sum and UUID are, in both footers of a file of *size* bytes."""
    return [(base + a, base + b) for base in (0, size - 512) for a, b in ((24, 28), (64, 84))]


@pytest.mark.parametrize("options", [{}, {"force_size": True}, {"subformat": "fixed"}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_same_bytes_as_the_peer(tmp_path: Path, qemu: Qemu, size: int, options: dict[str, Any]) -> None:
    """With the same options every byte is where qemu-img puts it, and the disk is as large."""
    theirs, ours = tmp_path / "theirs.vhd", tmp_path / "ours.vhd"
    qemu.create(theirs, size, options)
    create_image(str(ours), "vpc", size, options)
    length = theirs.stat().st_size
    assert ours.stat().st_size == length
    if length < 1 << 30:
        assert differences(ours, theirs, unique(length)) == []
    else:
        with ours.open("rb") as one, theirs.open("rb") as two:
            one.seek(-512, 2)
            two.seek(-512, 2)
            a, b = bytearray(one.read()), bytearray(two.read())
        for start, end in unique(length)[:2]:
            a[start:end] = b[start:end]
        assert a == b


def test_geometries_are_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """Around every step of the calculation the geometry is the peer's."""
    steps = [17 * 4 * n for n in (1, 1023, 1024, 1025, 4095, 4096)] + [31 * 16 * 1023, 31 * 16 * 1024, 63 * 16 * 1024]
    steps += [63 * 16 * 65535, 255 * 16 * 65279, 255 * 16 * 65535]
    near = (-17, -1, 0, 1, 68) if LONG else (0, 1)
    for sectors in sorted({step + delta for step in steps for delta in near}):
        path = tmp_path / "disk.vhd"
        qemu.create(path, sectors * 512)
        head = path.read_bytes()[:512]
        found = geometry_for(sectors)
        assert (found.cylinders, found.heads, found.sectors) == (
            int.from_bytes(head[56:58], "big"),
            head[58],
            head[59],
        ), sectors


def test_facts_are_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """What info tells of an image is what qemu-img tells."""
    path = tmp_path / "disk.vhd"
    for options in ({}, {"subformat": "fixed"}, {"force_size": True}):
        create_image(str(path), "vpc", 3_000_000, options)
        theirs = qemu.info(path)
        with open_node(str(path), format="vpc") as node:
            assert node.size == theirs["virtual-size"]
            assert (node.cluster_size if node.cluster_size > 1 else None) == theirs.get("cluster-size")
            assert node.info() == theirs.get("format-specific", {})


@pytest.mark.parametrize("options", [{"size": "2041G"}, {"size": "1M", "subformat": "both"}], ids=str)
def test_refusals_are_in_the_peers_words(tmp_path: Path, qemu: Qemu, options: dict[str, Any]) -> None:
    """What cannot be created is refused as qemu-img does it, and no file is left behind."""
    path = tmp_path / "disk.vhd"
    words = ",".join(f"{key}={value}" for key, value in options.items())
    theirs = qemu.error("create", "-q", "-f", "vpc", "-o", words, path).removeprefix(f"{path}: ")
    path.unlink(missing_ok=True)
    with pytest.raises(UsageError) as caught:
        create_image(str(path), "vpc", None, options)
    assert str(caught.value) == theirs
    assert not path.exists()


def test_vhd_is_another_name(tmp_path: Path) -> None:
    """The driver answers to what everybody calls the format."""
    path = tmp_path / "disk.vhd"
    create_image(str(path), "vhd", MIB)
    with open_node(str(path)) as node:
        assert node.driver == "vpc"
    with open_node(str(path), format="vhd") as node:
        assert node.size >= MIB
        assert node.driver == "vpc"
