"""Making differencing images: what is written into them, and that everybody reads them."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from vhd_images import build, footer, read_by_7zip, reseal

from vm_core.block.gate import Gate
from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError
from vm_core.testing.overlays import LONG, OverlayConformance

MIB = 1 << 20


class TestVpcOverlays(OverlayConformance):
    """Differencing images on a dynamic one."""

    driver, suffix = "vpc", ".vhd"

    def others(self, images: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
        # libvhdi takes the sectors of a bitmap's byte together: see below.
        found = read_by_7zip(images[0])
        if found is not None:
            yield "7-Zip", found


@pytest.mark.skipif(not LONG, reason="long")
class TestVpcOverlaysOnFixed(TestVpcOverlays):
    """Differencing images on a fixed one, whose size is a number."""

    base_options = {"subformat": "fixed", "force_size": True}  # noqa: RUF012


def test_libvhdi_reads_the_same(tmp_path: Path) -> None:
    """Whole bytes of bitmaps are written, which is all that libvhdi knows."""
    pytest.importorskip("pyvhdi")
    from vhd_images import read_by_libvhdi

    chance = random.Random(1)
    create_image(str(tmp_path / "base.vhd"), "vpc", 9 * MIB)
    for below, name in (("", "base"), ("base.vhd", "child"), ("child.vhd", "leaf")):
        path = tmp_path / f"{name}.vhd"
        if below:
            create_image(str(path), "vpc", None, {"backing_file": below})
        with open_node(str(path), readonly=False) as node:
            for _ in range(10):
                offset = chance.randrange(node.size // 4096 - 50) * 4096
                node.pwrite(offset, chance.randbytes(4096 * chance.randrange(1, 50)))
    with open_node(str(tmp_path / "leaf.vhd")) as node:
        data = node.pread(0, node.size)
    assert read_by_libvhdi(*(tmp_path / f"{name}.vhd" for name in ("leaf", "child", "base"))) == data


def test_every_field(tmp_path: Path) -> None:
    """Footer, header and locators are what the specification says."""
    (tmp_path / "sub").mkdir()
    base, child = tmp_path / "böse.vhd", tmp_path / "sub" / "child.vhd"
    create_image(str(base), "vpc", 5 * MIB)
    os.utime(base, (1_700_000_000, 1_700_000_000))
    create_image(str(child), "vpc", None, {"backing_file": "../böse.vhd"})
    data, below = child.read_bytes(), base.read_bytes()
    assert data[:512] == data[-512:]
    assert data[40:60] == below[40:60]  # sizes, geometry
    assert struct.unpack_from(">I", data, 60) == (4,)
    assert data[68:84] != below[68:84]
    header = data[512 : 512 + 1024]
    assert struct.unpack_from(">8sQQIII", header) == (b"cxsparse", (1 << 64) - 1, 1536, 0x10000, 3, 2 * MIB)
    for at, length, place in ((0, 512, 64), (512, 1024, 512 + 36)):
        total = sum(data[at : at + length]) - sum(data[place : place + 4])
        assert struct.unpack_from(">I", data, place) == (~total & 0xFFFFFFFF,)
    assert header[40:56] == below[68:84]
    assert struct.unpack_from(">I", header, 56) == (1_700_000_000 - 946684800,)
    assert header[64:576].rstrip(b"\0") == "böse.vhd".encode("utf-16-be")
    assert data[1536:2048] == b"\xff" * 512
    for number, code, text in ((0, b"W2ru", "..\\böse.vhd"), (1, b"W2ku", str(base).replace("/", "\\"))):
        found, space, length, _, offset = struct.unpack_from(">4sIIIQ", header, 576 + 24 * number)
        assert (found, space) == (code, 1)
        assert data[offset : offset + length].decode("utf-16-le") == text
        assert not any(data[offset + length : offset + 512])
    assert not any(header[576 + 48 : 768])
    assert len(data) == 2048 + 2 * 512 + 512


def test_a_path_without_a_drive_is_one(tmp_path: Path) -> None:
    """Where the image was moved, the parent is found by its absolute path, if the gate lets it be."""
    create_image(str(tmp_path / "base.vhd"), "vpc", MIB)
    create_image(str(tmp_path / "child.vhd"), "vpc", None, {"backing_file": str(tmp_path / "base.vhd")})
    (tmp_path / "below").mkdir()
    moved = tmp_path / "below" / "child.vhd"
    (tmp_path / "child.vhd").rename(moved)
    with open_node(str(moved), gate=Gate.default(str(tmp_path))) as node:
        assert node.backing is not None
        assert node.backing.filename == str(tmp_path / "base.vhd")


@pytest.mark.parametrize("creator", [b"vpc ", b"win "])
def test_sizes_are_the_parents(tmp_path: Path, creator: bytes) -> None:
    """Whether the parent goes by its geometry or by its number, the overlay is as large."""
    image = bytearray(build(bytes(9 * MIB)))
    for at in (0, len(image) - 512):
        made = image[at : at + 512]
        made[28:32] = creator
        struct.pack_into(">HBB", made, 56, 250, 4, 17)
        struct.pack_into(">I", made, 64, 0)
        struct.pack_into(">I", made, 64, ~sum(made) & 0xFFFFFFFF)
        image[at : at + 512] = made
    (tmp_path / "base.vhd").write_bytes(image)
    with open_node(str(tmp_path / "base.vhd")) as node:
        size = node.size
    assert size == (250 * 4 * 17 * 512 if creator == b"vpc " else 9 * MIB)
    create_image(str(tmp_path / "child.vhd"), "vpc", None, {"backing_file": "base.vhd"})
    with open_node(str(tmp_path / "child.vhd"), readonly=False) as node:
        assert node.size == size
        node.pwrite(size - 10, b"0123456789")
    assert (tmp_path / "child.vhd").read_bytes()[48:60] == bytes(image[48:60])


def test_a_size_may_be_rounded_as_the_parents_was(tmp_path: Path) -> None:
    """Who made the parent of 5 MB makes the overlay of 5 MB; no other size is taken."""
    create_image(str(tmp_path / "base.vhd"), "vpc", 5_000_000)
    create_image(str(tmp_path / "child.vhd"), "vpc", 5_000_000, {"backing_file": "base.vhd"})
    with pytest.raises(UsageError, match="as large as the one below it"):
        create_image(str(tmp_path / "other.vhd"), "vpc", 6_000_000, {"backing_file": "base.vhd"})


@pytest.mark.parametrize("options", [{"subformat": "fixed"}, {"force_size": True}], ids=str)
def test_contradictions_are_named(tmp_path: Path, options: dict[str, object]) -> None:
    """A differencing image is neither fixed nor of a size of its own."""
    create_image(str(tmp_path / "base.vhd"), "vpc", MIB)
    with pytest.raises(UsageError, match=next(iter(options))):
        create_image(str(tmp_path / "child.vhd"), "vpc", None, {"backing_file": "base.vhd", **options})


@pytest.mark.parametrize("name", ["a\\b.vhd", os.fsdecode(b"\xff.vhd")], ids=ascii)
def test_names_that_cannot_be_written_are_refused(tmp_path: Path, name: str) -> None:
    """A backslash would be a separator, and bytes that are no text are none in UTF-16."""
    create_image(str(tmp_path / name), "vpc", MIB)
    with pytest.raises(UsageError, match=r"backslash|no text"):
        create_image(str(tmp_path / "child.vhd"), "vpc", None, {"backing_file": name})


def test_a_fixed_image_of_somebody_else(tmp_path: Path) -> None:
    """The parent need not be made here."""
    data = random.Random(1).randbytes(MIB)
    (tmp_path / "base.vhd").write_bytes(data + footer(MIB, 2))
    create_image(str(tmp_path / "child.vhd"), "vpc", None, {"backing_file": "base.vhd"})
    with open_node(str(tmp_path / "child.vhd"), readonly=False) as node:
        node.pwrite(700, b"new")
    expected = data[:700] + b"new" + data[703:]
    with open_node(str(tmp_path / "child.vhd")) as node:
        assert node.pread(0, MIB) == expected
    assert read_by_7zip(tmp_path / "child.vhd") in (None, expected)


def test_a_parent_whose_footer_lies_makes_no_huge_table(tmp_path: Path) -> None:
    """A disk as large as its geometry says, whose other size is absurd: the overlay would need a table for that."""
    image = bytearray(build(bytes(9 * MIB)))
    for at in (0, len(image) - 512):
        image[at + 28 : at + 32] = b"vpc "
        struct.pack_into(">QHBB", image, at + 48, 1 << 52, 250, 4, 17)
        reseal(image, at, 512, 64)
    (tmp_path / "base.vhd").write_bytes(image)
    with open_node(str(tmp_path / "base.vhd")) as node:
        assert node.size == 250 * 4 * 17 * 512
    with pytest.raises(UsageError, match=f"says {1 << 52} bytes, where a VHD image has"):
        create_image(str(tmp_path / "child.vhd"), "vpc", None, {"backing_file": "base.vhd"})
    assert not (tmp_path / "child.vhd").exists()
