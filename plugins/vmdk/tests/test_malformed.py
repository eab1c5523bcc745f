"""Images that are wrong: the peer's sentence where it has one, else ours; one line, in bounded time and memory."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest
from vmdk_images import cowd, describe, sesparse, stream

from vm_core.block.gate import Gate
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError, VmError
from vm_core.testing.qemu import LONG, Qemu

MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1


def poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refusal(path: Path, *, readonly: bool = True) -> str:
    """Why the image does not open here, as it is told where QEMU's name is used."""
    with pytest.raises(VmError) as caught:
        open_node(str(path), format="vmdk", readonly=readonly, gate=Gate.follow()).close()
    assert "\n" not in str(caught.value)
    return caught.value.peer or str(caught.value)


def same_refusal(qemu: Qemu, path: Path) -> str:
    ours = refusal(path)
    theirs = qemu.error("info", "-U", "-f", "vmdk", path).removeprefix(f"Could not open '{path}': ")
    assert ours == theirs
    return ours


@pytest.mark.parametrize(
    ("offset", "data", "expected"),
    [
        (4, struct.pack("<I", 4), "Unsupported VMDK version 4"),
        (20, struct.pack("<Q", MAX64), "Invalid granularity, image may be corrupt"),
        (20, struct.pack("<Q", 0x200001), "Invalid granularity, image may be corrupt"),
        (20, struct.pack("<Q", 0), "L1 entry size is invalid"),
        (20, struct.pack("<Q", 1 << 30), "L1 entry size is invalid"),
        (44, struct.pack("<I", 0), "L1 entry size is invalid"),
        (44, struct.pack("<I", MAX32), "L2 table size too big"),
        (44, struct.pack("<I", 513), "L2 table size too big"),
        (16, struct.pack("<I", MAX32), "L1 size too big"),
        (56, struct.pack("<Q", MAX64), "Invalid footer"),
        (64, struct.pack("<Q", 1 << 30), "File truncated, expecting at least 549755813888 bytes"),
        (512, bytes(10240), ""),
        (512, b"# Disk DescriptorFile\nversion=1\n" + bytes(10000), ""),
    ],
)
def test_headers_of_sparse_images(tmp_path: Path, qemu: Qemu, offset: int, data: bytes, expected: str) -> None:
    """Fields that cannot be are refused with the peer's sentence."""
    path = tmp_path / "d.vmdk"
    create_image(str(path), "vmdk", 64 << 20)
    poke(path, offset, data)
    if expected == "L1 size too big":
        poke(path, 44, struct.pack("<I", 1))
    found = same_refusal(qemu, path)
    assert not expected or found == expected


def test_version_3_is_read_only(tmp_path: Path) -> None:
    """An image of version 3 that is no stream opens for reading; for writing only where reading will do."""
    path = tmp_path / "d.vmdk"
    create_image(str(path), "vmdk", 64 << 20)
    poke(path, 4, struct.pack("<I", 3))
    assert refusal(path, readonly=False) == "VMDK version 3 must be read only"
    open_node(str(path)).close()
    with open_node(str(path), readonly=False, auto_readonly=True) as node:
        assert node.readonly


@pytest.mark.parametrize(
    "extents",
    [
        'RW 128 FLAT "a.raw"',
        'RW 128 FLAT "a.raw" -1',
        'RW 128 flat "a.raw" 0',
        'RW 128 FLAT "nope.raw" 0',
        'RW 128 VMFS "a.raw" 5',
        'RW 2048 SPARSE "a.raw" 7',
        'RW 2048 SPARSE "a.raw"',
        'RW 2048 VMFSSPARSE "a.raw"',
        'RW 2048 SESPARSE "a.raw"',
        'RW 128 FLAT "a.raw" 0\nRW 128 BLAH "a.raw" 0',
        'RW 2048 SPARSE "x.vmdk"',
    ],
)
def test_extent_lines(tmp_path: Path, qemu: Qemu, extents: str) -> None:
    """An extent description that cannot be is refused with the peer's sentence."""
    (tmp_path / "a.raw").write_bytes(b"A" * 65536)
    path = tmp_path / "x.vmdk"
    path.write_text(describe(extents))
    if "x.vmdk" in extents:
        # An image that is its own extent: a loop, which the peer finds out by the magic number.
        assert "loop" in refusal(path)
        return
    same_refusal(qemu, path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("createType", "other"),
        ('"twoGbMaxExtentFlat"', '"vmfsRDM"'),
        ('"twoGbMaxExtentFlat"', '"nonsense"'),
        ("CID=12345678", "CID=zz"),
        ("CID=12345678", "CID="),
    ],
)
def test_descriptors(tmp_path: Path, qemu: Qemu, old: str, new: str) -> None:
    """A descriptor without what it must have is refused with the peer's sentence."""
    (tmp_path / "a.raw").write_bytes(b"A" * 65536)
    path = tmp_path / "x.vmdk"
    path.write_text(describe('RW 128 FLAT "a.raw" 0').replace(old, new, 1))
    same_refusal(qemu, path)


