"""Persistent dirty bitmaps: kept as the peer keeps them, byte for byte; never one that lacks a write."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.errors import ImageError, VmError
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import power_cuts
from vm_qcow2.bitmaps import set_runs
from vm_qcow2.image import Qcow2

KIB, MIB = 1 << 10, 1 << 20


def opened(path: Path, *, readonly: bool = False) -> FormatNode:
    node = open_node(path, format="qcow2", readonly=readonly)
    assert isinstance(node, FormatNode)
    return node


def change(path: Path, act: Callable[[Any], None]) -> None:
    """Let our driver do something to the bitmaps of an image."""
    with opened(path) as node:
        assert isinstance(node, FormatNode)
        with node.quiesce() as format:
            act(format)


def call(path: Path, what: str, *words: Any, **more: Any) -> None:
    """Let our driver do something by name."""
    change(path, lambda format: getattr(format, what)(*words, **more))


def bitmaps(path: Path) -> dict[str, tuple[int, bytearray]]:
    """Granularity and bits of each bitmap, by our reader."""
    with opened(path, readonly=True) as node:
        assert isinstance(node, FormatNode)
        return {one["name"]: node.format.bitmap_load(one["name"]) for one in node.format.bitmaps()}


def listed(path: Path, qemu: Qemu) -> list[dict[str, Any]]:
    """What the peer says of them."""
    found: list[dict[str, Any]] = json.loads(qemu.img("info", "--output=json", path))["format-specific"]["data"].get(
        "bitmaps", []
    )
    return found


@pytest.mark.parametrize(
    "options",
    [{"cluster_size": 4096}, {"cluster_size": 65536}, *([{"cluster_size": 2 << 20}] if LONG else [])],
    ids=str,
)
@pytest.mark.parametrize("seed", range(20 if LONG else 1))
def test_as_the_peer_does_it(tmp_path: Path, qemu: Qemu, options: dict[str, Any], seed: int) -> None:
    """The same operations by us and by the peer give the same file; writes set bits, also after resizing."""
    chance = random.Random(seed)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    size = chance.choice([MIB, 700 * KIB, 300 * MIB])
    qemu.create(ours, size, options)
    shutil.copy(ours, theirs)
    names: list[str] = []
    for number in range(80 if LONG else 30):
        what = chance.choice(
            ["write", "write", "zero", "discard", "add", "add", "remove", "enable", "clear", "merge", "resize"]
        )
        name = chance.choice(names) if names else ""
        if what in ("write", "zero", "discard"):
            offset = chance.randrange(size // 512) * 512
            length = min(size - offset, chance.randrange(1, 400) * 512)
            qemu.io(
                theirs, f"{ {'write': 'write -P 7', 'zero': 'write -z', 'discard': 'discard'}[what] } {offset} {length}"
            )
            with opened(ours) as node:
                if what == "write":
                    node.pwrite(offset, b"\7" * length)
                elif what == "zero":
                    node.zero(offset, length)
                else:
                    node.discard(offset, length)
        elif what == "add":
            name, width = f"bitmap {number}", chance.choice([None, 512, 4096, 65536, MIB])
            off = chance.random() < 0.3
            qemu.img(
                "bitmap", "--add", *(["-g", width] if width else []), *(["--disable"] if off else []), theirs, name
            )
            call(ours, "bitmap_add", name, width, enabled=not off)
            names.append(name)
        elif what == "resize":
            size = chance.choice([MIB, 700 * KIB, 3 * MIB, 400 * MIB])
            qemu.img("resize", "-q", "--shrink", theirs, size)
            with opened(ours) as node:
                node.truncate(size)
        elif not name:
            continue
        elif what == "remove":
            qemu.img("bitmap", "--remove", theirs, name)
            call(ours, "bitmap_remove", name)
            names.remove(name)
        elif what == "clear":
            qemu.img("bitmap", "--clear", theirs, name)
            call(ours, "bitmap_clear", name)
        elif what == "enable":
            on = chance.random() < 0.5
            qemu.img("bitmap", "--enable" if on else "--disable", theirs, name)
            call(ours, "bitmap_enable", name, enabled=on)
        else:
            other = chance.choice(names)
            qemu.img("bitmap", "--merge", other, theirs, name)
            call(ours, "bitmap_merge", name, *bitmaps(ours)[other])
        qemu.sound(ours)
        assert listed(ours, qemu) == listed(theirs, qemu)
        assert bitmaps(ours) == bitmaps(theirs), f"{number}: {what} {name}"
        if what in ("discard", "resize", "zero"):
            # Where these allocate is not the matter of this test.
            shutil.copy(theirs, ours)
        else:
            assert ours.read_bytes() == theirs.read_bytes(), f"{number}: {what} {name}"


def test_bits_tell_what_was_written(tmp_path: Path, qemu: Qemu) -> None:
    """Against a model: every way of changing guest bytes sets the bits of those bytes, and no others."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB + 512, {"cluster_size": 4096})
    change(path, lambda format: format.bitmap_add("fine", 512))
    change(path, lambda format: format.bitmap_add("off", 512, enabled=False))
    model = bytearray(-(-(MIB + 512) // 512))
    chance = random.Random(3)
    with opened(path) as node:
        for _ in range(60):
            offset = chance.randrange(MIB)
            length = min(MIB + 512 - offset, chance.randrange(1, 9000))
            what = chance.randrange(4)
            if what == 0:
                node.pwrite(offset, bytes([1]) * length)
            elif what == 1:
                node.zero(offset, length, unmap=bool(length & 1))
            elif what == 2:
                node.discard(offset, length)
            else:
                offset, length = offset // 4096 * 4096, 4096
                node.discard(offset, length)
                try:
                    node.write_compressed(offset, [memoryview(b"\2" * length)])
                except OSError:
                    node.pwrite(offset, b"\2" * length)
            for sector in range(offset // 512, (offset + length - 1) // 512 + 1):
                model[sector] = 1
    found = bitmaps(path)
    assert found["off"][1].count(0) == len(found["off"][1])
    granularity, bits = found["fine"]
    assert granularity == 512
    assert [bits[at >> 3] >> (at & 7) & 1 for at in range(len(model))] == list(model)
    qemu.sound(path)


def test_runs_of_bits() -> None:
    """They are found in any bytes, as one by one."""
    chance = random.Random(4)
    for _ in range(200):
        data = bytes(chance.choice([0, 0, 255, 255, chance.randrange(256)]) for _ in range(chance.randrange(20)))
        want = [at for at in range(len(data) * 8) if data[at >> 3] >> (at & 7) & 1]
        runs = list(set_runs(data))
        assert [at for first, after in runs for at in range(first, after)] == want
        assert all(one[1] < two[0] for one, two in pairwise(runs))


# Messages


def test_what_cannot_be_done(tmp_path: Path, qemu: Qemu) -> None:
    """In QEMU's words."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 4 << 40)
    change(path, lambda format: format.bitmap_add("b0"))
    for act, text in (
        (lambda format: format.bitmap_add("b0"), "Bitmap already exists: b0"),
        (lambda format: format.bitmap_add("b1", 1000), "Granularity must be power of 2 and at least 512"),
        (lambda format: format.bitmap_add("x" * 1024), "Name length exceeds maximum (1023 characters)"),
        (
            lambda format: format.bitmap_add("b1", 512),
            "Too much space will be occupied by the bitmap. Use larger granularity",
        ),
        (lambda format: format.bitmap_remove("b1"), "Dirty bitmap 'b1' not found"),
        (lambda format: format.bitmap_clear("b1"), "Dirty bitmap 'b1' not found"),
    ):
        with pytest.raises(ImageError, match=re.escape(text)):
            change(path, act)
    old = tmp_path / "old.qcow2"
    qemu.create(old, MIB, {"compat": "0.10"})
    with pytest.raises(ImageError, match="Cannot store dirty bitmaps in qcow2 v2 files"):
        change(old, lambda format: format.bitmap_add("b0"))


def test_in_use(tmp_path: Path, qemu: Qemu) -> None:
    """A bitmap that was not stored is only good to be removed; an image with one keeps its size."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB)
    for name in ("lost", "other"):
        qemu.img("bitmap", "--add", path, name)
    place = int.from_bytes(path.read_bytes()[512 + 16 : 512 + 24], "big")
    with path.open("r+b") as file:
        file.seek(place + 15)
        file.write(b"\3")
    assert [one["flags"] for one in listed(path, qemu)] == [["in-use", "auto"], ["auto"]]
    with opened(path, readonly=True) as node:
        assert node.info()["bitmaps"] == listed(path, qemu)
    text = "Bitmap 'lost' is inconsistent and cannot be used"
    for act in (
        lambda format: format.bitmap_clear("lost"),
        lambda format: format.bitmap_enable("lost"),
        lambda format: format.bitmap_load("lost"),
        lambda format: format.truncate(2 * MIB),
    ):
        with pytest.raises(ImageError) as caught:
            change(path, act)
        assert caught.value.peer == f"{text}\nTry block-dirty-bitmap-remove to delete this bitmap from disk"
    with opened(path) as node:
        node.pwrite(0, b"x")
    assert [one["flags"] for one in listed(path, qemu)] == [["in-use", "auto"], ["auto"]]
    change(path, lambda format: format.bitmap_remove("lost"))
    assert [one["name"] for one in listed(path, qemu)] == ["other"]
    qemu.sound(path)


def test_modified_by_others(tmp_path: Path, qemu: Qemu) -> None:
    """Without the auto-clear bit the bitmaps are worth nothing, and that is said."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB)
    qemu.img("bitmap", "--add", path, "b0")
    with path.open("r+b") as file:
        file.seek(95)
        file.write(b"\0")
    said: list[str] = []
    with open_node(path, warn=said.append) as node:
        assert isinstance(node, FormatNode)
        assert not node.format.bitmaps()
    assert "a program lacking bitmap support modified this file" in said[0]
    change(path, lambda format: format.bitmap_add("b1"))
    assert [one["name"] for one in listed(path, qemu)] == ["b1"]
    qemu.sound(path, leaks=True)


_EXTENSION, _DIRECTORY, _TABLE = "extension", "directory", "table"


@pytest.mark.parametrize(
    ("where", "offset", "value", "reason"),
    [
        (_EXTENSION, 4, (23).to_bytes(4, "big"), "bitmaps_ext: Invalid extension length"),
        (_EXTENSION, 8, bytes(4), "found bitmaps extension with zero bitmaps"),
        (
            _EXTENSION,
            8,
            (65536).to_bytes(4, "big"),
            "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
        ),
        (_EXTENSION, 8, (3).to_bytes(4, "big"), "Less bitmaps found than specified in header extension"),
        (_EXTENSION, 8, (1).to_bytes(4, "big"), "More bitmaps found than specified in header extension"),
        (_EXTENSION, 12, b"\0\0\0\1", "bitmaps_ext: Reserved field is not zero"),
        (_EXTENSION, 16, bytes(8), "Requested bitmap directory size is zero"),
        (_EXTENSION, 16, (40).to_bytes(8, "big"), "Broken bitmap directory"),
        (
            _EXTENSION,
            16,
            (1 << 40).to_bytes(8, "big"),
            "bitmaps_ext: bitmap directory size (1099511627776) exceeds the maximum supported size (67107840)",
        ),
        (_EXTENSION, 24, (8).to_bytes(8, "big"), "bitmaps_ext: invalid bitmap directory offset"),
        (_EXTENSION, 24, (1 << 40).to_bytes(8, "big"), "Bitmap '' doesn't satisfy the constraints"),
        (_DIRECTORY, 18, b"\4\0", "Broken bitmap directory"),
        (_DIRECTORY, 17, b"\x08", "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 17, b"\x20", "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 16, b"\0", "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 15, b"\x08", "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 20, b"\0\0\0\x08", "Bitmap extra data is not supported"),
        (_DIRECTORY, 0, bytes(8), "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 8, bytes(4), "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 8, b"\0\0\0\5", "Could not read bitmap 'b0' from image: Invalid argument"),
        (_DIRECTORY, 8, b"\x80\0\0\0", "Bitmap 'b0' doesn't satisfy the constraints"),
        (_DIRECTORY, 56, b"b0", "Bitmap already exists: b0"),
        (
            _TABLE,
            0,
            b"\0\0\0\0\0\0\0\2",
            "Could not read bitmap_table table from image for bitmap 'b0': Invalid argument",
        ),
        (_TABLE, 0, b"\x10", "Could not read bitmap_table table from image for bitmap 'b0': Invalid argument"),
        (_TABLE, 6, b"\2\0", "Could not read bitmap_table table from image for bitmap 'b0': Invalid argument"),
    ],
)
def test_malformed(tmp_path: Path, qemu: Qemu, where: str, offset: int, value: bytes, reason: str) -> None:
    """Refused in QEMU's words, which it is asked for here."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 400 * MIB, {"cluster_size": 4096})
    qemu.img("bitmap", "--add", path, "b0")
    qemu.img("bitmap", "--add", "--disable", path, "b1")
    data = bytearray(path.read_bytes())
    extension = data.index(bytes.fromhex("23852875"))
    directory = int.from_bytes(data[extension + 24 : extension + 32], "big")
    table = int.from_bytes(data[directory : directory + 8], "big")
    at = {_EXTENSION: extension, _DIRECTORY: directory, _TABLE: table}[where] + offset
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        opened(path, readonly=True)
    assert caught.value.peer == reason
    assert qemu.img_path
    assert reason in _peer_error(qemu, path)


def _peer_error(qemu: Qemu, path: Path) -> str:
    import subprocess

    done = subprocess.run([str(qemu.img_path), "info", str(path)], capture_output=True, text=True, errors="replace")
    assert done.returncode == 1
    return done.stderr


def test_fuzzed(tmp_path: Path, qemu: Qemu) -> None:
    """Whatever directory and tables hold: one error or a working image, in bounded time and memory."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 40 * MIB, {"cluster_size": 4096})
    for name in ("b0", "b1", "b2"):
        qemu.img("bitmap", "--add", path, name)
    qemu.io(path, "write 0 300k")
    whole = path.read_bytes()
    extension = whole.index(bytes.fromhex("23852875"))
    directory = int.from_bytes(whole[extension + 24 : extension + 32], "big")
    table = int.from_bytes(whole[directory : directory + 8], "big")
    chance = random.Random(6)
    for _ in range(1000 if LONG else 80):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice([extension + 4, directory, table]) + chance.randrange(0, 40)
            data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        try:
            with open_node({"driver": "qcow2", "file": MemoryNode(bytes(data))}, readonly=False) as node:
                assert isinstance(node, FormatNode)
                node.pwrite(5000, b"x" * 5000)
                for one in node.format.bitmaps():
                    if "in-use" not in one["flags"]:
                        node.format.bitmap_load(one["name"])
                node.format.check()
        except (OSError, VmError):
            pass


# Power cuts


def test_power_cuts(tmp_path: Path, qemu: Qemu) -> None:
    """No cut leaves a usable bitmap without a write that the image has, nor harms image or backing file's name."""
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB, {"cluster_size": 4096, "backing_file": tmp_path / "base.raw", "backing_fmt": "raw"})
    name = str(tmp_path / "base.raw")
    storage = MemoryNode(path.read_bytes())
    recorder = RecordingNode(storage)

    def session(act: Callable[[FormatNode], None]) -> None:
        node = open_node({"driver": "qcow2", "file": recorder, "backing": None}, readonly=False)
        assert isinstance(node, FormatNode)
        act(node)
        node.close()

    written: list[tuple[int, int]] = []

    def write(node: FormatNode) -> None:
        for offset in (0, 300 * KIB, 900 * KIB):
            written.append((recorder.now(), offset))
            node.pwrite(offset, b"\5" * 20 * KIB)
            node.flush()

    session(lambda node: node.format.bitmap_add("fine", 4096))
    added = recorder.now()
    session(write)
    session(lambda node: node.format.bitmap_add("second", 65536))
    session(lambda node: node.format.bitmap_remove("fine"))
    session(lambda node: node.format.bitmap_remove("second"))
    count = 0
    for cut in power_cuts(recorder, seed=3, variants=4, limit=None if LONG else 60):
        count += 1
        image = Qcow2(MemoryNode(cut.image, readonly=True), "cut", readonly=True)
        assert image.backing_reference is not None
        assert image.backing_reference.filename == name
        assert not image.check().get("corruptions"), cut.story
        for one in image.bitmaps():
            if one["name"] == "fine" and "in-use" not in one["flags"]:
                _, bits = image.bitmap_load("fine")
                for moment, offset in written:
                    if added < moment <= cut.moment:
                        (run,) = image.map(offset, 4096)
                        if run.kind == 0:  # the write is in the image
                            assert bits[offset // 4096 >> 3] >> (offset // 4096 & 7) & 1, cut.story
        if count % (1 if LONG else 10) == 0:
            path.write_bytes(cut.image)
            qemu.sound(path, leaks=True)
    assert count > 40
    path.write_bytes(storage.data())
    qemu.sound(path)
