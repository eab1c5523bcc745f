"""The same operations here and by the peer, one image each: every byte of the two is the same after each of them."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qcow2_layout import Layout, guest_data

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.errors import BlockError
from vm_core.testing.qemu import LONG, Qemu

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
#: The last cluster is there in part.
ODD_SIZE = SIZE + 5 * 512
STEPS = 120 if LONG else 14

#: (kind, offset, length, byte)
Step = tuple[str, int, int, int]


def operations(seed: int, unit: int, cluster: int, *, compressed: bool, size: int = 0) -> list[Step]:
    """STEPS operations on an image of *size* bytes, SIZE if it is 0."""
    size = size or SIZE
    source = random.Random(seed)
    found = []
    kinds = ["write", "write", "write", "zero", "zero unmap", "discard"] + ["compressed"] * compressed
    for _ in range(STEPS):
        kind = source.choice(kinds)
        offset = source.randrange(size // unit) * unit
        length = source.choice((unit, 3 * unit, cluster, 2 * cluster + unit, source.randrange(1, size // unit) * unit))
        if kind in ("discard", "compressed") or source.random() < 0.3:
            offset -= offset % cluster
            length = max(length - length % cluster, cluster)
        if kind == "compressed":
            length = cluster
        found.append((kind, offset, min(length, size - offset), source.randrange(1, 256)))
    return found


def peer(qemu: Qemu, path: Path, kind: str, offset: int, length: int, byte: int, *, engine: str = "threads") -> bool:
    """Do it; whether it worked."""
    return not session(qemu, path, [(kind, offset, length, byte)], engine=engine)


def session(qemu: Qemu, path: Path, steps: list[Step], *, engine: str = "threads") -> int:
    """Do *steps* in one process; returns how many failed."""
    words = {
        "write": "write -P {1} {2} {3}",
        "zero": "write -z {2} {3}",
        "zero unmap": "write -z -u {2} {3}",
        "discard": "discard {2} {3}",
        "compressed": "write -c -P {1} {2} {3}",
    }
    commands = []
    for kind, offset, length, byte in steps:
        commands += ["-c", words[kind].format(None, byte, offset, length)]
    done = subprocess.run(
        [str(qemu.io_path), "-d", "unmap", f"--aio={engine}", "-f", "qcow2", *commands, path.name],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=path.parent,
    )
    assert done.returncode in (0, 1), done.stderr
    said = (done.stdout + done.stderr).count("failed")
    return said or done.returncode


def ours(path: Path, kind: str, offset: int, length: int, byte: int) -> bool:
    return not our_session(path, [(kind, offset, length, byte)])


def our_session(path: Path, steps: list[Step]) -> int:
    failed = 0
    with open_node(str(path), readonly=False, format="qcow2") as node:
        assert isinstance(node, FormatNode)
        for kind, offset, length, byte in steps:
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
                failed += 1
    return failed


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


def varies(qemu: Qemu, before: Path, again: Path, *steps: Step, failed: int = 0) -> bool:
    """Whether the peer does *steps*, of which *failed* fail, in one way now and in another one then.

    It links the parts of a long write side by side; compressed clusters that give way are free for the parts that come
    later, or are not yet. Which it is hangs on how fast the parts are, so on what does them, too.
    """
    found = set()
    for engine in ("threads", "io_uring"):
        for _ in range(20):
            shutil.copytree(before, again, dirs_exist_ok=True)
            if session(qemu, again / "disk.qcow2", list(steps), engine=engine) != failed:
                # There is none of that kind here.
                break
            found.add((again / "disk.qcow2").read_bytes().rstrip(b"\0"))
    return len(found) > 1


def overwrites_at_once(qemu: Qemu, before: Path, again: Path, *steps: Step) -> bool:
    """Whether a write of the peer's puts data where compressed data was that it replaces itself.

    A power cut then may lose both. Here such a cluster is free once the new data is part of the image on the disk.
    """
    held: set[int] = set()
    for count in range(1, len(steps) + 1):
        shutil.copytree(before, again, dirs_exist_ok=True)
        session(qemu, again / "disk.qcow2", list(steps[:count]))
        plain, compressed = guest_data(again / "disk.qcow2")
        if steps[count - 1][0] == "write" and held & plain:
            return True
        held = compressed
    return False


@pytest.mark.usefixtures("plain_zlib")
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, SIZE) for name in IMAGES), *((name, ODD_SIZE) for name in ("4k", "subclusters", "large subclusters"))],
)
def test_the_same_bytes_after_every_operation(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, name: str, size: int
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
    qemu.create(Path("disk.qcow2"), size, options, *words)
    shutil.copytree(theirs, mine)
    cluster = int(options.get("cluster_size", 65536))
    plan = operations(sum(map(ord, name)), unit, cluster, compressed="data_file" not in options, size=size)
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


@pytest.mark.usefixtures("plain_zlib")
@pytest.mark.parametrize("seed", range(12 if LONG else 1))
@pytest.mark.parametrize("name", ["4k", "small clusters", "one-bit refcounts", "version 2", "subclusters"])
def test_the_same_clusters_after_sessions(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    """Where the next cluster is looked for, and where the next compressed data, is the same from request to request."""
    options, _, unit = IMAGES[name]
    theirs, mine, before = tmp_path / "theirs", tmp_path / "mine", tmp_path / "before"
    theirs.mkdir()
    monkeypatch.chdir(theirs)
    qemu.create(Path("disk.qcow2"), SIZE, options)
    shutil.copytree(theirs, mine)
    plan = operations(1000 + seed, unit, int(options.get("cluster_size", 65536)), compressed=True)
    while plan:
        steps, plan = plan[:7], plan[7:]
        shutil.copytree(theirs, before, dirs_exist_ok=True)
        failed = session(qemu, theirs / "disk.qcow2", steps)
        failed_here = our_session(mine / "disk.qcow2", steps)
        if failed != failed_here or qemu.check(theirs / "disk.qcow2")["code"]:
            # It goes on with compressed data in a cluster that was given back even if something else has got it.
            assert failed_here <= failed
            break
        one, two = Layout(theirs / "disk.qcow2"), Layout(mine / "disk.qcow2")
        # Subclusters that are not in use hold what was there when the cluster was something else.
        if one.used != two.used or (one != two and "extended_l2" not in options):
            assert LONG, steps
            assert overwrites_at_once(qemu, before, tmp_path / "again", *steps) or varies(
                qemu, before, tmp_path / "again", *steps, failed=failed
            ), steps
            break
    qemu.sound(mine / "disk.qcow2")


@pytest.mark.usefixtures("plain_zlib")
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [("write", 0, 4096, 3), ("write", 4096, 4096, 4), ("write", 65536, 4096, 5)],
            id="a cluster with two compressed ones is free when both are overwritten",
        ),
        pytest.param(
            [("discard", 0, 8192, 0), ("compressed", 40960, 4096, 5), ("write", 65536, 4096, 6)],
            id="compressed data goes on in a cluster that nobody uses any more",
        ),
        pytest.param(
            [("compressed", 16384, 4096, 7), ("discard", 0, 20480, 0), ("write", 65536, 12288, 5)],
            id="that cluster is taken by others",
        ),
    ],
)
def test_compressed_data_gives_way(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, steps: list[Step]
) -> None:
    """Within one session, what compressed data gave back is taken again where the peer takes it."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    monkeypatch.chdir(theirs)
    qemu.create(Path("disk.qcow2"), SIZE, {"cluster_size": 4096})
    start = [("compressed", 0, 4096, 1), ("compressed", 4096, 4096, 2), ("write", 32768, 8192, 9)]
    assert not session(qemu, theirs / "disk.qcow2", start)
    shutil.copytree(theirs, mine)
    assert not session(qemu, theirs / "disk.qcow2", steps)
    assert not our_session(mine / "disk.qcow2", steps)
    assert not difference(theirs, mine, 4096)
    qemu.sound(mine / "disk.qcow2")


def test_a_long_write_leaves_holes_behind(tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gave back long before its end was passed over, so that the next cluster is taken behind all of it."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    monkeypatch.chdir(theirs)
    qemu.create(Path("disk.qcow2"), SIZE, {"cluster_size": 512})
    assert not session(qemu, theirs / "disk.qcow2", [("compressed", 33280, 512, 1)])
    shutil.copytree(theirs, mine)
    steps = [("write", 32768, SIZE // 2, 2), ("write", SIZE - 512, 512, 3)]
    assert not session(qemu, theirs / "disk.qcow2", steps)
    assert not our_session(mine / "disk.qcow2", steps)
    assert not difference(theirs, mine, 512)
    qemu.sound(mine / "disk.qcow2")
