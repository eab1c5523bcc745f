"""Growing an image that holds something where it ends, with and without host space set aside for what is gained."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from qcow2_layout import Layout

from vm_core.block.formatnode import FormatNode
from vm_core.block.gate import Gate
from vm_core.block.open import create_image, open_node
from vm_core.testing.qemu import LONG, Qemu

KIB = 1024

#: What the cluster in which the image ends is before: the peer's commands, and whether a snapshot is taken then.
ENDS: dict[str, tuple[list[str], bool]] = {
    "nothing": ([], False),
    "data": (["write -P 5 0 66048"], False),
    "compressed": (["write -c -P 5 64k 512"], False),
    "shared": (["write -P 5 0 66048"], True),
    "zero": (["write -z 0 66048"], False),
    "zero with space": (["write -P 5 0 66048", "write -z 0 66048"], False),
}


def grow(path: Path, size: int, mode: str) -> None:
    with open_node(str(path), format="qcow2", readonly=False, gate=Gate.follow()) as node:
        assert isinstance(node, FormatNode)
        if mode == "off":
            node.truncate(size)
        else:
            node.truncate_preallocated(size, mode)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": "on"}], ids=str)
@pytest.mark.parametrize("end", ENDS)
def test_what_is_there_stays(tmp_path: Path, qemu: Qemu, options: dict[str, object], mode: str, end: str) -> None:
    """The bytes before the former end stay, those behind are zeroes, and each cluster lies where the peer has it."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qemu.create(ours, 66048, options)
    commands, snapshot = ENDS[end]
    if commands:
        qemu.io(ours, *commands)
    if snapshot:
        qemu.img("snapshot", "-c", "s", ours)
    before = qemu.read(ours)
    shutil.copy(ours, theirs)
    grow(ours, 1024 * KIB, mode)
    assert qemu.read(ours) == before.ljust(1024 * KIB, b"\0")
    qemu.sound(ours)
    qemu.img("resize", "-q", f"--preallocation={mode}", theirs, "1M")
    if qemu.read(theirs) == qemu.read(ours):
        assert ours.read_bytes() == theirs.read_bytes()
    else:
        # It gives subclusters up that were compressed.
        assert (end, options) == ("compressed", {"extended_l2": "on"})


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_what_clusters_held_before_is_not_seen(tmp_path: Path, qemu: Qemu, mode: str) -> None:
    """Clusters that were something else once are emptied before they are what is gained. The peer shows what it was."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 64 * KIB, {"cluster_size": 4096})
    with open_node(
        {"driver": "qcow2", "pass-discard-request": False, "file": {"driver": "file", "filename": str(path)}},
        readonly=False,
    ) as node:
        node.pwrite(0, b"\7" * 64 * KIB)
        node.discard(0, 64 * KIB)
    grow(path, 96 * KIB, mode)
    assert qemu.read(path) == bytes(96 * KIB)
    qemu.sound(path)


@pytest.mark.parametrize("mode", ["off", "metadata", "full"])
def test_a_longer_data_file(tmp_path: Path, qemu: Qemu, mode: str) -> None:
    """An external data file that is longer than the image keeps its length where space is set aside, as by the peer."""
    found = []
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / "disk.qcow2"
        qemu.create(path, 128 * KIB, {"data_file": str(folder / "data")})
        with (folder / "data").open("r+b") as file:
            file.truncate(1024 * KIB)
        if name == "ours":
            grow(path, 192 * KIB, mode)
        else:
            qemu.img("resize", "-q", f"--preallocation={mode}", path, 192 * KIB)
        found.append((folder / "data").stat().st_size)
    assert found[0] == found[1] == (192 if mode == "off" else 1024) * KIB


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_new_images_of_odd_sizes(tmp_path: Path, qemu: Qemu, mode: str) -> None:
    """The last cluster of a new image, which it fills in part or which is the only one, is as the peer makes it."""
    for size in (0, 512, 66048, 1024 * KIB + 7 * 512):
        for options in ({}, {"cluster_size": 512}, {"extended_l2": "on", "cluster_size": 16384}):
            ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
            qemu.create(theirs, size, {**options, "preallocation": mode})
            create_image(
                str(ours), "qcow2", size, {**options, "preallocation": mode, "extended_l2": "extended_l2" in options}
            )
            assert ours.read_bytes() == theirs.read_bytes(), (size, options)
            assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 16, (size, options)
            ours.unlink()
            theirs.unlink()


@pytest.mark.parametrize("seed", range(200 if LONG else 24))
def test_any_growth(tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever was written before, and with whatever backing image, host clusters are taken as by the peer."""
    chance = random.Random(seed)
    folders = [tmp_path / "theirs", tmp_path / "ours"]
    folders[0].mkdir()
    monkeypatch.chdir(folders[0])
    path = Path("disk.qcow2")
    options = dict(
        chance.choice([[], [], [("extended_l2", "on")], [("refcount_bits", 1)], [("lazy_refcounts", "on")]]),
        cluster_size=chance.choice([16384, 65536]),
    )
    cluster = options["cluster_size"]
    size = chance.choice([512, cluster, 3 * cluster + 512, chance.randrange(1, 800) * 512])
    backing = 0
    words: list[object] = []
    if chance.random() < 0.5:
        backing = chance.choice([size // 1024, size // 512, size // 512 + chance.randrange(1, 100)]) * 512
        Path("base.raw").write_bytes(chance.randbytes(backing))
        words = ["-b", "base.raw", "-F", "raw"]
    qemu.create(path, size, options, *words)
    for _ in range(chance.randrange(4)):
        offset = chance.choice([chance.randrange(size // 512) * 512, size - 512])
        length = min(size - offset, chance.choice([512, cluster, 3 * cluster]))
        verb = chance.choice(["write -P 7", "write -P 9", "write -z", "write -z -u", "discard"])
        qemu.io(path, f"{verb} {offset} {length}", options=("-d", "unmap"))
    if chance.random() < 0.2 and "refcount_bits" not in options:
        qemu.img("snapshot", "-c", "s", path)
    if chance.random() < 0.2:
        size = max(512, chance.randrange(size // 512) * 512)
        qemu.img("resize", "-q", "--shrink", path, size)
    shutil.copytree(*folders)
    before = qemu.read(path)
    grown = size + chance.choice([512, cluster, chance.randrange(1, 300) * 512])
    mode = chance.choice(["off", "metadata", "falloc", "full"])
    qemu.img("resize", "-q", f"--preallocation={mode}", path, grown)
    peer_is_right = qemu.read(path) == before.ljust(grown, b"\0")
    monkeypatch.chdir(folders[1])
    grow(path, grown, mode)
    assert qemu.read(path) == before.ljust(grown, b"\0")
    qemu.sound(path)
    one, two = Layout(folders[0] / path), Layout(path)
    assert one.used == two.used
    # Beyond the image's end its last cluster has the backing image's bytes there, and zeroes here. What was cut off by
    # shrinking shows again there.
    assert one == two or grown < backing or not peer_is_right
