"""Differencing images: sectors that are there or the parent's, which is found and is the right one."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import pytest
from vhd_images import build, footer, locator, read_by_7zip, read_by_libvhdi, reseal

from vm_core.block.extents import walk
from vm_core.block.formatnode import FormatNode
from vm_core.block.gate import Gate
from vm_core.block.jobs.commit import commit
from vm_core.block.open import open_node
from vm_core.errors import GateError, ImageError
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG
from vm_core.testing.replay import power_cuts
from vm_vpc import bitmaps
from vm_vpc.differencing import DifferencingVpc

BASE, CHILD, LEAF = b"\xaa" * 16, b"\xbb" * 16, b"\xcc" * 16
SIZE = 3000 * 512


def differ(chance: random.Random, below: bytes, share: float = 0.6, unit: int = 1) -> tuple[bytes, frozenset[int]]:
    """Contents over *below*, and which sectors are absent, in runs of whole *unit*s."""
    data, absent, position = bytearray(below), set(), 0
    count = len(below) // 512
    while position < count:
        run = min(chance.randrange(1, 60) * unit, count - position)
        if chance.random() < share:
            absent.update(range(position, position + run))
        else:
            data[position * 512 : (position + run) * 512] = chance.randbytes(run * 512)
        position += run
    return bytes(data), frozenset(absent)


def chain(
    folder: Path, block: int = 65536, names: tuple[tuple[bytes, bytes], ...] | None = None, unit: int = 1
) -> bytes:
    """``base.vhd`` and ``child.vhd`` in *folder*; returns what a guest finds in the child."""
    chance = random.Random(block)
    below = chance.randbytes(SIZE)
    (folder / "base.vhd").write_bytes(build(below, block, chance, uuid=BASE))
    data, absent = differ(chance, below, unit=unit)
    if names is None:
        names = (locator(b"W2ru", ".\\base.vhd"), locator(b"W2ku", "C:\\disks\\base.vhd"))
    image = build(
        data,
        block,
        chance,
        uuid=CHILD,
        parent=BASE,
        parent_stamp=1000,
        parent_name="base.vhd",
        locators=names,
        absent=absent,
    )
    (folder / "child.vhd").write_bytes(image)
    return data


def seven_zip_agrees(folder: Path, data: bytes) -> None:
    """7-Zip, where it is installed, finds *data* in the child."""
    found = read_by_7zip(folder / "child.vhd")
    assert found is None or found == data


@pytest.mark.parametrize("block", [4096, 65536, 2 << 20])
def test_reading(tmp_path: Path, block: int) -> None:
    """Sector by sector the image's or the parent's; other programs find the same."""
    data = chain(tmp_path, block)
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.backing is not None
        assert node.pread(0, node.size) == data
        chance = random.Random(2)
        for _ in range(100):
            offset, length = chance.randrange(SIZE), chance.randrange(1, 200_000)
            assert node.pread(offset, min(length, SIZE - offset)) == data[offset : offset + length]
        for extent in walk(node):
            if extent.storage is not None:
                assert extent.storage.pread(extent.host, extent.length) == data[extent.offset : extent.end]
    seven_zip_agrees(tmp_path, data)


@pytest.mark.skipif(not shutil.which("7zz"), reason="needs 7-Zip: apt-get install 7zip")
def test_7zip_reads_the_same(tmp_path: Path) -> None:
    """The comparisons with 7-Zip compare something."""
    data = chain(tmp_path)
    assert read_by_7zip(tmp_path / "child.vhd") == data


@pytest.mark.parametrize("block", [4096, 2 << 20])
def test_libvhdi_reads_the_same(tmp_path: Path, block: int) -> None:
    """libvhdi too (which takes the sectors of a bitmap's byte together: so runs are of 4 KiB here; and knows only
    blocks whose bitmap it has seen in the wild)."""
    pytest.importorskip("pyvhdi")
    data = chain(tmp_path, block, unit=8)
    assert read_by_libvhdi(tmp_path / "child.vhd", tmp_path / "base.vhd") == data
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.pread(0, SIZE) == data


@pytest.mark.parametrize("block", [4096, 65536, 2 << 20])
def test_writing(tmp_path: Path, block: int) -> None:
    """Sectors are put into blocks that are there and new ones; the parent stays as it is; other programs agree."""
    model = bytearray(chain(tmp_path, block))
    before = (tmp_path / "base.vhd").read_bytes()
    chance = random.Random(block + 1)
    for _ in range(20 if LONG else 4):
        with open_node(str(tmp_path / "child.vhd"), readonly=False) as node:
            for _ in range(25):
                length = chance.choice([1, 100, 512, 4096, 5000, 150_000])
                offset = chance.randrange(SIZE - length)
                what = chance.random()
                if what < 0.7:
                    data = chance.randbytes(length)
                    node.pwrite(offset, data)
                    model[offset : offset + length] = data
                elif what < 0.9:
                    node.zero(offset, length, unmap=chance.random() < 0.5)
                    model[offset : offset + length] = bytes(length)
                else:
                    node.flush()
                assert node.pread(offset, length) == model[offset : offset + length]
            assert node.pread(0, SIZE) == model
        with open_node(str(tmp_path / "child.vhd")) as node:
            assert node.pread(0, SIZE) == model
        seven_zip_agrees(tmp_path, bytes(model))
    assert (tmp_path / "base.vhd").read_bytes() == before


def test_locators_are_not_overwritten(tmp_path: Path) -> None:
    """New blocks go behind the parent's names, which lie between the table and the footer of an empty image."""
    chance = random.Random(1)
    below = chance.randbytes(SIZE)
    (tmp_path / "base.vhd").write_bytes(build(below, uuid=BASE))
    image = build(
        below,
        uuid=CHILD,
        parent=BASE,
        parent_stamp=1000,
        locators=(locator(b"W2ru", "base.vhd"),),
        absent=frozenset(range(4096)),
    )
    (tmp_path / "child.vhd").write_bytes(image)
    with open_node(str(tmp_path / "child.vhd"), readonly=False) as node:
        node.pwrite(0, b"new")
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.backing is not None
        assert node.pread(0, SIZE) == b"new" + below[3:]


