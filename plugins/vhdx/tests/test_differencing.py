"""Differencing images: sectors that are there or the parent's, which is found and is the right one."""

from __future__ import annotations

import random
import shutil
import uuid
from pathlib import Path

import pytest
from vhdx_images import MIB, build, read_by_7zip, read_by_libvhdi

from vm_core.block.extents import walk
from vm_core.block.formatnode import FormatNode
from vm_core.block.gate import Gate
from vm_core.block.open import open_node
from vm_core.errors import GateError, ImageError
from vm_core.testing.nodes import MemoryNode
from vm_vhdx import bitmaps
from vm_vhdx.differencing import DifferencingVhdx

BASE, CHILD, LEAF = b"\x11" * 16, b"\x22" * 16, b"\x33" * 16
SIZE = 5 * MIB + 4096


def linkage(data_write: bytes) -> str:
    return "{" + str(uuid.UUID(bytes_le=data_write)) + "}"


def differ(chance: random.Random, below: bytes, sector: int = 512) -> tuple[bytes, frozenset[int]]:
    """Contents over *below*, and which sectors are absent: whole blocks, parts of blocks, none."""
    data, absent, position = bytearray(below), set(), 0
    count = len(below) // sector
    while position < count:
        run = min(chance.choice([chance.randrange(1, 60), MIB // sector]), count - position)
        if chance.random() < 0.6:
            absent.update(range(position, position + run))
        else:
            data[position * sector : (position + run) * sector] = chance.randbytes(run * sector)
        position += run
    return bytes(data), frozenset(absent)


def chain(folder: Path, block: int = MIB, sector: int = 512, locator: dict[str, str] | None = None) -> bytes:
    """``base.vhdx`` and ``child.vhdx`` in *folder*; returns what a guest finds in the child."""
    chance = random.Random(block + sector)
    below = chance.randbytes(SIZE)
    (folder / "base.vhdx").write_bytes(build(below, block, chance, sector=sector, data_write=BASE))
    data, absent = differ(chance, below, sector)
    names = (
        {"relative_path": ".\\base.vhdx", "absolute_win32_path": "C:\\disks\\base.vhdx"} if locator is None else locator
    )
    parent = {"parent_linkage": linkage(BASE), **names}
    image = build(data, block, chance, sector=sector, data_write=CHILD, parent=parent, absent=absent)
    (folder / "child.vhdx").write_bytes(image)
    return data


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("block", [MIB, 4 * MIB])
def test_reading(tmp_path: Path, block: int, sector: int) -> None:
    """Sector by sector the image's or the parent's."""
    data = chain(tmp_path, block, sector)
    with open_node(str(tmp_path / "child.vhdx")) as node:
        assert node.backing is not None
        assert node.pread(0, node.size) == data
        chance = random.Random(2)
        for _ in range(60):
            offset, length = chance.randrange(SIZE), chance.randrange(1, 200_000)
            assert node.pread(offset, min(length, SIZE - offset)) == data[offset : offset + length]
        for extent in walk(node):
            if extent.storage is not None:
                assert extent.storage.pread(extent.host, extent.length) == data[extent.offset : extent.end]


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("block", [MIB, 4 * MIB])
def test_libvhdi_reads_the_same(tmp_path: Path, block: int, sector: int) -> None:
    """The images that the tests build are images to another program, which finds the same bytes."""
    pytest.importorskip("pyvhdi")
    data = chain(tmp_path, block, sector)
    assert read_by_libvhdi(tmp_path / "child.vhdx", tmp_path / "base.vhdx") == data


@pytest.mark.skipif(not shutil.which("7zz"), reason="needs 7-Zip: apt-get install 7zip")
def test_7zip_reads_the_same(tmp_path: Path) -> None:
    """So does 7-Zip, which finds the parent by itself."""
    data = chain(tmp_path)
    assert read_by_7zip(tmp_path / "child.vhdx") == data


@pytest.mark.parametrize(
    "locator",
    [
        {"relative_path": "base.vhdx"},
        {"absolute_win32_path": "D:\\some where\\base.vhdx"},
        {"volume_path": "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\x\\base.vhdx"},
        {"relative_path": ".\\gone.vhdx", "absolute_win32_path": "C:\\x\\base.vhdx"},
    ],
    ids=str,
)
def test_names_of_the_parent(tmp_path: Path, locator: dict[str, str]) -> None:
    """Relative, absolute, by volume: the parent beside the image is found."""
    data = chain(tmp_path, locator=locator)
    with open_node(str(tmp_path / "child.vhdx")) as node:
        assert node.pread(0, node.size) == data


def test_no_name_at_all(tmp_path: Path) -> None:
    """An image that names no parent says what to give."""
    chain(tmp_path, locator={})
    with pytest.raises(ImageError, match="names no parent"):
        open_node(str(tmp_path / "child.vhdx"))


def test_a_parent_elsewhere_needs_leave(tmp_path: Path) -> None:
    """A path that leads out of the image's directory is the gate's business."""
    below = tmp_path / "below"
    below.mkdir()
    data = chain(below, locator={"relative_path": "..\\base.vhdx"})
    (below / "base.vhdx").rename(tmp_path / "base.vhdx")
    with pytest.raises(GateError, match="--trust"):
        open_node(str(below / "child.vhdx"))
    with open_node(str(below / "child.vhdx"), gate=Gate.default(str(tmp_path))) as node:
        assert node.pread(0, node.size) == data


def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    """A parent that was written to since has another GUID, unless the user says so it is not opened."""
    data = chain(tmp_path)
    with open_node(str(tmp_path / "base.vhdx"), readonly=False) as node:
        was = node.pread(0, 1)
        node.pwrite(0, was)
    with pytest.raises(ImageError, match="is not the parent of this image, or was changed since"):
        open_node(str(tmp_path / "child.vhdx"))
    base = tmp_path / "base.vhdx"
    spec = f"driver=vhdx,file.filename={tmp_path}/child.vhdx,backing.driver=vhdx,backing.file.filename={base}"
    with open_node(spec) as node:
        assert node.pread(0, node.size) == data


def test_three_generations(tmp_path: Path) -> None:
    """Each sector is the youngest's."""
    chance = random.Random(6)
    middle = chain(tmp_path)
    data, absent = differ(chance, middle)
    parent = {"parent_linkage": linkage(CHILD), "relative_path": "child.vhdx"}
    (tmp_path / "leaf.vhdx").write_bytes(build(data, 2 * MIB, chance, data_write=LEAF, parent=parent, absent=absent))
    with open_node(str(tmp_path / "leaf.vhdx")) as node:
        assert node.pread(0, SIZE) == data


def test_bitmaps_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on disk as it is gets forgotten, also while something else waits to be written."""
    monkeypatch.setattr(bitmaps, "KEPT", 4)
    chance = random.Random(7)
    model = bytearray(chance.randbytes(40 * 4096))
    file = MemoryNode(bytes(model))
    kept = bitmaps.Bitmaps(file)
    for step in range(400):
        start = chance.randrange(len(model) - 5000)
        assert kept.read(start, 5000) == model[start : start + 5000]
        assert len(kept._clean) <= 4
        if step % 3 == 0:
            kept.mark(start, 3, 11)
            bits = int.from_bytes(model[start : start + 2], "little") | 0b11111111111 << 3
            model[start : start + 2] = bits.to_bytes(2, "little")
        if kept.many:
            for at, contents in kept.pending():
                file.pwrite(at, contents)
            kept.clean()
        assert len(kept._dirty) <= 4
    for at, contents in kept.pending():
        file.pwrite(at, contents)
    assert file.data() == model


def test_what_waits_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too much of it waits: nothing is lost, and the image is sound."""
    monkeypatch.setattr(bitmaps, "KEPT", 0)
    model = bytearray(chain(tmp_path))
    chance = random.Random(7)
    with open_node(str(tmp_path / "child.vhdx"), readonly=False) as node:
        assert isinstance(node, FormatNode)
        driver = node.format
        assert isinstance(driver, DifferencingVhdx)
        for _ in range(40):
            offset = chance.randrange(SIZE - 9000)
            data = chance.randbytes(chance.choice([1, 600, 9000]))
            node.pwrite(offset, data)
            model[offset : offset + len(data)] = data
            assert not driver._bitmaps.dirty
            assert node.pread(offset, 9000) == model[offset : offset + 9000]
    with open_node(str(tmp_path / "child.vhdx")) as node:
        assert node.pread(0, SIZE) == model
