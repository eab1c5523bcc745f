"""Parallels images against the kit and against qemu-img and qemu-io."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.compact import compact
from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError
from vm_core.testing.compaction import judge
from vm_core.testing.conformance import Sample
from vm_core.testing.nodes import MemoryNode
from vm_core.testing.qemu import LONG, Qemu, QemuConformance, lockstep, run


@pytest.fixture(autouse=True)
def peer() -> None:
    """Skipped (in CI: failed) where qemu-img is not installed."""
    Qemu("parallels")


class TestParallels(QemuConformance):
    """The kit, with qemu-img as the oracle."""

    driver = "parallels"
    checks = False
    create_options = ({"cluster_size": 65536}, {"cluster_size": 512}, {"cluster_size": 3 * 512})
    rounds = 1000 if LONG else 40
    cuts = 500 if LONG else 40
    header = 64

    def samples(self, directory: Path) -> Iterable[Sample]:
        chance = random.Random(4)
        data = b"".join(chance.choice([bytes(65536), chance.randbytes(256) * 256]) for _ in range(40))
        raw = directory / "sample.raw"
        raw.write_bytes(data)
        path = directory / "sample.hds"
        run("qemu-img", "convert", "-f", "raw", "-O", "parallels", "-o", "cluster_size=64k", raw, path)
        yield Sample(path, data)
        older = bytearray(path.read_bytes())
        older[:16] = b"WithoutFreeSpace"
        entries = struct.unpack_from("<I", older, 32)[0]
        bat = struct.unpack_from(f"<{entries}I", older, 64)
        struct.pack_into(f"<{entries}I", older, 64, *(entry * 128 for entry in bat))
        path = directory / "older.hds"
        path.write_bytes(older)
        yield Sample(path, data)


@pytest.mark.parametrize("size", [512, 1 << 20, (100 << 20) + 512, 5 << 30])
@pytest.mark.parametrize("cluster", [512, 4096, 1 << 20, 5 << 20])
def test_new_images_are_those_of_qemu_img(tmp_path: Path, size: int, cluster: int) -> None:
    """Every byte of a new image is where qemu-img puts it."""
    run("qemu-img", "create", "-q", "-f", "parallels", "-o", f"cluster_size={cluster}", tmp_path / "peer", size)
    create_image(str(tmp_path / "ours"), "parallels", size, {"cluster_size": cluster})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "peer").read_bytes()


def test_both_write_in_turns(tmp_path: Path) -> None:
    """Generated writes by qemu-io and by us, in turns: the same bytes, in the same places, and clean for qemu-img."""
    chance = random.Random(12)
    size = 6 << 20
    path = tmp_path / "disk.hds"
    run("qemu-img", "create", "-q", "-f", "parallels", "-o", "cluster_size=64k", path, size)
    model = bytearray(size)
    for _ in range(40 if LONG else 8):
        commands = []
        for _ in range(10):
            offset = chance.randrange(size // 512) * 512
            length = min(chance.choice([512, 4096, 69632]), size - offset)
            byte = chance.randrange(256)
            model[offset : offset + length] = bytes([byte]) * length
            commands += ["-c", f"write -P {byte} {offset} {length}"]
        run("qemu-io", "-f", "parallels", *commands, path)
        with open_node(str(path), format="parallels", readonly=False) as node:
            for _ in range(10):
                offset = chance.randrange(size)
                data = chance.randbytes(min(chance.choice([1, 700, 9000, 100000]), size - offset))
                model[offset : offset + len(data)] = data
                node.pwrite(offset, data)
            assert node.pread(0, size) == model
        assert "No errors were found" in run("qemu-img", "check", "-f", "parallels", path)
        run("qemu-img", "convert", "-f", "parallels", "-O", "raw", path, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == model


@pytest.mark.parametrize("cluster", ["64k", "1M", 1536])
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_clusters_lie_where_the_peer_puts_them(tmp_path: Path, cluster: str | int, seed: int) -> None:
    """The same writes, of zeroes too, and discards one by one give the same file, byte for byte."""
    size = (18 << 20) + 512 * (seed % 2)
    for name in ("peer", "ours"):
        run("qemu-img", "create", "-q", "-f", "parallels", "-o", f"cluster_size={cluster}", tmp_path / name, size)
    lockstep(Qemu("parallels"), tmp_path / "ours", tmp_path / "peer", random.Random(seed))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "peer").read_bytes()


def test_compacting_gives_space_back(tmp_path: Path) -> None:
    """Clusters of zeroes keep their places and give their host space back; the peer finds nothing wrong."""
    path = tmp_path / "disk.hds"
    create_image(str(path), "parallels", 8 << 20, {"cluster_size": 65536})
    model = bytearray(random.Random(1).randbytes(4 << 20).ljust(8 << 20, b"\0"))
    with open_node(str(path), format="parallels", readonly=False) as node:
        node.pwrite(0, bytes(model[: 4 << 20]))
        for start in range(65536, 4 << 20, 3 * 65536):
            node.pwrite(start, bytes(65536))
            model[start : start + 65536] = bytes(65536)
    before = path.stat()
    with open_node(str(path), format="parallels", readonly=False) as node:
        told = compact(node, dry_run=True)
        done = compact(node)
        assert node.pread(0, 8 << 20) == model
    after = path.stat()
    assert told.zeroes == done.zeroes == 21 * 65536
    assert done.moved is None
    assert after.st_size == before.st_size
    assert (before.st_blocks - after.st_blocks) * 512 > 20 * 65536
    judge("parallels", path, path.read_bytes(), bytes(model))


def _checked(image: bytearray, repair: str = "") -> tuple[dict[str, Any], MemoryNode]:
    file = MemoryNode(image)
    options = {"driver": "parallels", "file": file}
    with open_node(options, readonly=not repair, check=True) as node:
        assert isinstance(node, FormatNode)
        return node.format.check(repair=repair), file


@pytest.fixture
def image(tmp_path: Path) -> bytearray:
    """Three clusters of 64 KiB are in use."""
    path = tmp_path / "disk.hds"
    create_image(str(path), "parallels", 1 << 20, {"cluster_size": 65536})
    with open_node(str(path), format="parallels", readonly=False) as node:
        node.pwrite(0, b"x" * 65536)
        node.pwrite(5 * 65536, b"y" * 131072)
    return bytearray(path.read_bytes())


DAMAGE = [
    (44, b"Ynot", {"corruptions": 1}, "image was not closed correctly"),
    (64, b"\x63\0\0\0", {"corruptions": 1}, "cluster 0 is outside image"),
    (72, b"\x03\0\0\0", {"corruptions": 1}, None),
]


@pytest.mark.parametrize(("offset", "data", "counts", "text"), DAMAGE)
def test_damage_is_counted_and_repaired_as_the_peer_does(
    image: bytearray, tmp_path: Path, offset: int, data: bytes, counts: dict[str, int], text: str | None
) -> None:
    """check finds what qemu-img check finds, says the same, and repairs it; shared clusters only we find."""
    image[offset : offset + 4] = data
    found, _ = _checked(image)
    assert {key: found[key] for key in counts} == counts
    path = tmp_path / "damaged.hds"
    path.write_bytes(image)
    done = subprocess.run(["qemu-img", "check", "-f", "parallels", path], capture_output=True, text=True)
    if text is None:
        assert found["messages"] == ["ERROR cluster 6 shares host offset 0x30000 with cluster 2"]
        return
    assert f"ERROR {text}" in found["messages"]
    assert f"ERROR {text}" in done.stderr + done.stdout
    fixed, file = _checked(image, "all")
    assert fixed["corruptions-fixed"] == 1
    assert "corruptions" not in fixed
    path.write_bytes(file.pread(0, file.size))
    assert "No errors were found" in run("qemu-img", "check", "-f", "parallels", path)


def test_leaked_space_is_cut_off(image: bytearray, tmp_path: Path) -> None:
    """Space behind the last cluster counts as leaked clusters, as qemu-img counts them, and -r leaks cuts it off."""
    length = len(image)
    image += bytes(3 * 65536)
    found, _ = _checked(image)
    assert found["leaks"] == 3
    path = tmp_path / "leaked.hds"
    path.write_bytes(image)
    done = subprocess.run(["qemu-img", "check", "-f", "parallels", path], capture_output=True, text=True)
    assert "3 leaked clusters were found" in done.stdout
    assert found["messages"][0] in done.stderr + done.stdout
    fixed, file = _checked(image, "leaks")
    assert (fixed["leaks-fixed"], file.size) == (3, length)


HEADERS = [
    (28, bytes(4), "Invalid image: Zero sectors per track"),
    (32, b"\xff" * 4, "Catalog too large"),
    (32, b"\0\0\0\x40", "Catalog too large"),
    (28, b"\0\0\x80\0", "Invalid image: Too big cluster"),
]


@pytest.mark.parametrize(("offset", "data", "text"), HEADERS)
def test_a_bad_header_is_told_in_the_peers_words(
    image: bytearray, tmp_path: Path, offset: int, data: bytes, text: str
) -> None:
    """Both programs refuse the same header with the same sentence."""
    image[offset : offset + 4] = data
    path = tmp_path / "damaged.hds"
    path.write_bytes(image)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="parallels")
    assert caught.value.reason == text
    done = subprocess.run(["qemu-img", "info", "-f", "parallels", path], capture_output=True, text=True)
    assert text in done.stderr


def test_an_image_that_was_not_closed_is_only_read(image: bytearray) -> None:
    """The mark of an open image refuses writing, in the peer's words, and not reading."""
    image[44:48] = b"Ynot"
    with pytest.raises(ImageError, match="was not closed correctly; cannot be opened read/write"):
        open_node({"driver": "parallels", "file": MemoryNode(image)}, readonly=False)
    with open_node({"driver": "parallels", "file": MemoryNode(image)}) as node:
        assert node.pread(0, 4) == b"xxxx"
