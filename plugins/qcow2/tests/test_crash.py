"""Power cuts at every moment: what the disk may hold then is sound, and has everything that was flushed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.node import Node
from vm_core.block.open import open_node
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import power_cuts
from vm_qcow2.image import Qcow2

KIB = 1024


class Session:
    """An image in memory, changed at random while everything that reaches its storage is recorded."""

    def __init__(self, image: bytes, model: bytes, seed: int, base: Node | None = None) -> None:
        self.chance = random.Random(seed)
        self.storage = MemoryNode(image)
        self.recorder = RecordingNode(self.storage)
        options: dict[str, Any] = {"driver": "qcow2", "file": self.recorder, "backing": base}
        self.node = open_node(options, readonly=False)
        self.model = bytearray(model)
        #: (moment, offset, length) of each change.
        self.touched: list[tuple[int, int, int]] = []
        self.marked: dict[int, int] = {}
        self.mark()

    def mark(self) -> None:
        snapshot = bytes(self.model)
        self.recorder.mark(snapshot)
        self.marked[id(snapshot)] = self.recorder.now()
        self.keep = [*getattr(self, "keep", []), snapshot]

    def flush(self) -> None:
        self.node.flush()
        self.mark()

    def step(self, longest: int) -> None:
        """One change, or a flush."""
        chance, size = self.chance, len(self.model)
        what = chance.random()
        if what < 0.2:
            self.flush()
            return
        offset = chance.randrange(size)
        length = min(size - offset, chance.randrange(1, longest))
        self.touched.append((self.recorder.now(), offset, length))
        if what < 0.75:
            data = chance.randbytes(length)
            self.node.pwrite(offset, data)
            self.model[offset : offset + length] = data
        elif what < 0.87:
            self.node.zero(offset, length, unmap=what < 0.81)
            self.model[offset : offset + length] = bytes(length)
        else:
            self.node.discard(offset, length)
            self.model[offset : offset + length] = self.node.pread(offset, length)

    def resize(self, size: int, mode: str = "off") -> None:
        """Change the size, setting space aside as *mode* says; until it is flushed either may be found."""
        old = len(self.model)
        if size < old:
            self.touched.append((self.recorder.now(), size, old - size))
        if mode == "off":
            self.node.truncate(size)
        else:
            self.node.truncate_preallocated(size, mode)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def close(self) -> None:
        self.node.close()
        self.mark()

    def verify(self, path: Path, qemu: Qemu, *, lazy: bool = False, base: Node | None = None) -> int:
        """Look at the cuts; returns how many there were."""
        number = 0
        for cut in power_cuts(self.recorder, seed=1, variants=4, limit=None if LONG else 70):
            number += 1
            file = MemoryNode(cut.image)
            if lazy:
                # Opening for writing repairs.
                Qcow2(file, "cut", readonly=False).close()
            else:
                found = Qcow2(MemoryNode(cut.image, readonly=True), "cut", readonly=True).check()
                assert not found.get("corruptions"), (found["messages"], cut.story)
            if LONG or number % 10 == 0:
                path.write_bytes(file.data())
                qemu.sound(path, leaks=True)
            if cut.mark is None:
                continue
            with open_node({"driver": "qcow2", "file": file, "backing": base}) as opened:
                have = opened.pread(0, opened.size)
            want, since = bytearray(cut.mark), self.marked[id(cut.mark)]
            size = min(len(have), len(want))
            for moment, offset, length in self.touched:
                if since <= moment <= cut.moment:
                    want[offset : min(offset + length, size)] = have[offset : min(offset + length, size)]
            assert have[:size] == want[:size], cut.story
        return number


def made(options: dict[str, Any], size: int) -> bytes:
    """A new image."""
    file = MemoryNode()
    Qcow2.create(file, size, dict(options))
    return file.data()


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512, "refcount_bits": 64},
        {"cluster_size": 512, "compat": "0.10"},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"cluster_size": 65536},
        {"cluster_size": 1024, "preallocation": "metadata"},
        {"cluster_size": 16384, "extended_l2": True},
        {"cluster_size": 16384, "extended_l2": True, "preallocation": "metadata"},
    ],
    ids=str,
)
def test_ordinary_writes(tmp_path: Path, qemu: Qemu, options: dict[str, Any]) -> None:
    """Writes, zeroes, discards and reuse of freed clusters."""
    session = Session(made(options, 300 * KIB), bytes(300 * KIB), 7)
    for _ in range(60):
        session.step(12 * KIB if options["cluster_size"] < 16384 else 80 * KIB)
    session.close()
    assert session.verify(tmp_path / "cut.qcow2", qemu) > 50


def test_the_refcount_table_moves(tmp_path: Path, qemu: Qemu) -> None:
    """With clusters of 512 bytes and 64-bit counts a table of one cluster counts 2 MiB: it has to grow."""
    size, full = 3072 * KIB, 1980 * KIB
    file = MemoryNode(made({"cluster_size": 512, "refcount_bits": 64}, size))
    model = bytearray(size)
    model[:full] = random.Random(2).randbytes(full)
    with open_node({"driver": "qcow2", "file": file}, readonly=False) as node:
        node.pwrite(0, model[:full])
    session = Session(file.data(), bytes(model), 3)
    before = session.node.format.header.refcount_table_offset  # type: ignore[attr-defined]
    for number in range(4):
        offset, data = full + number * 10 * KIB, session.chance.randbytes(10 * KIB)
        session.touched.append((session.recorder.now(), offset, len(data)))
        session.node.pwrite(offset, data)
        session.model[offset : offset + len(data)] = data
        if number % 2:
            session.flush()
    session.close()
    assert session.node.format.header.refcount_table_offset != before  # type: ignore[attr-defined]
    session.verify(tmp_path / "cut.qcow2", qemu)


def test_lazy_refcounts(tmp_path: Path, qemu: Qemu) -> None:
    """The dirty bit is on disk before anything that needs it; repair finds every flushed byte."""
    session = Session(made({"cluster_size": 512, "lazy_refcounts": True}, 300 * KIB), bytes(300 * KIB), 5)
    for _ in range(60):
        session.step(12 * KIB)
    session.close()
    session.verify(tmp_path / "cut.qcow2", qemu, lazy=True)


def test_resizing(tmp_path: Path, qemu: Qemu) -> None:
    """The L1 table moves, clusters are cut off and come back as zeroes."""
    session = Session(made({"cluster_size": 512}, 200 * KIB), bytes(200 * KIB), 11)
    for number in range(70):
        if number % 10 == 9:
            session.flush()
            session.resize(session.chance.randrange(1, 12) * 150 * KIB)
            session.flush()
        session.step(12 * KIB)
    session.close()
    session.verify(tmp_path / "cut.qcow2", qemu)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", [{"cluster_size": 4096}, {"cluster_size": 16384, "extended_l2": True}], ids=str)
def test_growing_with_space_set_aside(tmp_path: Path, qemu: Qemu, options: dict[str, Any], mode: str) -> None:
    """What the image ended with goes along to another cluster, whether it was there, compressed or zeroes."""
    size, unit = 37 * KIB, options["cluster_size"]
    session = Session(made(options, size), bytes(size), 17)
    for number in range(5):
        last = len(session.model) // unit * unit
        length = len(session.model) - last
        session.touched.append((session.recorder.now(), last, length))
        if number % 2:
            session.node.discard(last, length)
            session.node.write_compressed(last, [memoryview(bytes([number]) * length)])
        else:
            session.node.pwrite(last, bytes([number + 1]) * length)
        session.model[last:] = bytes([number + 1 - number % 2]) * length
        if number == 4:
            session.node.zero(last, length)
            session.model[last:] = bytes(length)
        session.flush()
        session.resize(len(session.model) + session.chance.randrange(1, 40) * 1536, mode)
        session.flush()
        session.step(12 * KIB)
        session.step(12 * KIB)
    session.close()
    session.verify(tmp_path / "cut.qcow2", qemu)
    (tmp_path / "disk.qcow2").write_bytes(session.storage.data())
    assert qemu.read(tmp_path / "disk.qcow2") == session.model


def test_images_with_snapshots_and_compressed_clusters(tmp_path: Path, qemu: Qemu) -> None:
    """Shared tables and clusters are copied before they are changed, compressed ones given back piece by piece."""
    data = b"".join(bytes([n]) * 1500 for n in range(200))
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(data)
    qemu.img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", raw, path)
    size = -(-len(data) // 512) * 512
    model = bytearray(data.ljust(size, b"\0"))
    qemu.img("snapshot", "-c", "a", path)
    qemu.io(path, "write -P 3 0 40k")
    model[: 40 * KIB] = b"\3" * (40 * KIB)
    qemu.img("snapshot", "-c", "b", path)
    session = Session(path.read_bytes(), bytes(model), 13)
    for _ in range(50):
        session.step(20 * KIB)
    session.close()
    session.verify(tmp_path / "cut.qcow2", qemu)
    path.write_bytes(session.storage.data())
    qemu.sound(path)
    qemu.img("snapshot", "-a", "b", path)
    assert qemu.read(path) == model


def test_compressed_writes(tmp_path: Path, qemu: Qemu) -> None:
    """Compressed clusters that share host clusters are counted before anything points at them."""
    session = Session(made({"cluster_size": 4096, "refcount_bits": 4}, 300 * KIB), bytes(300 * KIB), 19)
    for number in range(90):
        if number % 3:
            offset = session.chance.randrange(75) * 4096
            data = session.chance.randbytes(session.chance.randrange(1, 3000)).ljust(4096, b"c")
            try:
                session.node.write_compressed(offset, [memoryview(data)])  # type: ignore[attr-defined]
            except OSError:
                continue  # something is there already
            session.touched.append((session.recorder.now(), offset, 4096))
            session.model[offset : offset + 4096] = data
        else:
            session.step(9 * KIB)
    session.close()
    session.verify(tmp_path / "cut.qcow2", qemu)


def test_repair_is_interrupted(tmp_path: Path, qemu: Qemu) -> None:
    """Whenever a rebuild of the refcounts stops, the guest's data is what it was, and another repair ends it."""
    source = random.Random(23)
    image = bytearray(made({"cluster_size": 512}, 200 * KIB))
    file = MemoryNode(bytes(image))
    model = source.randbytes(150 * KIB).ljust(200 * KIB, b"\0")
    with open_node({"driver": "qcow2", "file": file}, readonly=False) as node:
        node.pwrite(0, model[: 150 * KIB])
    image = bytearray(file.data())
    table = int.from_bytes(image[48:56], "big")
    image[table : table + 8] = bytes(8)
    recorder = RecordingNode(MemoryNode(bytes(image)))
    Qcow2(recorder, "image", readonly=False, check=True).check(repair="all")
    number = 0
    for cut in power_cuts(recorder, seed=1, variants=4, limit=None if LONG else 60):
        number += 1
        file = MemoryNode(cut.image)
        with open_node({"driver": "qcow2", "file": file}) as node:
            assert node.pread(0, node.size) == model
        one = Qcow2(file, "cut", readonly=False, check=True)
        one.check(repair="all")
        found = one.check()
        assert not found.get("corruptions")
        assert not found.get("leaks")
        one.close()
        with open_node({"driver": "qcow2", "file": file}) as node:
            assert node.pread(0, node.size) == model
    assert number > 5
    path = tmp_path / "cut.qcow2"
    path.write_bytes(file.data())
    qemu.sound(path)


@pytest.mark.parametrize("extra", [{}, {"extended_l2": True, "cluster_size": 16384}], ids=str)
def test_overlays(tmp_path: Path, qemu: Qemu, extra: dict[str, Any]) -> None:
    """Copy-on-write from a backing image loses none of its bytes."""
    below = random.Random(1).randbytes(250 * KIB)
    base = MemoryNode(below, readonly=True)
    (tmp_path / "base").write_bytes(below)
    options = {"cluster_size": 4096, "backing_file": "base", "backing_fmt": "raw", **extra}
    session = Session(made(options, 300 * KIB), below + bytes(50 * KIB), 17, base)
    for _ in range(60):
        session.step(12 * KIB)
    session.close()
    session.verify(tmp_path / "cut.qcow2", qemu, base=base)