@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_power_cuts(tmp_path: Path, seed: int) -> None:
    """Whatever a power cut leaves opens and has every byte that was flushed and not touched since."""
    chance = random.Random(seed)
    below = chance.randbytes(512 * 600)
    data, absent = differ(chance, below, 0.8)
    image = build(data, 8192, chance, uuid=CHILD, parent=BASE, parent_name="base.vhd", absent=absent)
    base = MemoryNode(below, readonly=True)
    recorder = RecordingNode(MemoryNode(image))
    node = open_node({"driver": "vpc", "file": recorder, "backing": base}, readonly=False)
    model = bytearray(data)
    touched: list[tuple[int, int, int]] = []
    since: dict[int, int] = {}
    marks = []

    def mark() -> None:
        marks.append(bytes(model))
        recorder.mark(marks[-1])
        since[id(marks[-1])] = recorder.now()

    mark()
    for _ in range(60):
        if chance.random() < 0.25:
            node.flush()
            mark()
            continue
        length = chance.choice([100, 512, 3000, 20_000])
        offset = chance.randrange(len(model) - length)
        touched.append((recorder.now(), offset, length))
        new = chance.randbytes(length)
        node.pwrite(offset, new)
        model[offset : offset + length] = new
    node.close()
    mark()
    count = 0
    for cut in power_cuts(recorder, seed=seed, variants=4, limit=None if LONG else 60):
        if cut.mark is None:
            continue
        count += 1
        with open_node({"driver": "vpc", "file": MemoryNode(cut.image, readonly=True), "backing": base}) as opened:
            found = opened.pread(0, len(model))
        expected = bytearray(cut.mark)
        for moment, offset, length in touched:
            if since[id(cut.mark)] <= moment <= cut.moment:
                expected[offset : offset + length] = found[offset : offset + length]
        assert found == expected, cut.story
    assert count > 50


NAMES = [
    (locator(b"W2ru", ".\\base.vhd"),),
    (locator(b"W2ru", "base.vhd\0"),),
    (locator(b"W2ku", "D:\\some where\\base.vhd"),),
    (locator(b"MacX", "file://localhost/elsewhere/base.vhd"),),
    (locator(b"W2ru", ".\\gone.vhd"), locator(b"W2ku", "C:\\x\\base.vhd")),
    (locator(b"Wi2k", "junk"),),
    (),
]


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_names_of_the_parent(tmp_path: Path, names: tuple[tuple[bytes, bytes], ...]) -> None:
    """Relative, absolute, as a URL, by its bare name: the parent beside the image is found."""
    data = chain(tmp_path, 65536, names)
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.pread(0, node.size) == data


