"""The first QCOW format against the kit and against qemu-img and qemu-io."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

import vm_core
from vm_core.block.formatnode import FormatNode
from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError
from vm_core.testing.conformance import Sample
from vm_core.testing.qemu import LONG, Qemu, QemuConformance, lockstep, run


@pytest.fixture(autouse=True)
def peer() -> None:
    """Skipped (in CI: failed) where qemu-img is not installed."""
    Qemu("qcow")


class TestQcow(QemuConformance):
    """The kit, with qemu-img as the oracle."""

    driver = "qcow"
    checks = False
    size = 3 * 1024 * 1024 + 512
    operations = 150
    rounds = 1000 if LONG else 60
    cuts = 500 if LONG else 60
    header = 48

    def samples(self, directory: Path) -> Iterable[Sample]:
        chance = random.Random(4)
        data = b"".join(chance.choice([bytes(4096), chance.randbytes(256) * 16]) for _ in range(600))
        raw = directory / "sample.raw"
        raw.write_bytes(data)
        for number, options in enumerate(([], ["-c"])):
            path = directory / f"sample{number}.qcow"
            # qemu-img 7.2 ends with 1 and no word after every convert -c to qcow; the image is whole.
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow", *options, raw, path], check=not options)
            yield Sample(path, data)


@pytest.mark.parametrize("size", [512, 1 << 20, 10 << 20, (5 << 30) + 1024])
@pytest.mark.parametrize("backing", [False, True])
def test_new_images_are_those_of_qemu_img(tmp_path: Path, size: int, backing: bool) -> None:
    """Every byte of a new image is where qemu-img puts it."""
    options = []
    given = {}
    if backing:
        run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base", size)
        options = ["-b", "base", "-F", "raw"]
        given = {"backing_file": "base", "backing_fmt": "raw"}
    run("qemu-img", "create", "-q", "-f", "qcow", *options, tmp_path / "peer", size)
    create_image(str(tmp_path / "ours"), "qcow", size, given)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "peer").read_bytes()


@pytest.mark.parametrize("backing", [False, True])
def test_both_write_in_turns(tmp_path: Path, backing: bool) -> None:
    """Generated writes by qemu-io and by us, in turns: both find the same bytes."""
    chance = random.Random(11)
    size = 6 << 20
    base = chance.randbytes(size)
    (tmp_path / "base").write_bytes(base)
    path = tmp_path / "disk.qcow"
    options = ["-b", "base", "-F", "raw"] if backing else []
    run("qemu-img", "create", "-q", "-f", "qcow", *options, path, size)
    model = bytearray(base if backing else bytes(size))
    for _ in range(40 if LONG else 8):
        commands = []
        for _ in range(20):
            offset = chance.randrange(size // 512) * 512
            length = min(chance.choice([512, 4096, 70000 // 512 * 512]), size - offset)
            byte = chance.randrange(256)
            model[offset : offset + length] = bytes([byte]) * length
            commands += ["-c", f"write -P {byte} {offset} {length}"]
        run("qemu-io", "-f", "qcow", *commands, path)
        gate = vm_core.Gate.follow()
        with open_node(str(path), format="qcow", readonly=False, gate=gate) as node:
            for _ in range(20):
                offset = chance.randrange(size)
                data = chance.randbytes(min(chance.choice([1, 700, 9000, 100000]), size - offset))
                model[offset : offset + len(data)] = data
                node.pwrite(offset, data)
            assert node.pread(0, size) == model
        run("qemu-img", "convert", "-f", "qcow", "-O", "raw", path, tmp_path / "raw")
        assert (tmp_path / "raw").read_bytes() == model


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_clusters_lie_where_the_peer_puts_them(tmp_path: Path, backing: bool, seed: int) -> None:
    """The same writes, of zeroes too, and discards one by one give the same file, byte for byte."""
    size = (18 << 20) + 512 * (seed % 2)
    (tmp_path / "base").write_bytes(random.Random(seed).randbytes(5 << 20))
    words = ["-b", "base", "-F", "raw"] if backing else []
    for name in ("peer", "ours"):
        run("qemu-img", "create", "-q", "-f", "qcow", *words, tmp_path / name, size)
    lockstep(Qemu("qcow"), tmp_path / "ours", tmp_path / "peer", random.Random(seed))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "peer").read_bytes()


def test_compressed_clusters_are_read_by_qemu_img(tmp_path: Path) -> None:
    """encode and allocate_encoded make clusters that qemu-img decompresses."""
    path = tmp_path / "disk.qcow"
    create_image(str(path), "qcow", 1 << 20)
    model = bytearray(1 << 20)
    with open_node(str(path), format="qcow", readonly=False) as node:
        assert isinstance(node, FormatNode)
        for number in range(0, 256, 3):
            data = (number.to_bytes(2, "big") * 2048)[:4096]
            stored = node.format.encode(number * 4096, data)
            assert stored is not None
            place = node.format.allocate_encoded(number * 4096, len(stored))
            place.storage.pwrite(place.host, stored)
            node.format.commit([place])
            model[number * 4096 : number * 4096 + 4096] = data
        assert node.pread(0, 1 << 20) == model
    run("qemu-img", "convert", "-f", "qcow", "-O", "raw", path, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


HEADERS = [
    (32, b"\x08", "Cluster size must be between 512 and 64k"),
    (32, b"\x11", "Cluster size must be between 512 and 64k"),
    (33, b"\x05", "L2 table size must be between 512 and 64k"),
    (33, b"\x0e", "L2 table size must be between 512 and 64k"),
    (24, b"\xee" * 8, "Image too large"),
    (24, b"\x7f" + b"\xff" * 7, "Image too large"),
    (24, bytes(8), "Image size is too small (must be at least 2 bytes)"),
    (36, b"\0\0\0\x02", "invalid encryption method in qcow header"),
]


@pytest.mark.parametrize(("offset", "data", "text"), HEADERS)
def test_a_bad_header_is_told_in_the_peers_words(tmp_path: Path, offset: int, data: bytes, text: str) -> None:
    """Both programs refuse the same header with the same sentence."""
    path = tmp_path / "disk.qcow"
    create_image(str(path), "qcow", 64 << 20)
    image = bytearray(path.read_bytes())
    image[offset : offset + len(data)] = data
    path.write_bytes(image)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="qcow")
    assert caught.value.reason == text
    done = subprocess.run(["qemu-img", "info", "-f", "qcow", path], capture_output=True, text=True)
    assert text in done.stderr
