"""Making differencing images: what is written into them, and that everybody reads them."""

from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vhdx_images import MIB, build, guid, read_by_7zip, read_by_libvhdi

from vm_core.block.gate import Gate
from vm_core.block.jobs.commit import commit
from vm_core.block.mapping import Kind
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError, UsageError
from vm_core.testing.nodes import PassingNode
from vm_core.testing.overlays import LONG, OverlayConformance, change


def read_by_dissect(path: Path) -> bytes | None:
    """What dissect.hypervisor, which looks for parents by itself, finds in an image; None without it."""
    try:
        from dissect.hypervisor.disk.vhdx import VHDX
    except ImportError:
        return None
    stream: Any = VHDX(path)
    if not hasattr(stream, "read"):
        stream = stream.open()
    return b"".join(iter(lambda: stream.read(MIB), b""))


class TestVhdxOverlays(OverlayConformance):
    """Differencing images, on blocks of another size."""

    driver, suffix = "vhdx", ".vhdx"
    cuts = 12
    base_options = {"block_size": 2 * MIB}  # noqa: RUF012
    options = {"block_size": MIB}  # noqa: RUF012

    def others(self, images: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
        # libvhdi reads the bitmap of blocks that are not there, from the file's start if there is no bitmap; see below.
        found = read_by_7zip(images[0])
        if found is not None:
            yield "7-Zip", found


@pytest.mark.skipif(not LONG, reason="long")
class TestVhdxOverlaysOfLargeBlocks(TestVhdxOverlays):
    """Blocks that are larger than the disk is."""

    base_options = {"subformat": "fixed"}  # noqa: RUF012
    options = {"block_size": 8 * MIB}  # noqa: RUF012


def test_libvhdi_reads_the_same(tmp_path: Path) -> None:
    """libvhdi too, of images that have a bitmap."""
    pytest.importorskip("pyvhdi")
    chance = random.Random(1)
    create_image(str(tmp_path / "base.vhdx"), "vhdx", 5 * MIB, {"block_size": MIB})
    model = bytearray(5 * MIB)
    for below, name in (("", "base"), ("base.vhdx", "child"), ("child.vhdx", "leaf")):
        path = tmp_path / f"{name}.vhdx"
        if below:
            create_image(str(path), "vhdx", None, {"backing_file": below, "block_size": MIB})
        with open_node(str(path), readonly=False) as node:
            node.pwrite(700, b"something")
            model[700:709] = b"something"
            for _ in range(12):
                change(node, model, chance)
    assert read_by_libvhdi(*(tmp_path / f"{name}.vhdx" for name in ("leaf", "child", "base"))) == model


def test_dissect_reads_the_same(tmp_path: Path) -> None:
    """dissect.hypervisor too, which reads parents in one piece: so the parent is one."""
    pytest.importorskip("dissect.hypervisor")
    chance = random.Random(1)
    fixed = {"subformat": "fixed", "block_state_zero": False}
    create_image(str(tmp_path / "base.vhdx"), "vhdx", 5 * MIB, fixed)
    model = bytearray(5 * MIB)
    for name in ("base", "child"):
        if name == "child":
            create_image(str(tmp_path / "child.vhdx"), "vhdx", None, {"backing_file": "base.vhdx", "block_size": MIB})
        with open_node(str(tmp_path / f"{name}.vhdx"), readonly=False) as node:
            for _ in range(12):
                change(node, model, chance)
    assert read_by_dissect(tmp_path / "child.vhdx") == model


def items(data: bytes) -> dict[bytes, bytes]:
    """The metadata items of an image."""
    regions = data[192 << 10 : 256 << 10]
    start = next(
        struct.unpack_from("<Q", regions, at + 16)[0]
        for at in (16, 48)
        if regions[at : at + 16] == guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
    )
    found = {}
    for index in range(struct.unpack_from("<H", data, start + 10)[0]):
        at = start + 32 + 32 * index
        offset, length = struct.unpack_from("<II", data, at + 16)
        found[data[at : at + 16]] = data[start + offset : start + offset + length]
    return found


def pairs(locator: bytes) -> dict[str, str]:
    """Keys and values of a parent locator."""
    found = {}
    for index in range(struct.unpack_from("<H", locator, 18)[0]):
        key, value, key_length, value_length = struct.unpack_from("<IIHH", locator, 20 + 12 * index)
        found[locator[key : key + key_length].decode("utf-16-le")] = locator[value : value + value_length].decode(
            "utf-16-le"
        )
    return found


def test_every_field(tmp_path: Path) -> None:
    """Parameters, locator and table are what the specification says."""
    (tmp_path / "sub").mkdir()
    base, child = tmp_path / "böse.vhdx", tmp_path / "sub" / "child.vhdx"
    create_image(str(base), "vhdx", 5 * MIB)
    create_image(str(child), "vhdx", None, {"backing_file": "../böse.vhdx"})
    data, below = child.read_bytes(), base.read_bytes()
    found = items(data)
    assert found[guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")] == struct.pack("<II", 8 * MIB, 2)
    locator = found[guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")]
    assert locator[:16] == guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")
    current = max((64 << 10, 128 << 10), key=lambda at: struct.unpack_from("<Q", below, at + 8))
    assert pairs(locator) == {
        "parent_linkage": "{" + str(uuid.UUID(bytes_le=below[current + 32 : current + 48])) + "}",
        "relative_path": "..\\böse.vhdx",
        "absolute_win32_path": str(base).replace("/", "\\"),
    }
    assert not any(data[2 * MIB : 3 * MIB])  # the table: everything is the parent's


@pytest.mark.parametrize("sector", [512, 4096])
def test_sectors_are_the_parents(tmp_path: Path, sector: int) -> None:
    """An overlay has logical sectors of its parent's size, and is written in them."""
    chance = random.Random(sector)
    model = bytearray(chance.randbytes(5 * MIB + 4096))
    (tmp_path / "base.vhdx").write_bytes(build(bytes(model), MIB, chance, sector=sector))
    create_image(str(tmp_path / "child.vhdx"), "vhdx", None, {"backing_file": "base.vhdx", "block_size": 2 * MIB})
    with open_node(str(tmp_path / "child.vhdx"), readonly=False) as node:
        node.pwrite(10_000, b"new")
        model[10_000:10_003] = b"new"
        own = [run for run in node.map(0, node.size) if run.kind is Kind.DATA]
        assert [(run.offset, run.length) for run in own] == [(10_000 // sector * sector, sector)]
        for _ in range(20):
            change(node, model, chance)
    with open_node(str(tmp_path / "child.vhdx")) as node:
        assert node.pread(0, node.size) == model
    if sector == 512:  # 7-Zip knows no others
        assert read_by_7zip(tmp_path / "child.vhdx") in (None, model)


def test_images_built_by_hand_are_written(tmp_path: Path) -> None:
    """All states of blocks, blocks in any order, and a bitmap with bits for blocks that are not there."""
    chance = random.Random(2)
    below = chance.randbytes(5 * MIB + 4096)
    (tmp_path / "base.vhdx").write_bytes(build(below, 2 * MIB, chance, data_write=b"\x11" * 16))
    model = bytearray(below)
    absent: set[int] = set()
    for start in range(0, len(below) // 512, 64):
        if chance.random() < 0.6 or start < 2048:
            absent.update(range(start, min(start + 64, len(below) // 512)))
        else:
            model[start * 512 : (start + 64) * 512] = chance.randbytes(64 * 512)[: len(model) - start * 512]
    names = {"parent_linkage": "{" + str(uuid.UUID(bytes_le=b"\x11" * 16)) + "}", "relative_path": "base.vhdx"}
    image = bytearray(build(bytes(model), MIB, chance, parent=names, absent=frozenset(absent)))
    # The first block is not there: what its bits say must not count once it is.
    bitmaps = struct.unpack_from("<Q", image, 3 * MIB + 8 * 4096)[0] & ~(MIB - 1)
    assert struct.unpack_from("<Q", image, 3 * MIB)[0] == 0
    image[bitmaps : bitmaps + 256] = b"\xff" * 256
    (tmp_path / "child.vhdx").write_bytes(image)
    for _ in range(3):
        with open_node(str(tmp_path / "child.vhdx"), readonly=False) as node:
            node.pwrite(5, b"first")
            model[5:10] = b"first"
            assert node.pread(0, MIB) == model[:MIB]
            for _ in range(15):
                change(node, model, chance)
        with open_node(str(tmp_path / "child.vhdx")) as node:
            assert node.pread(0, node.size) == model
        assert read_by_7zip(tmp_path / "child.vhdx") in (None, model)


def test_a_block_that_is_written_whole_needs_no_bitmap(tmp_path: Path) -> None:
    """It is fully present at once; one of which a part is zeroed stays partial, one zeroed whole takes no space."""
    create_image(str(tmp_path / "base.vhdx"), "vhdx", 4 * MIB, {"block_size": MIB})
    with open_node(str(tmp_path / "base.vhdx"), readonly=False) as node:
        node.pwrite(0, b"x" * (4 * MIB))
    path = tmp_path / "child.vhdx"
    create_image(str(path), "vhdx", None, {"backing_file": "base.vhdx", "block_size": MIB})
    with open_node(str(path), readonly=False) as node:
        node.pwrite(MIB, b"a" * MIB)
        node.zero(2 * MIB, MIB)
    table = struct.unpack_from("<5Q", path.read_bytes(), 2 * MIB)
    assert [entry & 7 for entry in table] == [0, 6, 2, 0, 0]
    with open_node(str(path), readonly=False) as node:
        node.zero(3 * MIB, 512)
    assert [entry & 7 for entry in struct.unpack_from("<5Q", path.read_bytes(), 2 * MIB)] == [0, 6, 2, 7, 0]
    with open_node(str(path)) as node:
        assert node.pread(0, 4 * MIB) == b"x" * MIB + b"a" * MIB + bytes(MIB + 512) + b"x" * (MIB - 512)


def test_a_path_without_a_drive_is_one(tmp_path: Path) -> None:
    """Where the image was moved, the parent is found by its absolute path, if the gate lets it be."""
    create_image(str(tmp_path / "base.vhdx"), "vhdx", MIB)
    create_image(str(tmp_path / "child.vhdx"), "vhdx", None, {"backing_file": str(tmp_path / "base.vhdx")})
    (tmp_path / "below").mkdir()
    moved = tmp_path / "below" / "child.vhdx"
    (tmp_path / "child.vhdx").rename(moved)
    with open_node(str(moved), gate=Gate.default(str(tmp_path))) as node:
        assert node.backing is not None
        assert node.backing.filename == str(tmp_path / "base.vhdx")


@pytest.mark.parametrize("options", [{"subformat": "fixed"}, {"block_state_zero": True}], ids=str)
def test_contradictions_are_named(tmp_path: Path, options: dict[str, object]) -> None:
    """A differencing image is not fixed, and its blocks are not zeroes."""
    create_image(str(tmp_path / "base.vhdx"), "vhdx", MIB)
    with pytest.raises(UsageError, match=next(iter(options))):
        create_image(str(tmp_path / "child.vhdx"), "vhdx", None, {"backing_file": "base.vhdx", **options})


def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    """A parent that was written to since does not fit any more; naming it anew makes it fit."""
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    create_image(str(base), "vhdx", MIB)
    create_image(str(child), "vhdx", None, {"backing_file": "base.vhdx"})
    with open_node(str(base), readonly=False) as node:
        node.pwrite(0, b"x")
    with pytest.raises(ImageError, match="was changed since"):
        open_node(str(child))
    from vm_core import jobs

    jobs.rebase(str(child), "base.vhdx", backing_format="vhdx", unsafe=True)
    with open_node(str(child)) as node:
        assert node.pread(0, 2) == b"x\0"


def damaged(folder: Path, place: str) -> Path:
    """A differencing image with an entry of its table that leads to *place*."""
    chance = random.Random(7)
    data = chance.randbytes(3 * MIB)
    (folder / "base.vhdx").write_bytes(build(data, MIB, chance, data_write=b"\x11" * 16))
    names = {"parent_linkage": "{" + str(uuid.UUID(bytes_le=b"\x11" * 16)) + "}", "relative_path": "base.vhdx"}
    absent = frozenset(range(2048, 2050)) | frozenset(range(10))
    image = bytearray(build(data, MIB, chance, parent=names, absent=absent))
    own = 3 * MIB + 8 * 4096  # of the block of bitmaps
    first = 3 * MIB
    if place == "no bitmaps":
        struct.pack_into("<Q", image, own, 0)
    elif place == "bitmaps outside":
        struct.pack_into("<Q", image, own, len(image) + 64 * MIB | 6)
    elif place == "bitmaps far outside":
        struct.pack_into("<Q", image, own, (1 << 63) | 6)
    elif place == "bitmaps on a block":
        struct.pack_into("<Q", image, own, struct.unpack_from("<Q", image, first)[0] & ~7 | 6)
    elif place == "bitmaps on the log":
        struct.pack_into("<Q", image, own, MIB | 6)
    elif place == "a block on the metadata":
        struct.pack_into("<Q", image, first, 2 * MIB | 7)
    elif place == "a block outside":
        struct.pack_into("<Q", image, first, len(image) + MIB | 7)
    (folder / "child.vhdx").write_bytes(image)
    return folder / "child.vhdx"


PLACES = (
    "bitmaps outside",
    "bitmaps far outside",
    "bitmaps on a block",
    "bitmaps on the log",
    "a block on the metadata",
    "a block outside",
)


@pytest.mark.parametrize("place", PLACES)
def test_damaged_tables_are_not_written(tmp_path: Path, place: str) -> None:
    """What would destroy something else is only read; check tells it."""
    path = damaged(tmp_path, place)
    before = path.read_bytes()
    with pytest.raises(ImageError, match="open it read-only"):
        open_node(str(path), readonly=False)
    assert path.read_bytes() == before
    with open_node(str(path), check=True) as node:
        assert node.format.check()["corruptions"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["no bitmaps", "bitmaps outside", "bitmaps far outside", "a block outside"])
def test_damaged_tables_are_an_error_to_readers(tmp_path: Path, place: str) -> None:
    """One sentence that says what is wrong."""
    with open_node(str(damaged(tmp_path, place))) as node, pytest.raises(BlockError, match=r"bitmap|outside"):
        node.pread(0, node.size)


def test_a_locator_without_room_is_refused(tmp_path: Path) -> None:
    """Where the metadata is full, another parent cannot be named; the image stays as it is."""
    from vm_core import jobs

    create_image(str(tmp_path / "base.vhdx"), "vhdx", MIB)
    path = tmp_path / "child.vhdx"
    create_image(str(path), "vhdx", None, {"backing_file": "base.vhdx"})
    image = bytearray(path.read_bytes())
    start = 3 * MIB
    assert image[start : start + 8] == b"metadata"
    at = start + 32 + 32 * 5
    offset, length = struct.unpack_from("<II", image, at + 16)
    image[start + MIB - length : start + MIB] = image[start + offset : start + offset + length]
    struct.pack_into("<I", image, at + 16, MIB - length)
    path.write_bytes(image)
    long = tmp_path / ("b" * 200 + ".vhdx")
    create_image(str(long), "vhdx", MIB)
    with pytest.raises(ImageError, match="no room for a parent locator"):
        jobs.rebase(str(path), long.name, backing_format="vhdx", unsafe=True)
    with open_node(str(path)) as node:
        assert node.backing is not None
        assert node.backing.filename == str(tmp_path / "base.vhdx")


def test_the_header_counts_only_what_a_guest_sees(tmp_path: Path) -> None:
    """An overlay of the overlay stays valid when the overlay's link is brought up to date."""
    for name, below in (("base", ""), ("child", "base.vhdx"), ("leaf", "child.vhdx")):
        options = {"backing_file": below} if below else {}
        create_image(str(tmp_path / f"{name}.vhdx"), "vhdx", 2 * MIB, options)
    with open_node(str(tmp_path / "leaf.vhdx"), readonly=False) as node:
        node.pwrite(0, b"new")
        assert node.backing is not None
        commit(node, node.backing.backing)
    with open_node(str(tmp_path / "leaf.vhdx")) as node:
        assert node.pread(0, 4) == b"new\0"
    with open_node(str(tmp_path / "child.vhdx")) as node:
        assert node.pread(0, 4) == b"new\0"


def test_power_cuts_while_it_is_committed(tmp_path: Path) -> None:
    """In no state on the way is the parent one that does not fit."""
    chance = random.Random(9)
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    create_image(str(base), "vhdx", 2 * MIB, {"block_size": MIB})
    create_image(str(child), "vhdx", None, {"backing_file": "base.vhdx", "block_size": MIB})
    model = bytearray(2 * MIB)
    with open_node(str(child), readonly=False) as node:
        for _ in range(6):
            change(node, model, chance)
    # One after the other, as one clock: what is written to either while the other one stands still.
    states: list[tuple[bytes, bytes]] = []

    class Watching(PassingNode):
        def flush(self) -> None:
            super().flush()
            states.append((base.read_bytes(), child.read_bytes()))

    with (
        open_node({"driver": "file", "filename": str(base)}, readonly=False) as below,
        open_node({"driver": "file", "filename": str(child)}, readonly=False) as file,
    ):
        watched = [Watching(below), Watching(file)]
        for one, path in zip(watched, (base, child), strict=True):
            one.filename = str(path)
        backing = open_node({"driver": "vhdx", "file": watched[0]}, readonly=False)
        with open_node({"driver": "vhdx", "file": watched[1], "backing": backing}, readonly=False) as node, backing:
            commit(node)
    assert len(states) > 8
    for first, second in states:
        base.write_bytes(first)
        child.write_bytes(second)
        for path in (base, child):
            open_node(str(path), readonly=False).close()  # their logs
        with open_node(str(child)) as node:
            assert node.pread(0, node.size) == model
    assert pairs(items(child.read_bytes())[guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")]).keys() == {
        "parent_linkage",
        "relative_path",
        "absolute_win32_path",
    }
