"""Compacting moves clusters to the front: contents, snapshots and bitmaps stay, and the file gets short."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs import compact as jobs
from vm_core.block.jobs.compact import Compacted, compact
from vm_core.block.jobs.job import Cancelled, Job
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError
from vm_core.testing.nodes import FailingNode, MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import power_cuts
from vm_qcow2 import relocation
from vm_qcow2.emptying import free_runs, last_used
from vm_qcow2.image import Qcow2

KIB = 1024
MIB = 1024 * KIB


def opened(path: Path, *, readonly: bool = False, **options: Any) -> FormatNode:
    node = open_node({"driver": "qcow2", "file.filename": str(path), **options}, readonly=readonly)
    assert isinstance(node, FormatNode)
    return node


def driver(node: FormatNode) -> Qcow2:
    assert isinstance(node.format, Qcow2)
    return node.format


def excess(node: FormatNode) -> int:
    """Free clusters before the last one in use."""
    image = driver(node)
    return sum(count for _, count in free_runs(image, last_used(image) + 1))


class Sample:
    """An image made at random, with snapshots and whatever the format has."""

    def __init__(self, folder: Path, qemu: Qemu, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.qemu = qemu
        self.path = folder / "image.qcow2"
        self.snapshots: list[str] = []
        self.unit = chance.choice([512, 1024, 4096, 65536])
        self.size = chance.choice([4, 9, 16]) * MIB // (4 if self.unit == 512 else 1) + chance.choice([0, 512])
        options: dict[str, Any] = {"cluster_size": self.unit}
        self.old = chance.random() < 0.2
        if self.old:
            options["compat"] = "0.10"
        else:
            options["refcount_bits"] = chance.choice([1, 2, 8, 16, 16, 16, 32, 64])
            options["lazy_refcounts"] = chance.choice(["on", "off", "off"])
            if self.unit >= 16384 and chance.random() < 0.4:
                options["extended_l2"] = "on"
        backing = None
        if chance.random() < 0.3:
            backing = folder / "base.raw"
            backing.write_bytes(chance.randbytes(self.size // 2))
            options |= {"backing_file": str(backing), "backing_fmt": "raw"}
        elif chance.random() < 0.4:
            options["preallocation"] = "metadata"
        qemu.create(self.path, self.size, options)
        most = 0 if options.get("refcount_bits", 16) <= 2 else 3
        for number in range(chance.randrange(1, 5)):
            with opened(self.path) as node:
                for _ in range(chance.randrange(2, 40)):
                    self._change(node)
            if chance.random() < 0.5 and len(self.snapshots) < most:
                self.snapshots.append(f"s{number}")
                qemu.img("snapshot", "-c", f"s{number}", self.path)
            if chance.random() < 0.2 and self.snapshots:
                qemu.img("snapshot", "-d", self.snapshots.pop(chance.randrange(len(self.snapshots))), self.path)
            if chance.random() < 0.25 and not self.old:
                qemu.img("bitmap", "--add", self.path, f"b{number}")

    def _change(self, node: FormatNode) -> None:
        chance = self.chance
        offset = chance.randrange(self.size)
        length = min(self.size - offset, chance.randrange(1, 20 * self.unit))
        what = chance.random()
        if what < 0.5:
            node.pwrite(offset, chance.randbytes(length))
        elif what < 0.65:
            offset -= offset % self.unit
            length = min(self.size - offset, -(-length // self.unit) * self.unit)
            piece = (chance.randbytes(64) * (length // 64 + 1))[:length]
            try:
                node.write_compressed(offset, [memoryview(piece)])
            except BlockError:  # there is something already
                return
        elif what < 0.75:
            node.zero(offset, length, unmap=chance.random() < 0.5)
        elif what < 0.85:
            node.pwrite(offset, bytes(length))
        else:
            node.discard(offset, length)

    def contents(self) -> list[bytes]:
        """What the peer reads: the image, and each snapshot."""
        target = self.path.with_suffix(".raw")
        found = []
        for name in ("", *self.snapshots):
            words = ["-l", f"snapshot.name={name}"] if name else []
            self.qemu.img("convert", "-f", "qcow2", "-O", "raw", *words, self.path, target)
            found.append(target.read_bytes())
        return found


@pytest.mark.parametrize("seed", range(400 if LONG else 12))
def test_random_images(tmp_path: Path, qemu: Qemu, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer reads the same before and after, snapshots too, finds nothing wrong, and next to no cluster is free."""
    sample = Sample(tmp_path, qemu, seed)
    if seed % 3:
        # Many small portions and windows.
        monkeypatch.setattr(jobs, "PORTION", sample.unit * sample.chance.randrange(1, 9))
        monkeypatch.setattr(relocation, "MAX_REFERENCES", sample.chance.randrange(4, 200))
    before, names = sample.contents(), _bitmaps(qemu, sample.path)
    with opened(sample.path) as node:
        result = compact(node)
        assert result.moved is not None
    qemu.sound(sample.path)
    assert sample.contents() == before
    assert _bitmaps(qemu, sample.path) == names
    assert sample.path.stat().st_size == result.length_after
    with opened(sample.path, readonly=True) as node:
        # What is packed anew, and tables of several clusters, may leave a little.
        assert excess(node) <= 6 + (last_used(driver(node)) >> 10)
    with opened(sample.path) as node:  # it goes on working
        piece = sample.chance.randbytes(min(sample.size, 300_000))
        node.pwrite(0, piece)
        assert node.pread(0, len(piece)) == piece
    qemu.sound(sample.path)


