"""The same operations here and by the peer, one image each: every byte of the two is the same after each of them."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qcow2_peer import LONG, Qemu

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.errors import BlockError

#: (create options, backing file, unit in which requests begin and end)
IMAGES: dict[str, tuple[dict[str, Any], bool, int]] = {
    "plain": ({}, False, 512),
    "small clusters": ({"cluster_size": 512, "refcount_bits": 64}, False, 512),
    "one-bit refcounts": ({"cluster_size": 1024, "refcount_bits": 1}, False, 512),
    "4k": ({"cluster_size": 4096}, False, 512),
    "4k over a backing file": ({"cluster_size": 4096}, True, 512),
    "version 2": ({"compat": "0.10", "cluster_size": 4096}, False, 512),
    "version 2 over a backing file": ({"compat": "0.10", "cluster_size": 4096}, True, 512),
    "subclusters": ({"extended_l2": "on", "cluster_size": 16384}, False, 512),
    "large subclusters": ({"extended_l2": "on"}, False, 512),
    "subclusters over a backing file": ({"extended_l2": "on", "cluster_size": 16384}, True, 512),
    "subclusters, 1 bit": ({"extended_l2": "on", "cluster_size": 16384, "refcount_bits": 1}, False, 512),
    "preallocated subclusters": ({"extended_l2": "on", "preallocation": "metadata"}, False, 512),
    "preallocated": ({"cluster_size": 4096, "preallocation": "metadata"}, False, 512),
    "data file": ({"cluster_size": 4096, "data_file": "data.raw"}, False, 512),
    "data file over a backing file": ({"cluster_size": 4096, "data_file": "data.raw"}, True, 512),
    "raw data file": ({"cluster_size": 4096, "data_file": "data.raw", "data_file_raw": "on"}, False, 512),
    "data file, subclusters": ({"extended_l2": "on", "data_file": "data.raw"}, False, 512),
}
SIZE = 1 << 20
STEPS = 120 if LONG else 14


def operations(seed: int, unit: int, cluster: int, *, compressed: bool) -> list[tuple[str, int, int, int]]:
    """(kind, offset, length, byte)."""
    source = random.Random(seed)
    found = []
    kinds = ["write", "write", "write", "zero", "zero unmap", "discard"] + ["compressed"] * compressed
    for _ in range(STEPS):
        kind = source.choice(kinds)
        offset = source.randrange(SIZE // unit) * unit
        length = source.choice((unit, 3 * unit, cluster, 2 * cluster + unit, source.randrange(1, SIZE // unit) * unit))
        if kind in ("discard", "compressed") or source.random() < 0.3:
            offset -= offset % cluster
            length = max(length - length % cluster, cluster)
        if kind == "compressed":
            length = cluster
        found.append((kind, offset, min(length, SIZE - offset), source.randrange(1, 256)))
    return found


def peer(qemu: Qemu, path: Path, kind: str, offset: int, length: int, byte: int, *, engine: str = "threads") -> bool:
    """Do it; whether it worked."""
    command = {
        "write": f"write -P {byte} {offset} {length}",
        "zero": f"write -z {offset} {length}",
        "zero unmap": f"write -z -u {offset} {length}",
        "discard": f"discard {offset} {length}",
        "compressed": f"write -c -P {byte} {offset} {length}",
    }[kind]
    done = subprocess.run(
        [str(qemu.io_path), "-d", "unmap", f"--aio={engine}", "-f", "qcow2", "-c", command, path.name],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=path.parent,
    )
    assert done.returncode in (0, 1), done.stderr
    return not done.returncode and "failed" not in done.stdout + done.stderr


def ours(path: Path, kind: str, offset: int, length: int, byte: int) -> bool:
    with open_node(str(path), readonly=False, format="qcow2") as node:
        assert isinstance(node, FormatNode)
        try:
            if kind == "write":
                node.pwrite(offset, bytes([byte]) * length)
            elif kind == "discard":
                node.discard(offset, length)
            elif kind == "compressed":
                node.write_compressed(offset, [memoryview(bytes([byte]) * length)])
            else:
                node.zero(offset, length, unmap=kind == "zero unmap")
        except BlockError:
            return False
    return True


@pytest.fixture
def plain_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The codec that makes the bytes that the peer makes."""
    import zlib

    from vm_qcow2 import compression

    monkeypatch.setattr(compression, "_deflater", lambda: zlib.compressobj)


