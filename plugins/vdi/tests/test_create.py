"""New images: the same bytes as qemu-img's, but for the UUIDs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError
from vm_core.testing.qemu import Qemu, differences

#: Where the two UUIDs are that every new image gets.
UUIDS = [(392, 424)]
MIB = 1 << 20


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", [0, 1, 512, MIB, 3_000_000, 128 * MIB, 129 * MIB, 5 * MIB + 512, 3 << 30])
def test_same_bytes_as_the_peer(tmp_path: Path, qemu: Qemu, size: int, static: bool) -> None:
    """With the same options, every byte of a new image but its UUIDs is where qemu-img puts it."""
    theirs, ours = tmp_path / "theirs.vdi", tmp_path / "ours.vdi"
    qemu.create(theirs, size, {"static": static})
    create_image(str(ours), "vdi", size, {"static": static})
    if size < 1 << 30 or not static:
        assert differences(ours, theirs, UUIDS) == []
    assert ours.stat().st_size == theirs.stat().st_size
    with ours.open("rb") as one, theirs.open("rb") as two:
        assert one.read(392) == two.read(392)
    qemu.sound(ours)


def test_uuids_are_random_ones(tmp_path: Path) -> None:
    """The UUIDs of two images differ, and are of version 4."""
    found = set()
    for number in range(2):
        path = tmp_path / f"{number}.vdi"
        create_image(str(path), "vdi", MIB)
        head = path.read_bytes()
        for at in (392, 408):
            uuid = head[at : at + 16]
            assert uuid[7] >> 4 == 4
            assert uuid[8] >> 6 == 2
            found.add(uuid)
    assert len(found) == 4


@pytest.mark.parametrize("size", ["1000T", "512T", "7E"])
def test_too_large_images_are_refused_in_the_peers_words(tmp_path: Path, qemu: Qemu, size: str) -> None:
    """The largest image is as large as the peer's."""
    path = tmp_path / "disk.vdi"
    words = qemu.error("create", "-q", "-f", "vdi", path, size).removeprefix(f"{path}: ")
    with pytest.raises(UsageError) as caught:
        create_image(str(path), "vdi", None, {"size": size})
    assert str(caught.value) == words
    assert not path.exists()


def test_facts_are_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """What info tells of an image is what qemu-img tells."""
    path = tmp_path / "disk.vdi"
    create_image(str(path), "vdi", 3_000_000)
    theirs = qemu.info(path)
    with open_node(str(path)) as node:
        assert node.size == theirs["virtual-size"]
        assert node.cluster_size == theirs["cluster-size"]
        assert node.driver == theirs["format"]
        assert node.info() == theirs.get("format-specific", {})


@pytest.mark.parametrize("options", [{"cluster_size": 65536}, {"static": "perhaps"}], ids=str)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    """An option that cannot be is named, and no file is left behind."""
    path = tmp_path / "disk.vdi"
    with pytest.raises(UsageError, match=next(iter(options))):
        create_image(str(path), "vdi", MIB, options, check_backing=False)
    assert not path.exists()
