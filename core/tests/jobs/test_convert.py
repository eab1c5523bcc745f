"""Convert: what is in the source is in the target, whatever lies between; failures are told."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from vm_core.block.file import FileProtocol
from vm_core.block.jobs.convert import ConvertOptions, CopyError, convert, reads_as_zeroes
from vm_core.block.jobs.job import Cancelled, Job
from vm_core.block.node import Buffer, Node
from vm_core.block.raw import RawNode
from vm_core.testing.nodes import FailingNode, MemoryNode

from .kit import CLUSTER, K, contents, scribble, toy


def raw(node: Node) -> RawNode:
    return RawNode(node)


def target_of(kind: str, size: int) -> Node:
    if kind == "raw":
        storage = MemoryNode()
        storage.truncate(size)
        return RawNode(storage)
    return toy(size, cluster=64 * K if kind == "toy, large clusters" else CLUSTER)


@pytest.mark.parametrize("kind", ["raw", "toy", "toy, large clusters"])
@pytest.mark.parametrize("seed", range(8))
def test_contents_arrive(kind: str, seed: int) -> None:
    """Every byte of a chain arrives, by any number of workers, with and without looking for zeroes."""
    chance = random.Random(seed)
    size = chance.choice((CLUSTER * 5 + 512, 3 * 1024 * K, 9 * 1024 * K + 512))
    model = bytearray(size)
    below = toy(size)
    scribble(chance, below, model)
    node = toy(size, backing=below)
    scribble(chance, node, model)
    for options in (
        ConvertOptions(),
        ConvertOptions(workers=1),
        ConvertOptions(workers=4, in_order=False),
        ConvertOptions(sparse=0),
        ConvertOptions(sparse=64 * K),
        ConvertOptions(zero_init=True),
    ):
        target = target_of(kind, size)
        convert([node], target, options)
        assert contents(target) == model


@pytest.mark.parametrize("kind", ["raw", "toy"])
def test_old_contents_vanish(kind: str) -> None:
    """A target that is not known to be zero holds nothing of its own afterwards."""
    chance = random.Random(3)
    size = 2 * 1024 * K
    model = bytearray(size)
    node = toy(size)
    scribble(chance, node, model)
    target = target_of(kind, size)
    target.pwrite(0, b"old" * (size // 3))
    convert([node], target, ConvertOptions(zero_init=False))
    assert contents(target) == model


@pytest.mark.parametrize("seed", range(5))
def test_overlay_keeps_its_backing_image(seed: int) -> None:
    """With a backing image of the same contents only what lies above it is copied."""
    chance = random.Random(seed)
    size = 1024 * K
    model = bytearray(size)
    below = toy(size)
    scribble(chance, below, model)
    node = toy(size, backing=below)
    node.pwrite(5000, b"x" * 700)
    node.zero(100 * K, 64 * K)
    model[5000:5700] = b"x" * 700
    model[100 * K : 164 * K] = bytes(64 * K)
    target = toy(size, backing=below)
    convert([node], target, ConvertOptions(backing=size))
    assert contents(target) == model
    assert target.allocated() < size // 4


@pytest.mark.parametrize("workers", [1, 4])
def test_pieces_of_one_cluster_above_a_backing_image(workers: int) -> None:
    """Data and zeroes that share a cluster of an overlay arrive, one after the other."""
    large = 64 * K
    chance = random.Random(workers)
    model = b"".join(bytes(4 * K) if chance.random() < 0.5 else chance.randbytes(4 * K) for _ in range(2048))
    below = toy(len(model), cluster=large)
    below.pwrite(0, b"below" * (len(model) // 5))
    target = toy(len(model), backing=below, cluster=large)
    convert([raw(MemoryNode(model))], target, ConvertOptions(backing=len(model), workers=workers))
    assert contents(target) == model


def test_several_images_are_joined() -> None:
    """Sources follow each other, each from a whole sector on."""
    first, second = raw(MemoryNode(b"a" * 1000)), toy(CLUSTER)
    second.pwrite(0, b"b" * 100)
    target = target_of("raw", 1024 + CLUSTER)
    convert([first, second], target)
    assert contents(target) == b"a" * 1000 + bytes(24) + b"b" * 100 + bytes(CLUSTER - 100)


def test_zeroes_take_no_space() -> None:
    """Data that is zero is left out of a target that reads as zeroes; with sparse=0 it is written."""
    node = raw(MemoryNode(bytes(256 * K) + b"x" * CLUSTER + bytes(256 * K)))
    target = toy(node.size)
    convert([node], target)
    assert target.allocated() < 128 * K
    full = toy(node.size)
    convert([node], full, ConvertOptions(sparse=0))
    assert full.allocated() >= node.size


class _Written(MemoryNode):
    """Remembers what was written from *start* on."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start
        self.pieces: list[tuple[int, bytes]] = []

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if offset >= self.start:
            self.pieces.append((offset, b"".join(buffers)))
        super().write(offset, buffers, fua=fua)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("tail", [b"x", b"\0"])
def test_zeroes_within_large_clusters_are_not_written(workers: int, tail: bytes) -> None:
    """Where a new cluster's place reads as zeroes only data goes there, and the file reaches to the cluster's end."""
    large = 1024 * K
    model = b"a" * 4 * K + bytes(60 * K) + b"b" * 8 * K + bytes(952 * K) + bytes(large) + b"c" * 512
    model = model.ljust(5 * large - 1, b"\0") + tail
    storage = _Written(large)
    target = toy(len(model), file=storage, cluster=large)
    storage.pieces.clear()
    convert([raw(MemoryNode(model))], target, ConvertOptions(workers=workers, zero_init=True))
    target.flush()
    clusters = 3 if tail == b"x" else 2
    assert sum(len(data) for _, data in storage.pieces) <= 12 * K + clusters * 4 * K
    assert storage.size % large == 0
    assert contents(target) == model


