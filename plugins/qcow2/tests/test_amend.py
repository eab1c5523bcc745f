"""Changing the options of images: like the peer, and safely at every moment."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError, UsageError
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import power_cuts
from vm_qcow2.image import Qcow2

KIB, MIB = 1 << 10, 1 << 20


def amend(path: Path, options: dict[str, Any], **more: Any) -> list[tuple[int, int]]:
    """Change an image here; returns what progress was told."""
    told: list[tuple[int, int]] = []
    with open_node({"driver": "qcow2", "file.filename": str(path), "backing": ""}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        node.amend(options, progress=lambda done, total: told.append((done, total)), **more)
    return told


def peer_amend(path: Path, options: dict[str, Any], ok: bool = True) -> str:
    shown = {True: "on", False: "off"}
    text = ",".join(f"{key}={shown[value] if isinstance(value, bool) else value}" for key, value in options.items())
    done = subprocess.run(["qemu-img", "amend", "-o", text, str(path)], capture_output=True, text=True)
    assert not ok or done.returncode == 0, done.stderr
    return done.stderr


def busy(path: Path, qemu: Qemu, *, backing: Path | None = None, zero: bool = True, snapshot: bool = True) -> None:
    """Data, zero clusters of both kinds, and a snapshot that shares some of it."""
    commands = ["write -P 7 0 256k", "write -P 6 1M 64k", "write -P 5 3M 100k"]
    if zero:
        commands += ["write -z 64k 64k", "write -z 512k 128k", "write -z -u 3M 64k"]
    qemu.io(path, *commands)
    if snapshot:
        qemu.img("snapshot", "-c", "one", path)
        qemu.io(path, "write -P 8 1M 64k", *(["write -z 2M 64k"] if zero else []))


CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # create options, what busy() does, what is amended
    ({}, {"snapshot": False}, {"compat": "0.10"}),
    ({}, {}, {"compat": "0.10"}),
    ({"lazy_refcounts": "on"}, {"zero": False}, {"compat": "0.10"}),
    ({"compat": "0.10"}, {"zero": False}, {"compat": "1.1"}),
    (
        {"compat": "0.10"},
        {"zero": False, "snapshot": False},
        {"compat": "1.1", "lazy_refcounts": True, "size": 9 * MIB},
    ),
    ({}, {}, {"refcount_bits": 64}),
    ({}, {}, {"refcount_bits": 2}),
    ({"cluster_size": 512, "refcount_bits": 1}, {"zero": False, "snapshot": False}, {"refcount_bits": 64}),
    ({"cluster_size": 4096, "refcount_bits": 8}, {}, {"refcount_bits": 16, "lazy_refcounts": True}),
    ({"refcount_bits": 64}, {"snapshot": False}, {"refcount_bits": 16, "compat": "0.10"}),
    ({"cluster_size": 1024}, {"snapshot": False}, {"compat": "0.10", "size": 6 * MIB}),
]


@pytest.mark.parametrize(("made", "how", "options"), CASES, ids=lambda one: str(one).replace("'", ""))
def test_amended_images_are_the_peers(
    tmp_path: Path, qemu: Qemu, made: dict[str, Any], how: dict[str, Any], options: dict[str, Any]
) -> None:
    """Byte for byte, where the peer leaves a sound image; sound, and of the same contents."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qemu.create(theirs, 8 * MIB, made)
    busy(theirs, qemu, **how)
    shutil.copy(theirs, ours)
    before = qemu.read(ours)
    peer_amend(theirs, options)
    amend(ours, dict(options))
    if qemu.check(theirs)["code"] == 0:  # else the peer has written over what snapshots share, see below
        assert ours.read_bytes() == theirs.read_bytes()
    qemu.sound(ours)
    after = qemu.read(ours)
    common = min(len(before), len(after))
    assert after[:common] == before[:common]
    assert not any(after[common:])


def test_zero_clusters_hide_the_backing_image(tmp_path: Path, qemu: Qemu) -> None:
    """With a backing image zero clusters become zeroes that are stored; where the peer puts them."""
    base, ours, theirs = (tmp_path / name for name in ("base.qcow2", "ours.qcow2", "theirs.qcow2"))
    qemu.create(base, 8 * MIB)
    qemu.io(base, "write -P 9 0 8M")
    qemu.create(theirs, 8 * MIB, None, "-b", base, "-F", "qcow2")
    busy(theirs, qemu, snapshot=False)
    shutil.copy(theirs, ours)
    before = qemu.read(ours)
    peer_amend(theirs, {"compat": "0.10"})
    amend(ours, {"compat": "0.10"})
    assert ours.read_bytes() == theirs.read_bytes()
    assert qemu.read(ours) == before
    qemu.sound(ours)