def test_a_parent_elsewhere_needs_leave(tmp_path: Path) -> None:
    """A path that leads out of the image's directory is the gate's business."""
    below = tmp_path / "below"
    below.mkdir()
    data = chain(below, 65536, (locator(b"W2ru", "..\\base.vhd"),))
    (below / "base.vhd").rename(tmp_path / "base.vhd")
    with pytest.raises(GateError, match="--trust"):
        open_node(str(below / "child.vhd"))
    with open_node(str(below / "child.vhd"), gate=Gate.default(str(tmp_path))) as node:
        assert node.pread(0, node.size) == data


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    """The error says which file is missing."""
    chain(tmp_path)
    (tmp_path / "base.vhd").unlink()
    with pytest.raises(ImageError, match=r"base\.vhd"):
        open_node(str(tmp_path / "child.vhd"))


def test_the_wrong_parent_is_refused(tmp_path: Path) -> None:
    """Another image of the same name is not taken for the parent, unless the user says so."""
    data = chain(tmp_path)
    path = tmp_path / "base.vhd"
    image = bytearray(path.read_bytes())
    for at in (0, len(image) - 512):
        image[at + 68 : at + 84] = LEAF
        reseal(image, at, 512, 64)
    path.write_bytes(image)
    with pytest.raises(ImageError, match="is not the parent of this image"):
        open_node(str(tmp_path / "child.vhd"))
    spec = f"driver=vpc,file.filename={tmp_path}/child.vhd,backing.driver=vpc,backing.file.filename={path}"
    with open_node(spec) as node:
        assert node.pread(0, node.size) == data


def test_a_changed_parent_is_told(tmp_path: Path) -> None:
    """A time stamp that is neither the footer's nor the file's is worth a warning."""
    data = chain(tmp_path)
    image = bytearray((tmp_path / "child.vhd").read_bytes())
    struct.pack_into(">I", image, 512 + 56, 77)
    reseal(image, 512, 1024, 36)
    (tmp_path / "child.vhd").write_bytes(image)
    warnings: list[str] = []
    with open_node(str(tmp_path / "child.vhd"), warn=warnings.append) as node:
        assert node.pread(0, node.size) == data
    assert len(warnings) == 1
    assert "base.vhd" in warnings[0]


def test_three_generations_on_a_fixed_image(tmp_path: Path) -> None:
    """The first parent may be a fixed image; each sector is the youngest's."""
    chance = random.Random(3)
    below = chance.randbytes(SIZE)
    (tmp_path / "base.vhd").write_bytes(below + footer(SIZE, 2, uuid=BASE))
    middle, absent = differ(chance, below, unit=8)
    image = build(
        middle, 2 << 20, chance, uuid=CHILD, parent=BASE, parent_stamp=1000, parent_name="base.vhd", absent=absent
    )
    (tmp_path / "child.vhd").write_bytes(image)
    data, absent = differ(chance, middle, unit=8)
    image = build(
        data, 2 << 20, chance, uuid=LEAF, parent=CHILD, parent_stamp=1000, parent_name="child.vhd", absent=absent
    )
    (tmp_path / "leaf.vhd").write_bytes(image)
    with open_node(str(tmp_path / "leaf.vhd")) as node:
        assert node.pread(0, SIZE) == data
    found = read_by_libvhdi(tmp_path / "leaf.vhd", tmp_path / "child.vhd", tmp_path / "base.vhd")
    assert found is None or found == data


def test_a_parent_that_is_a_device_or_a_secret_is_not_read(tmp_path: Path) -> None:
    """Names that an image gives do not make anything else be opened."""
    chain(tmp_path, 65536, (locator(b"MacX", "file:///etc/passwd"),))
    (tmp_path / "base.vhd").unlink()
    with pytest.raises(ImageError) as caught:
        open_node(str(tmp_path / "child.vhd"))
    assert isinstance(caught.value, GateError) or "No such file" in str(caught.value)