@pytest.mark.parametrize("data", [b"", b"x" * 10, b"KDM", b"KDMV" * 3, b"KDMV" * 1000, b"COWD" * 1000])
def test_files_that_are_something_else(tmp_path: Path, qemu: Qemu, data: bytes) -> None:
    """What is forced to be VMDK and is not is refused with the peer's sentence."""
    path = tmp_path / "x.vmdk"
    path.write_bytes(data)
    same_refusal(qemu, path)


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, 1, "Bad const header magic"),
        (8, 3, "Unsupported version"),
        (24, 16, "Unsupported grain size: 16"),
        (32, 32, "Unsupported grain table size: 32"),
        (40, 1, "Unsupported flags"),
        (56, 5, "Unsupported reserved bits"),
        (208, 1, "Unsupported non-zero const header padding"),
        (512, 1, "Bad volatile header magic"),
        (512 + 24, 1, "Image is dirty, Replaying journal not supported"),
        (512 + 32, 1, "Unsupported non-zero volatile header padding"),
    ],
)
def test_headers_of_se_sparse_extents(tmp_path: Path, qemu: Qemu, offset: int, value: int, expected: str) -> None:
    """Each field of both headers that has to have one value is checked, with the peer's sentence."""
    sesparse(tmp_path / "e.vmdk", 65536, {0: b"x"})
    poke(tmp_path / "e.vmdk", offset, struct.pack("<Q", value))
    path = tmp_path / "d.vmdk"
    path.write_text(describe('RW 65536 SESPARSE "e.vmdk"', kind="seSparse"))
    assert same_refusal(qemu, path).startswith(expected)


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (128, 1 << 40, "reaches past the end of the file"),
        (80, 1 << 40, "volatile header .* lies past the end"),
        (16, 1 << 60, "more than an image can have|L1 size too big"),
        (16, 1 << 50, "L1 size too big"),
    ],
)
def test_se_sparse_extents_that_point_outside(tmp_path: Path, offset: int, value: int, expected: str) -> None:
    """What lies outside the file is found before it is read."""
    sesparse(tmp_path / "e.vmdk", 65536, {0: b"x"})
    poke(tmp_path / "e.vmdk", offset, struct.pack("<Q", value))
    (tmp_path / "d.vmdk").write_text(describe('RW 65536 SESPARSE "e.vmdk"', kind="seSparse"))
    with pytest.raises(ImageError, match=expected):
        open_node(str(tmp_path / "d.vmdk"))


def test_a_directory_outside_the_file(tmp_path: Path) -> None:
    """Grain directories, tables and grains past the end of the file are told with their place."""
    path = tmp_path / "d.vmdk"
    create_image(str(path), "vmdk", 64 << 20)
    good = path.read_bytes()
    poke(path, 56, struct.pack("<Q", 1 << 30))
    with pytest.raises(ImageError, match=r"grain directory .* at 0x8000000000. reaches past the end of the file"):
        open_node(str(path))
    path.write_bytes(good)
    poke(path, 48, struct.pack("<Q", 1 << 30))
    open_node(str(path)).close()
    with pytest.raises(ImageError, match="redundant grain directory"):
        open_node(str(path), readonly=False)
    path.write_bytes(good)
    directory = struct.unpack("<Q", good[56:64])[0] * 512
    poke(path, directory, struct.pack("<I", 0x7FFFFFFF))
    with open_node(str(path)) as node, pytest.raises(BlockError, match=r"grain table 0 .* reaches past the end"):
        node.pread(0, 512)
    path.write_bytes(good)
    table = struct.unpack("<I", good[directory : directory + 4])[0] * 512
    poke(path, table, struct.pack("<I", 0x7FFFFFFF))
    with open_node(str(path), readonly=False) as node:
        with pytest.raises(BlockError, match="grain 0 at 0xfffffffe00 lies past the end of the file"):
            node.pread(0, 512)
        with pytest.raises(BlockError):
            node.pwrite(0, b"x")
        node.pwrite(65536, b"x")
    assert path.stat().st_size < 1 << 20


def test_grains_in_the_metadata_are_not_written(tmp_path: Path) -> None:
    """A table that points at the header cannot make a guest write there."""
    path = tmp_path / "d.vmdk"
    create_image(str(path), "vmdk", 64 << 20)
    good = path.read_bytes()
    directory = struct.unpack("<Q", good[56:64])[0] * 512
    table = struct.unpack("<I", good[directory : directory + 4])[0] * 512
    poke(path, table, struct.pack("<I", 1))
    before = path.read_bytes()[512 : 512 + 4]
    with open_node(str(path), readonly=False) as node, pytest.raises(BlockError, match="lies in the metadata"):
        node.pwrite(0, b"x" * 512)
    assert path.read_bytes()[512 : 512 + 4] == before