def test_data_of_snapshots_is_not_overwritten(tmp_path: Path, qemu: Qemu) -> None:
    """A zero cluster that keeps the host cluster of a snapshot's data gets one of its own (QEMU 7.2 overwrites it)."""
    base, path = tmp_path / "base.qcow2", tmp_path / "x.qcow2"
    qemu.create(base, 8 * MIB)
    qemu.create(path, 8 * MIB, None, "-b", base, "-F", "qcow2")
    qemu.io(path, "write -P 7 0 128k")
    qemu.img("snapshot", "-c", "one", path)
    qemu.io(path, "write -z 0 64k")
    amend(path, {"compat": "0.10"})
    qemu.sound(path)
    assert qemu.read(path)[: 128 * KIB] == bytes(64 * KIB) + b"\7" * (64 * KIB)
    qemu.img("snapshot", "-a", "one", path)
    assert qemu.read(path)[: 128 * KIB] == b"\7" * (128 * KIB)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        ({}, {"compat": "0.42"}),
        ({}, {"compat": "0.10", "lazy_refcounts": True}),
        ({}, {"compat": "0.10", "refcount_bits": 8}),
        ({}, {"refcount_bits": 3}),
        ({}, {"backing_file": "x"}),
        ({}, {"backing_fmt": "raw"}),
        ({}, {"data_file": "x"}),
        ({}, {"data_file_raw": True}),
        ({}, {"encrypt.state": "active"}),
        ({}, {"size": 1000}),
        ({"compat": "0.10"}, {"refcount_bits": 32}),
        ({"compat": "0.10"}, {"lazy_refcounts": True}),
        ({"refcount_bits": 64}, {"compat": "0.10"}),
        ({"extended_l2": "on"}, {"compat": "0.10"}),
    ],
    ids=lambda one: str(one).replace("'", ""),
)
def test_what_cannot_be_is_told_as_by_the_peer(
    tmp_path: Path, qemu: Qemu, made: dict[str, Any], options: dict[str, Any]
) -> None:
    """Each refusal is QEMU's, and leaves the image as it was."""
    path = tmp_path / "x.qcow2"
    qemu.create(path, 8 * MIB, made)
    before = path.read_bytes()
    expected = peer_amend(path, options, ok=False)
    path.write_bytes(before)
    with pytest.raises((UsageError, ImageError)) as caught:
        amend(path, dict(options))
    error = caught.value
    reason = error.peer or str(error)
    assert expected == f"qemu-img: {reason}\n"
    assert path.read_bytes() == before


def test_counts_too_large_are_told(tmp_path: Path, qemu: Qemu) -> None:
    """Refcounts that do not fit are refused with the cluster, and nothing leaks."""
    path = tmp_path / "x.qcow2"
    qemu.create(path, 8 * MIB)
    qemu.io(path, "write 0 64k")
    qemu.img("snapshot", "-c", "one", path)
    with pytest.raises(ImageError, match="width to 1 bits: Cluster at offset 0x40000 has a refcount of 2"):
        amend(path, {"refcount_bits": 1})
    qemu.sound(path)


def test_compressed_zstd_is_not_downgraded(tmp_path: Path, qemu: Qemu) -> None:
    """Version 2 has no zstd: an image with such clusters is refused, one without is not."""
    path = tmp_path / "x.qcow2"
    qemu.create(path, 8 * MIB, {"compression_type": "zstd"})
    shutil.copy(path, tmp_path / "empty.qcow2")
    qemu.io(path, "write -c 0 64k")
    with pytest.raises(UsageError, match="zstd compression type and existing compressed clusters"):
        amend(path, {"compat": "0.10"})
    amend(tmp_path / "empty.qcow2", {"compat": "0.10"})
    qemu.sound(tmp_path / "empty.qcow2")


def test_snapshots_of_another_size_keep_version_3(tmp_path: Path, qemu: Qemu) -> None:
    """Version 2 does not record sizes of snapshots."""
    path = tmp_path / "x.qcow2"
    qemu.create(path, 8 * MIB)
    qemu.img("snapshot", "-c", "one", path)
    qemu.img("resize", path, 16 * MIB)
    with pytest.raises(UsageError, match="Internal snapshots prevent downgrade of image"):
        amend(path, {"compat": "0.10"})
    qemu.sound(path)


def test_data_file_rules(tmp_path: Path, qemu: Qemu) -> None:
    """Raw can be given up, not taken up; the name can be changed; version 2 has no data files."""
    path, data = tmp_path / "x.qcow2", tmp_path / "x.data"
    qemu.create(path, 8 * MIB, {"data_file": data, "data_file_raw": "on"})
    amend(path, {"data_file_raw": False})
    assert "data file raw: false" in qemu.img("info", path)
    with pytest.raises(UsageError, match="data-file-raw cannot be set on existing images"):
        amend(path, {"data_file_raw": True})
    with pytest.raises(UsageError, match="Cannot downgrade an image with a data file"):
        amend(path, {"compat": "0.10"})
    amend(path, {"data_file": "elsewhere"})
    assert "data file: elsewhere" in qemu.img("info", path)


