"""New images: the same bytes as qemu-img's, but for GUIDs, sequence numbers and the creator's name."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError
from vm_core.testing.qemu import Qemu, differences

KIB, MIB = 1 << 10, 1 << 20


def unique(path: Path) -> list[tuple[int, int]]:
    """What differs from image to image: creator, the headers' check sums, sequence numbers and GUIDs, the disk's id."""
    with path.open("rb") as file:
        file.seek(192 * KIB + 16 + 32 + 16)
        (metadata,) = struct.unpack("<Q", file.read(8))
    found = [(8, 520), (metadata + 64 * KIB + 16, metadata + 64 * KIB + 32)]
    for at in (64 * KIB, 128 * KIB):
        found.extend([(at + 4, at + 64)])
    return found


CASES: list[tuple[int, dict[str, Any]]] = [
    *[(size, {}) for size in (0, 1, 512, 4097, 10 * MIB, 1 << 30, (1 << 30) + 512, 10 << 30, 101 << 30, 40 << 40)],
    *[(20 * MIB, {"block_size": size}) for size in (1000, MIB, 1500000, 4 * MIB, 256 * MIB, 512 * MIB)],
    *[(20 * MIB, {"log_size": size}) for size in (1000, MIB, 1500000, 5 * MIB)],
    (20 * MIB, {"block_state_zero": False}),
    (20 * MIB, {"subformat": "fixed"}),
    (5 * MIB + 512, {"subformat": "fixed", "block_size": MIB}),
    (20 * MIB, {"subformat": "fixed", "block_state_zero": False}),
    # More than one chunk: entries for sector bitmaps lie between.
    (9 << 30, {"block_size": MIB}),
]


@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
def test_same_bytes_as_the_peer(tmp_path: Path, qemu: Qemu, size: int, options: dict[str, Any]) -> None:
    """With the same options every other byte is where qemu-img puts it."""
    theirs, ours = tmp_path / "theirs.vhdx", tmp_path / "ours.vhdx"
    qemu.create(theirs, size, options)
    create_image(str(ours), "vhdx", size, options)
    assert unique(ours) == unique(theirs)
    assert differences(ours, theirs, unique(ours)) == []
    qemu.sound(ours)


def test_fixed_images_of_several_chunks(tmp_path: Path, qemu: Qemu) -> None:
    """The block allocation table of a large fixed image is the peer's."""
    theirs, ours = tmp_path / "theirs.vhdx", tmp_path / "ours.vhdx"
    options = {"subformat": "fixed", "block_size": MIB}
    qemu.create(theirs, 9 << 30, options)
    create_image(str(ours), "vhdx", 9 << 30, options)
    assert ours.stat().st_size == theirs.stat().st_size
    with ours.open("rb") as one, theirs.open("rb") as two:
        for file in (one, two):
            file.seek(2 * MIB)
        assert one.read(MIB) == two.read(MIB)


@pytest.mark.parametrize(
    "options",
    [
        {"size": "65T"},
        {"size": "1M", "block_size": "3M"},
        {"size": "1M", "log_size": "4G"},
        {"size": "1M", "log_size": "0"},
        {"size": "1M", "subformat": "both"},
        {"size": "65T", "block_size": "3M"},
    ],
    ids=str,
)
def test_refusals_are_in_the_peers_words(tmp_path: Path, qemu: Qemu, options: dict[str, Any]) -> None:
    """What cannot be created is refused as qemu-img does it, and no file is left behind."""
    path = tmp_path / "disk.vhdx"
    words = ",".join(f"{key}={value}" for key, value in options.items())
    theirs = qemu.error("create", "-q", "-f", "vhdx", "-o", words, path).removeprefix(f"{path}: ")
    path.unlink(missing_ok=True)
    with pytest.raises(UsageError) as caught:
        create_image(str(path), "vhdx", None, options)
    assert str(caught.value) == theirs
    assert not path.exists()


def test_facts_are_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """What info tells of an image is what qemu-img tells."""
    path = tmp_path / "disk.vhdx"
    for options in ({}, {"subformat": "fixed"}, {"block_size": "2M"}):
        create_image(str(path), "vhdx", 3_000_000, options)
        theirs = qemu.info(path)
        with open_node(str(path)) as node:
            assert node.size == theirs["virtual-size"]
            assert node.cluster_size == theirs["cluster-size"]
            assert node.driver == theirs["format"]
            assert node.info() == theirs.get("format-specific", {})


def test_other_programs_read_new_images(tmp_path: Path) -> None:
    """libvhdi and 7-Zip, where they are installed, find what was written."""
    from vhdx_images import read_by_7zip, read_by_libvhdi

    path = tmp_path / "disk.vhdx"
    # 7-Zip wants the last block to be whole in the file, which it is not in every image of qemu-img either.
    for options in ({}, {"subformat": "fixed", "block_size": "1M"}, {"block_size": "1M"}):
        create_image(str(path), "vhdx", 12 * MIB, options)
        model = bytearray(12 * MIB)
        with open_node(str(path), readonly=False) as node:
            for offset in (0, 5 * MIB + 100, 12 * MIB - 1000):
                node.pwrite(offset, b"x" * 1000)
                model[offset : offset + 1000] = b"x" * 1000
        for found in (read_by_libvhdi(path), read_by_7zip(path)):
            assert found is None or found == model