def _bitmaps(qemu: Qemu, path: Path) -> list[tuple[str, list[str]]]:
    import json

    facts = json.loads(qemu.img("info", "--output=json", path))["format-specific"]["data"]
    return [(one["name"], one["flags"]) for one in facts.get("bitmaps", [])]


def memory(path: Path, options: dict[str, str], act: Callable[[FormatNode], None], size: int) -> bytes:
    create_image(str(path), "qcow2", size, dict(options), check_backing=False)
    with opened(path) as node:
        act(node)
    return path.read_bytes()


SIZE = 1 * MIB


def scattered(node: FormatNode) -> None:
    """Data, compressed data, a snapshot that shares some of both, and much that is free again."""
    chance = random.Random(11)
    unit = node.cluster_size
    for offset in range(0, SIZE, 2 * unit):
        if (offset // (2 * unit)) % 3 == 2:
            node.write_compressed(offset, [memoryview((bytes(range(64)) * unit)[:unit])])
        else:
            node.pwrite(offset, chance.randbytes(2 * unit))
    if driver(node).geometry.refcount_bits > 1:
        with node.quiesce() as format:
            format.snapshot_create("one")
            format.flush()
    for offset in range(0, SIZE * 3 // 5, unit):
        if chance.random() < 0.5:
            node.pwrite(offset, chance.randbytes(unit))
    if driver(node).geometry.refcount_bits > 1:
        with node.quiesce() as format:
            format.snapshot_create("two")
            format.snapshot_delete("one")
            format.flush()
    node.discard(0, SIZE // 3)
    if driver(node).geometry.version >= 3:
        with node.quiesce() as format:
            format.bitmap_add("b", 65536)


def snapshot_contents(image: bytes) -> bytes:
    options = {"driver": "qcow2", "file": MemoryNode(image), "snapshot.name": "two"}
    with open_node(options, readonly=True) as node:
        return node.pread(0, node.size)


CASES = [
    {"cluster_size": "4k"},
    {"cluster_size": "1k"},
    {"cluster_size": "4k", "compat": "0.10"},
    {"cluster_size": "2k", "refcount_bits": "1"},
    {"cluster_size": "16k", "extended_l2": "on"},
    {"cluster_size": "4k", "lazy_refcounts": "on"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_power_cuts(tmp_path: Path, qemu: Qemu, options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write the image is one that is free of corruption and holds the same, its snapshot too."""
    data = memory(tmp_path / "image", options, scattered, SIZE)
    shared = options.get("refcount_bits") != "1"
    monkeypatch.setattr(jobs, "PORTION", 96 * KIB)
    monkeypatch.setattr(relocation, "MAX_REFERENCES", 60)
    recorder = RecordingNode(MemoryNode(data))
    with open_node({"driver": "qcow2", "file": recorder}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        model = node.pread(0, SIZE)
        kept = snapshot_contents(data) if shared else b""
        result = compact(node, workers=1)
        assert result.moved is not None
        assert result.moved > 50 * KIB, result
        assert result.length_after < result.length_before * 0.95
        assert node.pread(0, SIZE) == model
    cuts = 0
    for number, cut in enumerate(power_cuts(recorder, seed=3, variants=3, limit=None if LONG else 50)):
        cuts += 1
        storage = MemoryNode(cut.image)
        with open_node({"driver": "qcow2", "file": storage}, readonly=True) as found:
            assert isinstance(found, FormatNode)
            dirty = found.format.dirty
            assert found.pread(0, SIZE) == model, cut.story
        # With lazy refcounts whoever opens it for writing counts anew.
        with open_node({"driver": "qcow2", "file": storage}, readonly=not dirty) as found:
            assert isinstance(found, FormatNode)
            with found.quiesce() as format:
                checked = format.check()
            assert not checked.get("corruptions"), (cut.story, checked)
        if shared:
            assert snapshot_contents(cut.image) == kept, cut.story
        if number % (10 if LONG else 40) == 0:
            path = tmp_path / "cut"
            path.write_bytes(cut.image)
            qemu.sound(path, leaks=True)
            assert qemu.read(path) == model
    assert cuts > 40


def test_damage_is_refused(tmp_path: Path) -> None:
    """An image with errors is not touched."""

    def act(node: FormatNode) -> None:
        node.pwrite(0, b"x" * 300 * KIB)

    data = bytearray(memory(tmp_path / "image", {}, act, SIZE))
    data[2 * 65536 + 2 * 6 : 2 * 65536 + 2 * 6 + 2] = b"\0\0"
    storage = MemoryNode(data)
    with (
        open_node({"driver": "qcow2", "file": storage}, readonly=False) as node,
        pytest.raises(ImageError, match="repair it first"),
    ):
        compact(node)
    assert storage.data() == data


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    """It tells what a run does, from an image that is only read."""

    def act(node: FormatNode) -> None:
        node.pwrite(0, random.Random(1).randbytes(800 * KIB))
        node.pwrite(100 * KIB, bytes(200 * KIB))
        node.discard(400 * KIB, 200 * KIB)

    data = memory(tmp_path / "image", {"cluster_size": "4k"}, act, SIZE)
    with open_node({"driver": "qcow2", "file": MemoryNode(data, readonly=True)}, readonly=True) as node:
        told = compact(node, dry_run=True)
    storage = MemoryNode(data)
    with open_node({"driver": "qcow2", "file": storage}, readonly=False) as node:
        done = compact(node)
    assert isinstance(told, Compacted)
    assert (told.zeroes, told.length_before, told.length_after) == (
        done.zeroes, done.length_before, done.length_after,
    )  # fmt: skip
    assert done.length_after == storage.size < len(data) - 390 * KIB


def test_encrypted_data_is_encrypted_anew(tmp_path: Path, qemu: Qemu) -> None:
    """With LUKS a cluster's sectors are numbered by its place: what moves is still read right, by the peer too."""
    path, key = tmp_path / "image", tmp_path / "key"
    key.write_text("secret")
    secret = ["--object", f"secret,id=s,file={key}"]
    from vm_core.crypto import secrets

    secrets.add({"id": "relocation", "file": str(key)})
    given = {"encrypt.format": "luks", "encrypt.key-secret": "relocation", "encrypt.iter-time": "10"}
    create_image(str(path), "qcow2", 2 * MIB, {"cluster_size": "4k", **given}, check_backing=False)
    chance = random.Random(5)
    with opened(path, **{"encrypt.key-secret": "relocation"}) as node:
        node.pwrite(0, chance.randbytes(2 * MIB))
        node.discard(0, MIB)
        model = node.pread(0, 2 * MIB)
        result = compact(node)
        assert result.moved
        assert result.length_after < result.length_before - 900 * KIB
        assert node.pread(0, 2 * MIB) == model
    qemu.img("convert", *secret, "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}", "-O",
             "raw", tmp_path / "raw")  # fmt: skip
    assert (tmp_path / "raw").read_bytes() == model


def test_only_metadata_beside_a_data_file(tmp_path: Path, qemu: Qemu) -> None:
    """Guest data in a file of its own stays where it is there; what is left of the metadata moves."""
    path, data = tmp_path / "image", tmp_path / "data"
    qemu.create(path, 8 * MIB, {"data_file": str(data), "cluster_size": 512})
    with opened(path) as node:
        node.pwrite(0, random.Random(2).randbytes(8 * MIB))
    with opened(path) as node:
        node.discard(0, 6 * MIB)
        model = node.pread(0, 8 * MIB)
        compact(node)
        assert node.pread(0, 8 * MIB) == model
    qemu.sound(path)


class _Stop(Job):
    """Cancelled after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            self.cancel()
        super().check()


@pytest.mark.parametrize("looks", [0, 1, 3, 5, 6, 8])
def test_stopping(tmp_path: Path, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of which a part was moved is as good as before."""
    monkeypatch.setattr(jobs, "PORTION", 64 * KIB)
    data = memory(tmp_path / "image", {"cluster_size": "4k"}, scattered, SIZE)
    storage = MemoryNode(data)
    with open_node({"driver": "qcow2", "file": storage}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        model = node.pread(0, SIZE)
        with pytest.raises(Cancelled):
            compact(node, job=_Stop(looks), workers=1)
        assert node.pread(0, SIZE) == model
    with open_node({"driver": "qcow2", "file": MemoryNode(storage.data())}, readonly=True) as node:
        assert isinstance(node, FormatNode)
        with node.quiesce() as format:
            found = format.check()
        assert not found.get("corruptions"), found
        assert not found.get("leaks"), found
        assert node.pread(0, SIZE) == model


@pytest.mark.parametrize("fail", range(0, 60, 60 if LONG else 9))
def test_storage_that_fails(tmp_path: Path, fail: int) -> None:
    """Whichever write fails, the image that is left holds what it held."""
    data = memory(tmp_path / "image", {"cluster_size": "4k"}, scattered, SIZE)
    storage = MemoryNode(data)
    count = -1

    def decide(operation: str, offset: int, length: int) -> int:
        nonlocal count
        if operation == "write" and count >= 0:
            count += 1
            return 5 if count > fail else 0
        return 0

    node = open_node({"driver": "qcow2", "file": FailingNode(storage, decide)}, readonly=False)
    model = node.pread(0, SIZE)
    count = 0
    with pytest.raises(Exception):  # noqa: B017 - by whoever met it first
        compact(node, workers=1)
    count = -1
    with open_node({"driver": "qcow2", "file": MemoryNode(storage.data())}, readonly=True) as found:
        assert isinstance(found, FormatNode)
        assert found.pread(0, SIZE) == model
        with found.quiesce() as format:
            assert not format.check().get("corruptions")


def test_interrupted(tmp_path: Path, qemu: Qemu) -> None:
    """Ctrl-C ends the tool with status 130 and leaves a good image."""
    path = tmp_path / "image"
    qemu.create(path, 256 * MIB, {"cluster_size": 4096})
    with opened(path) as node:
        piece = random.Random(1).randbytes(MIB)
        for number in range(96):
            node.pwrite(number * MIB, piece)
        node.discard(0, 48 * MIB)
    program = Path(sys.executable).with_name("vm-img")
    done = subprocess.Popen([program, "compact", "-q", path], stderr=subprocess.PIPE)
    try:
        done.wait(0.9)
    except subprocess.TimeoutExpired:
        done.send_signal(signal.SIGINT)
    _, said = done.communicate(timeout=60)
    assert done.returncode in (0, 130), said
    qemu.sound(path)
    assert qemu.read(path)[48 * MIB : 96 * MIB] == piece * 48


def test_parts_of_a_cluster_are_looked_at_together(tmp_path: Path) -> None:
    """Zero subclusters do not make a cluster zeroes that has data, or the backing image's, in another part."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 128 * KIB)
    path = tmp_path / "image"
    options = {"extended_l2": "on", "backing_file": str(base), "backing_fmt": "raw"}
    create_image(str(path), "qcow2", 128 * KIB, options, check_backing=False)
    with opened(path) as node:
        node.pwrite(4 * KIB, bytes(2 * KIB))  # zeroes as data, and all around it what is below
        node.zero(64 * KIB, 64 * KIB)
        node.pwrite(64 * KIB, bytes(2 * KIB))
        node.pwrite(126 * KIB, b"x" * 2 * KIB)
        model = node.pread(0, 128 * KIB)
        compact(node)
        assert node.pread(0, 128 * KIB) == model
    assert model.count(b"b") == 62 * KIB
    assert model.count(b"x") == 2 * KIB