def test_a_raw_data_file_has_no_backing_image(tmp_path: Path, qemu: Qemu) -> None:
    """What the data file does not hold could not be seen in it: refused like the peer does, until raw is given up."""
    path, data = tmp_path / "x.qcow2", tmp_path / "x.data"
    qemu.create(path, 8 * MIB, {"data_file": data, "data_file_raw": "on"})
    before = path.read_bytes()
    assert "Invalid argument" in qemu.error("rebase", "-u", "-b", "base", "-F", "raw", path)
    with open_node({"driver": "qcow2", "file.filename": str(path)}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        with node.quiesce() as driver, pytest.raises(BlockError, match="Invalid argument"):
            driver.change_backing("base", "raw")
    assert path.read_bytes() == before
    qemu.sound(path)


def test_progress_ends_and_may_go_back(tmp_path: Path, qemu: Qemu) -> None:
    """Where a walk over the refcounts has to be repeated what there is to do grows; at the end all is done."""
    path = tmp_path / "x.qcow2"
    qemu.create(path, 64 * KIB, {"refcount_bits": 1, "cluster_size": 512})
    qemu.io(path, f"write 0 {58 * 512}")
    told = amend(path, {"refcount_bits": 64})
    parts = [done / total for done, total in told]
    assert 2 / 3 in parts
    assert parts[parts.index(2 / 3) + 1] == 0.5
    assert parts[-1] == 1
    assert all(0 <= part <= 1 for part in parts)


def _change(options: dict[str, Any]) -> Callable[[FormatNode], None]:
    return lambda node: node.amend(dict(options))


@pytest.mark.parametrize(
    ("made", "how", "options"),
    [
        ({"cluster_size": 4096}, {}, {"compat": "0.10"}),
        ({"cluster_size": 4096, "compat": "0.10"}, {"zero": False}, {"compat": "1.1"}),
        ({"cluster_size": 4096}, {}, {"refcount_bits": 64}),
        ({"cluster_size": 512, "refcount_bits": 64}, {"snapshot": False, "zero": False}, {"refcount_bits": 1}),
    ],
    ids=lambda one: str(one).replace("'", ""),
)
def test_power_cuts(
    tmp_path: Path, qemu: Qemu, made: dict[str, Any], how: dict[str, Any], options: dict[str, Any]
) -> None:
    """At every moment of a change the image opens, is free of corruption, and has its contents and its backing name."""
    base, path = tmp_path / ("b" * 150), tmp_path / "x.qcow2"
    create_image(str(base), "qcow2", 4 * MIB, {})
    qemu.create(path, 4 * MIB, made, "-b", base, "-F", "qcow2")
    busy(path, qemu, **how)
    recorder = RecordingNode(MemoryNode(path.read_bytes()))
    with open_node({"driver": "qcow2", "file": recorder, "backing": ""}) as node:
        expected = node.pread(0, node.size)
    with open_node({"driver": "qcow2", "file": recorder, "backing": ""}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        _change(options)(node)
    count = 0
    for cut in power_cuts(recorder, seed=4, variants=4, limit=None if LONG else 40):
        count += 1
        image = Qcow2(MemoryNode(cut.image, readonly=True), "cut", readonly=True)
        assert image.backing_reference is not None, cut.story
        assert image.backing_reference.filename == str(base), cut.story
        assert image.backing_reference.format == "qcow2", cut.story
        found = image.check()
        assert not found.get("corruptions"), (cut.story, found)
        with open_node({"driver": "qcow2", "file": MemoryNode(cut.image, readonly=True), "backing": ""}) as node:
            assert node.pread(0, node.size) == expected, cut.story
        for one in image.snapshot_table.entries:
            assert one.name == "one"
    assert count > 10


def test_random_sequences_stay_sound(tmp_path: Path, qemu: Qemu) -> None:
    """Changes of all kinds in a random order, with writes between them, leave what a bytearray holds."""
    chance = random.Random(11)
    path = tmp_path / "x.qcow2"
    qemu.create(path, 4 * MIB, {"cluster_size": 4096})
    model = bytearray(4 * MIB)
    with open_node({"driver": "qcow2", "file.filename": str(path)}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        for _ in range(200 if LONG else 25):
            for _ in range(5):
                offset = chance.randrange(len(model) - 20_000)
                if chance.random() < 0.4:
                    node.zero(offset, 20_000)
                    model[offset : offset + 20_000] = bytes(20_000)
                else:
                    data = chance.randbytes(chance.randrange(1, 20_000))
                    node.pwrite(offset, data)
                    model[offset : offset + len(data)] = data
            options = chance.choice(
                [
                    {"compat": "1.1", "refcount_bits": chance.choice([1, 2, 4, 8, 16, 32, 64])},
                    {"compat": "0.10", "refcount_bits": 16},
                    {"compat": "1.1", "lazy_refcounts": chance.random() < 0.5},
                ]
            )
            node.amend(dict(options))
            assert node.pread(0, len(model)) == model, options
    assert qemu.read(path) == model
    qemu.sound(path)