def difference(theirs: Path, mine: Path, cluster: int) -> str:
    """The first byte that differs in two directories' files; empty where none does."""
    for file in sorted(path.name for path in theirs.iterdir()):
        one, two = (theirs / file).read_bytes(), (mine / file).read_bytes()
        if one != two:
            # The file may end with zeroes here that the peer did not write, or the other way round.
            longest = max(len(one), len(two))
            one, two = one.ljust(longest, b"\0"), two.ljust(longest, b"\0")
            if one != two:
                at = next(i for i in range(longest) if one[i] != two[i])
                return (
                    f"{file}: byte {at:#x} (cluster {at // cluster}): "
                    f"{one[at & ~7 : (at & ~7) + 16].hex()} / {two[at & ~7 : (at & ~7) + 16].hex()}"
                )
    return ""


def varies(qemu: Qemu, before: Path, again: Path, step: tuple[str, int, int, int]) -> bool:
    """Whether the peer does *step* in one way now and in another one then.

    It links the parts of a long write side by side; compressed clusters that give way are free for the parts that come
    later, or are not yet. Which it is hangs on how fast the parts are, so on what does them, too.
    """
    found = set()
    for engine in ("threads", "io_uring"):
        for _ in range(20):
            shutil.copytree(before, again, dirs_exist_ok=True)
            if not peer(qemu, again / "disk.qcow2", *step, engine=engine):
                # There is none of that kind here.
                break
            found.add((again / "disk.qcow2").read_bytes().rstrip(b"\0"))
    return len(found) > 1


@pytest.mark.usefixtures("plain_zlib")
@pytest.mark.parametrize("name", IMAGES)
def test_the_same_bytes_after_every_operation(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Clusters and subclusters are taken, kept, given back and marked exactly as by qemu-io."""
    options, backed, unit = IMAGES[name]
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    words: list[str] = []
    if backed:
        (theirs / "base.raw").write_bytes(random.Random(1).randbytes(SIZE // 2 + 5 * 512))
        words = ["-b", "base.raw", "-F", "raw"]
    # The peer looks for data files where it runs.
    monkeypatch.chdir(theirs)
    qemu.create(Path("disk.qcow2"), SIZE, options, *words)
    shutil.copytree(theirs, mine)
    cluster = int(options.get("cluster_size", 65536))
    plan = operations(sum(map(ord, name)), unit, cluster, compressed="data_file" not in options)
    before = tmp_path / "before"
    for number, step in enumerate(plan):
        shutil.copytree(theirs, before, dirs_exist_ok=True)
        worked = peer(qemu, theirs / "disk.qcow2", *step)
        assert ours(mine / "disk.qcow2", *step) == worked, (number, step, worked)
        told = difference(theirs, mine, cluster)
        if told:
            assert LONG, f"step {number} {step}: {told}"
            assert varies(qemu, before, tmp_path / "again", step), f"step {number} {step}: {told}"
            break
    monkeypatch.chdir(mine)
    qemu.sound(mine / "disk.qcow2")


@pytest.mark.parametrize("kind", ["discard", "zero", "zero unmap"])
def test_what_a_request_gave_back_is_taken_by_its_next_tables(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A discard makes the L2 tables that are missing where the clusters were that it gave back under the one before."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    monkeypatch.chdir(theirs)
    qemu.create(Path("disk.qcow2"), SIZE, {"cluster_size": 512})
    qemu.io(Path("disk.qcow2"), "write -P 1 0 1k", "write -P 2 100k 1k")
    shutil.copytree(theirs, mine)
    assert peer(qemu, theirs / "disk.qcow2", kind, 0, SIZE // 2, 0)
    assert ours(mine / "disk.qcow2", kind, 0, SIZE // 2, 0)
    assert not difference(theirs, mine, 512)
    qemu.sound(mine / "disk.qcow2")
