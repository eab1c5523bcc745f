"""QED against the kit and against qemu-img and qemu-io."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import vm_core
from vm_core.block.formatnode import FormatNode
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError
from vm_core.testing.conformance import Sample
from vm_core.testing.nodes import MemoryNode
from vm_core.testing.qemu import LONG, Qemu, QemuConformance, lockstep, run


@pytest.fixture(autouse=True)
def peer() -> None:
    """Skipped (in CI: failed) where qemu-img is not installed."""
    Qemu("qed")


class TestQed(QemuConformance):
    """The kit, with qemu-img as the oracle."""

    driver = "qed"
    create_options = ({}, {"cluster_size": 4096, "table_size": 2})
    rounds = 1000 if LONG else 40
    cuts = 800 if LONG else 40
    header = 64

    def samples(self, directory: Path) -> Iterable[Sample]:
        chance = random.Random(4)
        data = b"".join(chance.choice([bytes(65536), chance.randbytes(256) * 256]) for _ in range(40))
        raw = directory / "sample.raw"
        raw.write_bytes(data)
        for number, options in enumerate((["-o", "cluster_size=4k,table_size=4"], [])):
            path = directory / f"sample{number}.qed"
            run("qemu-img", "convert", "-f", "raw", "-O", "qed", *options, raw, path)
            yield Sample(path, data)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"cluster_size": 4096, "table_size": 2},
    {"cluster_size": 1 << 20, "table_size": 1},
    {"table_size": 16},
    {"backing_file": "base", "backing_fmt": "raw"},
    {"backing_file": "base.qed", "backing_fmt": "qed"},
]


@pytest.mark.parametrize("size", [512, 1 << 20, (5 << 20) + 512])
@pytest.mark.parametrize("options", OPTIONS)
def test_new_images_are_those_of_qemu_img(tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    """Every byte of a new image is where qemu-img puts it."""
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base", 1 << 20)
    run("qemu-img", "create", "-q", "-f", "qed", tmp_path / "base.qed", 1 << 20)
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    run("qemu-img", "create", "-q", "-f", "qed", *words, tmp_path / "peer", size)
    create_image(str(tmp_path / "ours"), "qed", size, options)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "peer").read_bytes()


@pytest.mark.parametrize("options", [{"cluster_size": 4096, "table_size": 2}, {}, {"backing_file": "base"}])
def test_both_change_an_image_in_turns(tmp_path: Path, options: dict[str, Any]) -> None:
    """Generated writes and zeroes by qemu-io and by us, in turns: the same bytes, and qemu-img check is content."""
    chance = random.Random(21)
    size = 6 << 20
    base = chance.randbytes(size)
    (tmp_path / "base").write_bytes(base)
    path = tmp_path / "disk.qed"
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    if "backing_file" in options:
        words += ["-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qed", *words, path, size)
    model = bytearray(base if "backing_file" in options else bytes(size))
    for _ in range(40 if LONG else 6):
        commands = []
        for _ in range(20):
            offset = chance.randrange(size // 512) * 512
            length = min(chance.choice([512, 4096, 65536, 69632]), size - offset)
            byte, zero = chance.randrange(1, 256), chance.random() < 0.3
            model[offset : offset + length] = bytes([0 if zero else byte]) * length
            commands += ["-c", f"write -z {offset} {length}" if zero else f"write -P {byte} {offset} {length}"]
        run("qemu-io", "-f", "qed", *commands, path)
        with open_node(str(path), format="qed", readonly=False, gate=vm_core.Gate.follow()) as node:
            for _ in range(20):
                offset = chance.randrange(size)
                data = chance.randbytes(min(chance.choice([1, 700, 9000, 100000]), size - offset))
                if chance.random() < 0.3:
                    data = bytes(len(data))
                    node.zero(offset, len(data), unmap=chance.random() < 0.5)
                else:
                    node.pwrite(offset, data)
                model[offset : offset + len(data)] = data
            assert node.pread(0, size) == model
        assert "No errors were found" in run("qemu-img", "check", "-f", "qed", path)
        run("qemu-img", "convert", "-f", "qed", "-O", "raw", path, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == model


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("options", ["cluster_size=4k,table_size=2", "cluster_size=64k"])
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_clusters_lie_where_the_peer_puts_them(tmp_path: Path, options: str, backing: bool, seed: int) -> None:
    """The same writes, of zeroes too, and discards one by one give the same file, byte for byte."""
    size = (18 << 20) + 512 * (seed % 2)
    # All zeroes: the peer fills up a cluster that was zeroed from what is below it, which the guest then sees.
    (tmp_path / "base").write_bytes(bytes(5 << 20))
    words = ["-b", "base", "-F", "raw"] if backing else []
    for name in ("peer", "ours"):
        run("qemu-img", "create", "-q", "-f", "qed", "-o", options, *words, tmp_path / name, size)
    lockstep(Qemu("qed"), tmp_path / "ours", tmp_path / "peer", random.Random(seed))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "peer").read_bytes()


@pytest.fixture
def image(tmp_path: Path) -> bytearray:
    """4 KiB clusters; data clusters at 0x3000 to 0x6000 and 0x9000, 0xa000, the L2 table at 0x7000."""
    path = tmp_path / "disk.qed"
    create_image(str(path), "qed", 1 << 20, {"cluster_size": 4096, "table_size": 2})
    with open_node(str(path), format="qed", readonly=False) as node:
        node.pwrite(0, b"x" * 16384)
        node.pwrite(512 << 10, b"y" * 8192)
    return bytearray(path.read_bytes())


L1, L2 = 0x1000, 0x7000
DAMAGE = {
    "duplicate": (L2 + 8, struct.pack("<Q", 0x3000)),
    "outside": (L2, struct.pack("<Q", 0x10000000)),
    "unaligned": (L2, struct.pack("<Q", 0x3101)),
    "leak": (L2, bytes(8)),
    "table": (L1, struct.pack("<Q", 0x10000000)),
    "need check": (16, b"\2"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_counted_and_repaired_as_the_peer_does(image: bytearray, tmp_path: Path, name: str) -> None:
    """check, with and without -r all, has the numbers of qemu-img check."""
    import json

    offset, data = DAMAGE[name]
    image[offset : offset + len(data)] = data
    path = tmp_path / "damaged.qed"
    keys = ("corruptions", "leaks", "total-clusters", "allocated-clusters", "fragmented-clusters")
    for repair in ("", "all"):
        path.write_bytes(image)
        words = ["-r", repair] if repair else []
        done = subprocess.run(
            ["qemu-img", "check", "-f", "qed", "--output=json", *words, path], capture_output=True, text=True
        )
        expected = json.loads(done.stdout)
        file = MemoryNode(image)
        with open_node({"driver": "qed", "file": file}, readonly=not repair, check=True) as node:
            assert isinstance(node, FormatNode)
            found = node.format.check(repair=repair)
            if repair and found.get("corruptions-fixed"):
                found = {**node.format.check(), "corruptions-fixed": found["corruptions-fixed"]}
        assert {key: found.get(key, 0) for key in keys} == {key: expected.get(key, 0) for key in keys}
        assert found.get("corruptions-fixed", 0) == expected.get("corruptions-fixed", 0)
    path.write_bytes(file.pread(0, file.size))
    done = subprocess.run(["qemu-img", "check", "-f", "qed", path], capture_output=True, text=True)
    assert done.returncode == (2 if name == "duplicate" else 0 if name == "need check" else 3)


HEADERS = [
    (0, b"XXXX", "Image not in QED format"),
    (4, b"\1\0\0\0", "QED cluster size is invalid"),
    (8, b"\3\0\0\0", "QED table size is invalid"),
    (12, b"\xff" * 4, "QED table offset is invalid"),
    (16, b"\x08", "Unsupported QED features: 8"),
    (40, b"\1", "QED table offset is invalid"),
    (40, b"\0\0\0\1", "QED table offset is invalid"),
    (48, b"\xff" * 8, "QED image size is invalid"),
    (48, b"\1", "QED image size is invalid"),
]


@pytest.mark.parametrize(("offset", "data", "text"), HEADERS)
def test_a_bad_header_is_told_in_the_peers_words(
    image: bytearray, tmp_path: Path, offset: int, data: bytes, text: str
) -> None:
    """Both programs refuse the same header with the same sentence."""
    image[offset : offset + len(data)] = data
    path = tmp_path / "damaged.qed"
    path.write_bytes(image)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="qed")
    assert caught.value.reason == text
    done = subprocess.run(["qemu-img", "info", "-f", "qed", path], capture_output=True, text=True)
    assert text in done.stderr


def test_an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing(image: bytearray) -> None:
    """NEED_CHECK: reading leaves it; opening for writing drops references to nowhere and clears it."""
    image[16] |= 2
    image[L2 : L2 + 8] = struct.pack("<Q", 0x10000000)
    file = MemoryNode(image)
    with open_node({"driver": "qed", "file": file}) as node:
        assert node.pread(4096, 1) == b"x"
    assert file.pread(16, 1) == b"\2"
    with open_node({"driver": "qed", "file": file}, readonly=False) as node:
        assert node.pread(0, 1) == b"\0"
    assert file.pread(16, 1) == b"\0"


def test_the_mark_stands_while_clusters_are_added(image: bytearray) -> None:
    """NEED_CHECK is on disk before a new cluster is, and gone when the image is closed."""
    file = MemoryNode(image)
    with open_node({"driver": "qed", "file": file}, readonly=False) as node:
        node.pwrite(0, b"in place")
        assert file.pread(16, 1) == b"\0"
        node.pwrite(700 << 10, b"new")
        assert file.pread(16, 1) == b"\2"
    assert file.pread(16, 1) == b"\0"


def test_images_grow_and_do_not_shrink(image: bytearray, tmp_path: Path) -> None:
    """truncate grows the image, over a further L2 table too, and refuses to shrink it in the peer's words."""
    path = tmp_path / "disk.qed"
    path.write_bytes(image)
    with open_node(str(path), format="qed", readonly=False) as node:
        node.truncate(9 << 20)
        node.pwrite((9 << 20) - 3, b"end")
        with pytest.raises(BlockError, match="Shrinking images is currently not supported"):
            node.truncate(1 << 20)
    assert "9437184" in run("qemu-img", "info", "--output=json", path)
    run("qemu-img", "convert", "-f", "qed", "-O", "raw", path, tmp_path / "raw")
    raw = (tmp_path / "raw").read_bytes()
    assert (raw[:4], raw[-3:]) == (b"xxxx", b"end")


@pytest.mark.parametrize(("name", "format"), [("base", "raw"), ("base.qed", "qed"), (None, None)])
def test_the_backing_image_is_changed_as_the_peer_does(
    image: bytearray, tmp_path: Path, name: str | None, format: str | None
) -> None:
    """change_backing writes what qemu-img rebase -u writes."""
    for each in ("ours", "peer"):
        (tmp_path / each).write_bytes(image)
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base", 1 << 20)
    run("qemu-img", "create", "-q", "-f", "qed", tmp_path / "base.qed", 1 << 20)
    words = ["-b", name, "-F", format] if name else ["-b", ""]
    run("qemu-img", "rebase", "-u", "-f", "qed", *words, tmp_path / "peer")
    with open_node(str(tmp_path / "ours"), format="qed", readonly=False) as node:
        assert isinstance(node, FormatNode)
        node.format.change_backing(name, format)
    ours, theirs = run("qemu-img", "info", tmp_path / "ours"), run("qemu-img", "info", tmp_path / "peer")
    assert ours.replace("/ours", "/peer").split("disk size")[1:] == theirs.split("disk size")[1:]
    assert (tmp_path / "ours").read_bytes()[:64] == (tmp_path / "peer").read_bytes()[:64]