@pytest.mark.parametrize(
    ("at", "data"),
    [(0, struct.pack("<Q", 77)), (8, struct.pack("<I", 0)), (8, struct.pack("<I", MAX32)), (14, b"\xff\xff\xff")],
)
def test_damaged_compressed_grains(tmp_path: Path, at: int, data: bytes) -> None:
    """A marker or data that cannot be is an error for that grain alone."""
    path = tmp_path / "d.vmdk"
    stream(path, 4096, {0: b"a" * 65536, 1: b"b" * 65536})
    place = 0x10000
    poke(path, place + at, data)
    with open_node(str(path)) as node:
        with pytest.raises(BlockError):
            node.pread(0, 512)
        assert node.pread(65536, 512) == b"b" * 512


def test_a_bomb_is_defused(tmp_path: Path) -> None:
    """A compressed grain gives a grain's bytes at most, whatever is in it."""
    path = tmp_path / "d.vmdk"
    stream(path, 4096, {0: bytes(50 << 20), 1: b"b" * 65536})
    begin = time.monotonic()
    with open_node(str(path)) as node:
        assert node.pread(0, 1024) == bytes(1024)
    assert time.monotonic() - begin < 2


def test_many_extents_and_long_descriptors(tmp_path: Path) -> None:
    """A descriptor has a length and a number of extents that are read; more is one error."""
    path = tmp_path / "d.vmdk"
    path.write_text(describe("RW 1 ZERO\n" * 70_000))
    with pytest.raises(ImageError, match="names 70000 extents"):
        open_node(str(path))
    path.write_text(describe("# " + "x" * (5 << 20)))
    with pytest.raises(ImageError, match="descriptor of more than"):
        open_node(str(path))


def test_extents_pass_the_gate(tmp_path: Path) -> None:
    """A descriptor opens regular files beside it and below, nothing else, unless it is told to."""
    outside = tmp_path / "secret"
    outside.write_bytes(b"s" * 65536)
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "d.vmdk"
    (folder / "link").symlink_to(outside)
    for name in ("../secret", str(outside), "/dev/null", "link"):
        path.write_text(describe(f'RW 128 FLAT "{name}" 0'))
        with pytest.raises(ImageError, match=r"extents\.0 '"):
            open_node(str(path))
    path.write_text(describe('RW 128 FLAT "../secret" 0'))
    with open_node(str(path), gate=Gate.default(str(tmp_path))) as node:
        assert node.pread(0, 4) == b"ssss"
    with open_node(str(path), gate=Gate.follow()) as node:
        assert node.pread(0, 4) == b"ssss"


@pytest.mark.parametrize("kind", ["descriptor", "cowd", "sesparse", "stream"])
def test_random_damage(tmp_path: Path, kind: str) -> None:
    """Descriptors and extents with random damage give bytes or one error."""
    chance = random.Random(kind)
    (tmp_path / "a.raw").write_bytes(b"A" * 65536)
    path, victim = tmp_path / "d.vmdk", tmp_path / "e.vmdk"
    if kind == "descriptor":
        victim = path
        path.write_text(describe('RW 128 FLAT "a.raw" 0\nRW 64 ZERO', more='parentFileNameHint="p.vmdk"'))
    elif kind == "cowd":
        cowd(victim, 20000, dict.fromkeys(range(0, 20000, 700), b"x" * 512))
        path.write_text(describe('RW 20000 VMFSSPARSE "e.vmdk"', kind="vmfsSparse"))
    elif kind == "sesparse":
        sesparse(victim, 65536, dict.fromkeys(range(0, 8192, 300), b"x" * 4096))
        path.write_text(describe('RW 65536 SESPARSE "e.vmdk"', kind="seSparse"))
    else:
        victim = path
        stream(path, 20000, {n: bytes([n]) * 65536 for n in range(0, 156, 9)})
    good = victim.read_bytes()
    for _ in range(2000 if LONG else 150):
        bad = bytearray(good)
        for _ in range(chance.choice([1, 1, 3])):
            at = chance.randrange(min(len(bad), chance.choice([256, 2048, len(bad)])))
            width = chance.choice([1, 1, 4, 8])
            bad[at : at + width] = chance.choice([chance.randbytes(width), b"\xff" * width, bytes(width)])
        if chance.random() < 0.1:
            del bad[chance.randrange(len(bad)) :]
        victim.write_bytes(bad)
        begin = time.monotonic()
        for readonly in (True, False):
            try:
                with open_node(str(path), format="vmdk", readonly=readonly, backing=False) as node:
                    for offset in (0, node.size // 2, max(0, node.size - 512)):
                        node.pread(offset, 512)
                        if not readonly:
                            node.pwrite(offset, b"w" * min(512, node.size - offset))
                    node.info()
            except (VmError, BlockError) as error:
                assert "\n" not in str(error)  # noqa: PT017 - it may also open
        assert time.monotonic() - begin < 5