def test_a_source_tells_how_much_to_read_at_once() -> None:
    """Memory goes by what the source's format asks for, but whole clusters of the target are written at once."""
    node = toy(8 * 1024 * K)
    node.pwrite(0, b"x" * node.size)
    node.format.copy_step = 256 * K
    storage = _Written(0)
    storage.truncate(node.size)
    convert([node], RawNode(storage))
    assert max(len(data) for _, data in storage.pieces) == 256 * K
    storage = _Written(1024 * K)
    target = toy(node.size, file=storage, cluster=1024 * K)
    convert([node], target)
    assert {len(data) for offset, data in storage.pieces} == {1024 * K}
    assert contents(target) == b"x" * node.size


def test_zeroes_overwrite_what_was_there() -> None:
    """Zeroes within clusters are written where something else lies or may lie there."""
    large = 1024 * K
    target = toy(4 * large, cluster=large)
    target.pwrite(0, b"old!" * (3 * large // 4))
    target.discard(large, large)
    target.flush()
    model = (b"n" * 4 * K + bytes(large - 4 * K)) * 4
    convert([raw(MemoryNode(model))], target, ConvertOptions(zero_init=False))
    assert contents(target) == model


def test_read_error_is_told_with_its_place() -> None:
    """An unreadable request ends the copy with its offset and reason."""
    bad = FailingNode(MemoryNode(b"x" * 9 * 1024 * K), lambda what, at, length: _eio(what, at, length, 5 << 20))
    with pytest.raises(CopyError, match=r"error while reading at byte 4194304: Input/output error"):
        convert([raw(bad)], target_of("raw", bad.size))


def _eio(what: str, offset: int, length: int, place: int) -> int:
    return errno.EIO if what == "read" and offset <= place < offset + length else 0


def test_salvage_loses_a_sector() -> None:
    """With salvage an unreadable sector becomes zeroes and is told; everything else arrives."""
    data = bytes(range(1, 256)) * 40 * K
    data = data[: 9 * 1024 * K]
    places = {(5 << 20) + 512, (5 << 20) + 7 * 512}

    def fail(what: str, offset: int, length: int) -> int:
        return errno.EIO if what == "read" and any(offset <= at < offset + length for at in places) else 0

    told: list[str] = []
    target = target_of("raw", len(data))
    convert([raw(FailingNode(MemoryNode(data), fail))], target, ConvertOptions(salvage=True), warn=told.append)
    expected = bytearray(data)
    for at in places:
        expected[at : at + 512] = bytes(512)
    assert contents(target) == expected
    assert sorted(told) == [f"error while reading offset {at}: Input/output error" for at in sorted(places)]


@pytest.mark.parametrize("kind", ["raw", "toy"])
def test_full_disk(kind: str) -> None:
    """A target without room ends the copy with its reason."""
    storage = MemoryNode(limit=2 << 20)
    node = raw(MemoryNode(b"x" * 9 * 1024 * K))
    storage.truncate(0)
    if kind == "raw":
        storage.truncate(node.size)
        target: Node = RawNode(storage)
    else:
        target = toy(node.size, file=storage)
    with pytest.raises(CopyError, match=r"error while writing at byte .*: No space left on device"):
        convert([node], target)


def test_cancel_ends_soon() -> None:
    """A cancelled job stops at its next piece."""
    node = raw(MemoryNode(b"x" * 40 * 1024 * K))
    job = Job(lambda done, total: job.cancel() if done >= 8 << 20 else None)
    with pytest.raises(Cancelled):
        convert([node], target_of("raw", node.size), job=job)
    assert job.done < 30 << 20


@pytest.mark.parametrize("sparse", [0, 4096])
def test_progress_ends_at_all(sparse: int) -> None:
    """Progress only grows and ends with everything done."""
    node = toy(9 * 1024 * K)
    node.pwrite(1024 * K, b"x" * 5 * 1024 * K)
    told: list[tuple[int, int]] = []
    convert([node], target_of("raw", node.size), ConvertOptions(sparse=sparse), job=Job(lambda *now: told.append(now)))
    total = told[0][1]
    assert total == (5 if sparse else 9) * 1024 * K
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (total, total)


def test_host_copies(tmp_path: Path) -> None:
    """With copy_range the host moves the blocks of files, with the same result, holes included."""
    source, place = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(20 << 20)
        file.seek(3 << 20)
        file.write(os.urandom(5 << 20))
    place.touch()
    with (
        RawNode(FileProtocol(os.open(source, os.O_RDONLY), str(source))) as node,
        RawNode(FileProtocol(os.open(place, os.O_RDWR), str(place), readonly=False)) as target,
    ):
        target.truncate(node.size)
        convert([node], target, ConvertOptions(copy_range=True))
    assert place.read_bytes() == source.read_bytes()
    assert place.stat().st_blocks <= source.stat().st_blocks + 64


def test_what_reads_as_zeroes_when_new(tmp_path: Path) -> None:
    """Files and images do; storage of which nothing is known does not."""
    path = tmp_path / "new"
    path.touch()
    with RawNode(FileProtocol(os.open(path, os.O_RDWR), str(path), readonly=False)) as node:
        assert reads_as_zeroes(node)
    assert reads_as_zeroes(toy(64 * K))
    assert not reads_as_zeroes(RawNode(MemoryNode()))