def test_blocks_on_the_parents_names_are_only_read(tmp_path: Path) -> None:
    """A write to a block that lies on the names would put the guest's bytes in their place."""
    chain(tmp_path)
    path = tmp_path / "child.vhd"
    image = bytearray(path.read_bytes())
    (entry,) = struct.unpack_from(">I", image, 1536)
    place = entry * 512 + 5120
    (length,) = struct.unpack_from(">I", image, 512 + 576 + 8)
    (offset,) = struct.unpack_from(">Q", image, 512 + 576 + 16)
    image[place : place + length] = image[offset : offset + length]
    struct.pack_into(">Q", image, 512 + 576 + 16, place)
    reseal(image, 512, 1024, 36)
    path.write_bytes(image)
    with open_node(str(path)) as node:
        assert node.backing is not None
    with pytest.raises(ImageError, match="where metadata is"):
        open_node(str(path), readonly=False)


def test_bitmaps_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks are read and written between two flushes: what waits is written, what is clean forgotten."""
    model = bytearray(chain(tmp_path, 4096))
    monkeypatch.setattr(bitmaps, "KEPT", 8 * 512)
    chance = random.Random(7)
    with open_node(str(tmp_path / "child.vhd"), readonly=False) as node:
        assert isinstance(node, FormatNode)
        driver = node.format
        assert isinstance(driver, DifferencingVpc)
        for _ in range(300):
            offset = chance.randrange(SIZE - 9000)
            if chance.random() < 0.3:
                data = chance.randbytes(chance.choice([1, 600, 9000]))
                node.pwrite(offset, data)
                model[offset : offset + len(data)] = data
            assert node.pread(offset, 9000) == model[offset : offset + 9000]
            kept = driver.sector_bitmaps
            assert len(kept._clean) <= 8
            assert len(kept._dirty) <= 8
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.pread(0, SIZE) == model


def test_who_names_no_parent_is_given_one(tmp_path: Path) -> None:
    """As the error says: with backing.file.filename the image opens."""
    data = chain(tmp_path, 65536, ())
    path = tmp_path / "child.vhd"
    image = bytearray(path.read_bytes())
    image[512 + 64 : 512 + 576] = bytes(512)
    reseal(image, 512, 1024, 36)
    path.write_bytes(image)
    with pytest.raises(ImageError, match=r"names no parent: give backing\.file\.filename=PATH"):
        open_node(str(path))
    base = tmp_path / "base.vhd"
    with open_node(f"driver=vpc,file.filename={path},backing.driver=vpc,backing.file.filename={base}") as node:
        assert node.pread(0, SIZE) == data
    open_node(str(path), gate=Gate.none()).close()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Where everything that an image names may be opened, a name of something else is passed over."""
    names = (locator(b"W2ru", "pipe.vhd"), locator(b"W2ku", "C:\\x\\base.vhd"))
    data = chain(tmp_path, 65536, names)
    os.mkfifo(tmp_path / "pipe.vhd")
    with open_node(str(tmp_path / "child.vhd"), gate=Gate.follow()) as node:
        assert node.pread(0, SIZE) == data


def test_a_parent_that_is_no_file_may_be_committed_to(tmp_path: Path) -> None:
    """It has no time of its last change that could be noted."""
    chain(tmp_path)
    image = bytearray((tmp_path / "child.vhd").read_bytes())
    struct.pack_into(">I", image, 512 + 56, 77)
    reseal(image, 512, 1024, 36)
    base = open_node({"driver": "vpc", "file": MemoryNode((tmp_path / "base.vhd").read_bytes())}, readonly=False)
    with open_node({"driver": "vpc", "file": MemoryNode(image), "backing": base}, readonly=False) as node:
        commit(node, base)
        assert node.pread(0, SIZE) == base.pread(0, SIZE)


def test_zeroes_hide_a_parent_that_is_not_open(tmp_path: Path) -> None:
    """Also where nothing below is looked at, zeroes are put into the image: once the parent is there they are seen."""
    model = bytearray(chain(tmp_path))
    with open_node(str(tmp_path / "child.vhd"), readonly=False, backing=False) as node:
        for sector in range(0, 200, 2):  # present or not, each by itself
            node.zero(sector * 512, 512)
            model[sector * 512 : (sector + 1) * 512] = bytes(512)
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.pread(0, SIZE) == model
