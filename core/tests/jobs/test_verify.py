"""Manifests and verifying: the same for every format, every difference found, broken manifests refused."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import vm_core
from vm_core.block.jobs import verify as jobs
from vm_core.block.jobs.job import Cancelled, Job
from vm_core.block.jobs.manifest import Manifest, ManifestError
from vm_core.block.jobs.verify import Range, default_block, make_manifest, verify
from vm_core.block.raw import RawNode
from vm_core.errors import UsageError, VmError
from vm_core.testing.nodes import FailingNode, MemoryNode

from .kit import K, contents, scribble, toy

BLOCK = 4 * K


def raw(data: bytes | bytearray) -> RawNode:
    return RawNode(MemoryNode(data))


def plain(data: bytes, block: int, algorithm: str = "sha256") -> list[str | None]:
    """The digests of all blocks, as anybody would make them."""
    found: list[str | None] = []
    for start in range(0, len(data), block):
        piece = data[start : start + block]
        found.append(hashlib.new(algorithm, piece).hexdigest() if any(piece) else None)
    return found


def blocks(manifest: Manifest) -> list[str | None]:
    found: list[str | None] = json.loads("".join(manifest.lines()))["blocks"]
    return found


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("algorithm", ["sha256", "blake2b"])
@pytest.mark.parametrize("seed", range(6))
def test_digests_do_not_depend_on_the_format(seed: int, algorithm: str, workers: int) -> None:
    """A chain of images of a format, and a raw image of the same bytes, have the manifest that is made by hand."""
    chance = random.Random(seed)
    size = chance.choice([300, 777, 4096]) * K + chance.choice([0, 512, 1536])
    model = bytearray(size)
    below = toy(size)
    scribble(chance, below, model)
    node = toy(size, backing=below)
    scribble(chance, node, model)
    data = contents(node)
    assert data == model
    block = chance.choice([4096, 16384, 65536])
    made = make_manifest(node, algorithm=algorithm, block_size=block, with_sum=True, workers=workers)
    other = make_manifest(raw(data), algorithm=algorithm, block_size=block, with_sum=True, workers=workers)
    assert made == other
    assert blocks(made) == plain(data, block, algorithm)
    assert made.sum == hashlib.new(algorithm, data).hexdigest()
    assert Manifest.parse("".join(made.lines())) == made
    assert verify(node, made, with_sum=True, workers=workers).same


@pytest.mark.parametrize("seed", range(20))
def test_every_difference_is_found(seed: int) -> None:
    """Bytes changed at random – zeroes made data and data zeroes too – are told as runs of blocks, and nothing else."""
    chance = random.Random(seed)
    size = 600 * K + chance.choice([0, 100, 512])
    data = bytearray(chance.randbytes(size))
    for _ in range(6):
        start = chance.randrange(size)
        data[start : start + 30 * K] = bytes(min(30 * K, size - start))
    manifest = make_manifest(raw(data), block_size=BLOCK)
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 12)):
        position = chance.randrange(size)
        if chance.random() < 0.3:
            position -= position % BLOCK
            stop = min(position + BLOCK, size)
            changed[position:stop] = bytes(stop - position)
        else:
            changed[position] ^= 1 + chance.randrange(255)
    wanted = [at for at in range(0, size, BLOCK) if data[at : at + BLOCK] != changed[at : at + BLOCK]]
    found = verify(raw(changed), manifest, workers=3)
    told = [at for one in found.differences for at in range(one.offset, one.offset + one.length, BLOCK)]
    assert told == wanted
    assert found.same is not bool(wanted)
    # Neighbours are one range.
    assert all(one.offset + one.length < two.offset for one, two in zip(found.differences, found.differences[1:]))  # noqa: B905


@pytest.mark.parametrize(("size", "resized"), [(100 * K, True), (300 * K, True), (200 * K, False), (200 * K + 1, True)])
def test_other_sizes(size: int, resized: bool) -> None:
    """Another size is told apart from the contents that both have."""
    data = random.Random(1).randbytes(200 * K)
    manifest = make_manifest(raw(data), block_size=BLOCK)
    found = verify(raw(data[:size] + b"x" * (size - len(data))), manifest)
    assert (found.resized, found.differences) == (resized, [])
    assert found.same is not resized


def test_what_cannot_be_read_is_told() -> None:
    """The rest is compared all the same, and a manifest is not made."""
    data = random.Random(1).randbytes(400 * K)
    manifest = make_manifest(raw(data), block_size=BLOCK)
    changed = bytearray(data)
    changed[300 * K] ^= 1

    def decide(operation: str, offset: int, length: int) -> int:
        return 5 if operation == "read" and offset < 101 * K and offset + length > 100 * K else 0

    node = RawNode(FailingNode(MemoryNode(changed), decide))
    found = verify(node, manifest)
    assert [(one.offset, one.length) for one in found.unreadable] == [(100 * K, BLOCK)]
    assert "Input/output error" in found.unreadable[0].reason
    assert found.differences == [Range(300 * K, BLOCK)]
    assert not found.same
    with pytest.raises(VmError, match="error while reading at byte 102400"):
        make_manifest(node, block_size=BLOCK)


def test_holes_are_not_read() -> None:
    """An image of gigabytes with nothing in it is done at once."""
    reads: list[int] = []

    def decide(operation: str, offset: int, length: int) -> int:
        if operation == "read":
            reads.append(length)
        return 0

    storage = MemoryNode()
    storage.truncate(8 << 30)
    storage.pwrite(5 << 30, b"x" * 1000)
    manifest = make_manifest(RawNode(FailingNode(storage, decide)))
    assert sum(manifest.present) == 1
    assert sum(reads) <= 4 << 20
    assert verify(RawNode(FailingNode(storage, decide)), manifest).same


def test_block_sizes() -> None:
    """A power of two within limits; without one, large images get larger blocks; too many blocks are refused."""
    assert default_block(0) == default_block(1 << 40) == 1 << 20
    assert default_block((1 << 40) + 1) == 2 << 20
    assert default_block(64 << 40) == 64 << 20
    for wrong in (0, 512, 5000, 128 << 20):
        with pytest.raises(UsageError, match="power of two"):
            make_manifest(raw(b"x"), block_size=wrong)
    storage = MemoryNode()
    storage.truncate(1 << 40)
    with pytest.raises(UsageError, match="at most"):
        make_manifest(RawNode(storage), block_size=4096)
    with pytest.raises(UsageError, match="md5"):
        make_manifest(raw(b"x"), algorithm="md5")


def test_empty_image() -> None:
    """An image of no bytes has no blocks."""
    manifest = make_manifest(raw(b""), with_sum=True)
    assert manifest.sum == hashlib.sha256().hexdigest()
    assert Manifest.parse("".join(manifest.lines())) == manifest
    assert verify(raw(b""), manifest).same


def edited(change: Callable[[dict[str, object]], object]) -> str:
    value = json.loads("".join(make_manifest(raw(b"x" * 20000), block_size=4096, with_sum=True).lines()))
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a manifest"),
        ("[1, 2]", "not a manifest"),
        ("[" * 100_000, "not a manifest"),
        ("\xff\x00", "not a manifest"),
        ('{"kind": "other"}', "kind"),
        (edited(lambda value: value.update(version=2)), "version 2"),
        (edited(lambda value: value.update({"virtual-size": -1})), "virtual-size"),
        (edited(lambda value: value.update({"virtual-size": 1 << 62})), "at most"),
        (edited(lambda value: value.update({"virtual-size": 4096})), "5 blocks"),
        (edited(lambda value: value.update({"virtual-size": True})), "virtual-size"),
        (edited(lambda value: value.update({"block-size": 4097})), "power of two"),
        (edited(lambda value: value.update({"block-size": "4096"})), "block-size"),
        (edited(lambda value: value.update(algorithm="md5")), "md5"),
        (edited(lambda value: value.update(algorithm=[])), "algorithm"),
        (edited(lambda value: value.update(blocks=None)), "no blocks"),
        (edited(lambda value: value["blocks"].pop()), "4 blocks"),  # type: ignore[attr-defined]
        (edited(lambda value: value["blocks"].__setitem__(1, "zz")), "block 1"),  # type: ignore[attr-defined]
        (edited(lambda value: value["blocks"].__setitem__(1, 5)), "block 1"),  # type: ignore[attr-defined]
        (edited(lambda value: value["blocks"].__setitem__(2, None)), "changed or damaged"),  # type: ignore[attr-defined]
        (edited(lambda value: value.update(digest="00")), "changed or damaged"),
        (edited(lambda value: value.update(sum="00")), "sum"),
        (edited(lambda value: value.update(sum=7)), "sum"),
    ],
)
def test_broken_manifests(text: str, words: str) -> None:
    """Each is refused with one sentence."""
    with pytest.raises(ManifestError, match=words) as caught:
        Manifest.parse(text)
    assert "\n" not in str(caught.value)


def test_stopping() -> None:
    """A job that is cancelled stops it."""
    job = Job()
    job.cancel()
    with pytest.raises(Cancelled):
        make_manifest(raw(b"x" * 100_000), job=job)


def test_progress_reaches_the_end() -> None:
    """All bytes are told once, zeroes too."""
    told: list[tuple[int, int]] = []
    data = b"x" * 3_000_000 + bytes(5_000_000) + b"y" * 100
    make_manifest(raw(data), job=Job(lambda done, total: told.append((done, total))))
    assert told[-1] == (len(data), len(data))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_from_python(tmp_path: Path) -> None:
    """``vm_core.manifest`` and ``vm_core.verify`` take paths."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(100_000))
    held = vm_core.manifest(path, format="raw", block_size="8k", with_sum=True)
    assert held.block_size == 8192
    assert held.sum == hashlib.sha256(path.read_bytes()).hexdigest()
    assert vm_core.verify(path, held, format="raw", with_sum=True).same
    with path.open("r+b") as file:
        file.seek(50_000)
        file.write(b"?")
    found = vm_core.verify(path, held, format="raw", with_sum=True)
    assert found.differences == [Range(49152, 8192)]
    assert found.sum_differs


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has one buffer, whatever the image's size."""
    sizes: list[int] = []

    class Noted(bytearray):
        def __init__(self, size: int) -> None:
            sizes.append(size)
            super().__init__(size)

    storage = MemoryNode()
    storage.truncate(8 << 30)
    storage.pwrite(0, b"x" * (4 << 20))
    monkeypatch.setattr(jobs, "bytearray", Noted, raising=False)
    make_manifest(RawNode(storage), workers=2)
    # A buffer a thread; a digest and a flag a block.
    assert all(size <= max(jobs.STEP, (8 << 10) * 32) for size in sizes)
