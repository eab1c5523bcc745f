"""What cannot be read is refused in the peer's words, or in one line that names the place."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from vhd_images import build, footer, reseal

from vm_core.block.open import open_node
from vm_core.errors import ImageError
from vm_core.testing.qemu import Qemu

MIB = 1 << 20


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def damaged(path: Path, *patches: tuple[int, bytes], seal: bool = True, data: bytes = bytes(9 * MIB)) -> None:
    """A dynamic image with bytes replaced at its start, and in the footer at its end the same."""
    image = bytearray(build(data))
    for at, value in patches:
        image[at : at + len(value)] = value
    if seal:
        reseal(image, 0, 512, 64)
        reseal(image, 512, 1024, 36)
    image[-512:] = image[:512]
    path.write_bytes(image)


@pytest.mark.parametrize(
    ("patches", "seal"),
    [
        ([(0, b"x")], False),
        ([(64, b"abcd")], False),
        ([(48, u64(1 << 63))], True),
        ([(48, u64(1 << 41))], True),
        ([(48, u64(12 * MIB))], True),
        ([(16, u64(1 << 40))], True),
        ([(16, u64(513))], True),
        ([(512, b"x")], True),
        ([(528, u64(1 << 40))], True),
        ([(528, u64(0))], True),
        ([(540, u32(0))], True),
        ([(540, u32(4))], True),
        ([(540, u32(129))], True),
        ([(540, u32(0xFFFFFFFF))], True),
        ([(540, u32(0x20000000))], True),
        *[([(544, u32(size))], True) for size in (0, 1, 256, 513, 1000, 3 << 20, 0xFFFFFFFF, 512, MIB)],
        ([(1536, u32(100_000))], True),
    ],
    ids=str,
)
def test_the_peers_words(tmp_path: Path, qemu: Qemu, patches: list[tuple[int, bytes]], seal: bool) -> None:
    """Every image that the peer refuses is refused in the same words."""
    path = tmp_path / "disk.vhd"
    damaged(path, *patches, seal=seal)
    words = qemu.error("info", "-f", "vpc", path)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="vpc")
    assert f"Could not open '{path}': {caught.value.peer}" == words


@pytest.mark.parametrize("length", [0, 100, 512, 1000, 1536, 1537])
def test_truncated_images(tmp_path: Path, qemu: Qemu, length: int) -> None:
    """An image cut short is refused in the peer's words."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(build(b"x" * 9 * MIB)[:length])
    words = qemu.error("info", "-f", "vpc", path)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="vpc")
    assert f"Could not open '{path}': {caught.value.peer}" == words


@pytest.mark.parametrize("at", [0, 64])
def test_fixed_images(tmp_path: Path, qemu: Qemu, at: int) -> None:
    """A fixed image with a broken footer is refused in the peer's words."""
    path = tmp_path / "disk.vhd"
    foot = bytearray(footer(MIB, 2))
    foot[at] ^= 1
    path.write_bytes(b"a" * MIB + foot)
    words = qemu.error("info", "-f", "vpc", path)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="vpc")
    assert f"Could not open '{path}': {caught.value.peer}" == words


def test_a_fixed_image_that_lost_bytes(tmp_path: Path) -> None:
    """The footer is not taken for a part of the disk."""
    path = tmp_path / "disk.vhd"
    path.write_bytes(b"a" * 1000 + footer(MIB, 2))
    with pytest.raises(ImageError, match="1048576 bytes has only 1000 bytes"):
        open_node(str(path), format="vpc")


def test_a_wrong_calculation(tmp_path: Path, qemu: Qemu) -> None:
    """An unknown word is named as the peer names it."""
    from vm_core.errors import UsageError

    path = tmp_path / "disk.vhd"
    path.write_bytes(build(bytes(MIB)))
    spec = f"driver=vpc,file.filename={path},force_size_calc=both"
    words = qemu.error("info", "--image-opts", spec)
    with pytest.raises(UsageError) as caught:
        open_node(spec)
    assert words.endswith(str(caught.value))


@pytest.mark.parametrize(
    ("entries", "words"),
    [([0, 4], "sector 0, where metadata is"), ([3, 5], "sector 3, where metadata is"), ([4, 4], "overlapping blocks")],
)
def test_overlaps_are_only_read(tmp_path: Path, entries: list[int], words: str) -> None:
    """A table whose blocks lie on one another or on metadata would spread the damage: not for writing."""
    path = tmp_path / "disk.vhd"
    damaged(path, (1536, struct.pack(">2I", *entries)), data=b"x" * 9 * MIB)
    open_node(str(path)).close()
    with pytest.raises(ImageError, match=words):
        open_node(str(path), readonly=False)


def test_a_table_of_the_same_block_is_refused_at_once(tmp_path: Path) -> None:
    """Millions of entries that all name one place, which a file with a hole holds for nothing, take no memory."""
    path = tmp_path / "disk.vhd"
    damaged(path, (540, u32(8_000_000)))
    with path.open("r+b") as file:
        head = file.read(1536)
        file.truncate(1536)
        file.truncate(1536 + 4 * 8_000_000 + 8 * MIB)
        file.seek(0, 2)
        file.write(head[:512])
    moment = time.process_time()
    with pytest.raises(ImageError, match="names more blocks of 2097152 bytes than the file has room for"):
        open_node(str(path))
    assert time.process_time() - moment < 5


def test_metadata_on_metadata_is_only_read(tmp_path: Path) -> None:
    """A table that lies on the header would be written over it."""
    path = tmp_path / "disk.vhd"
    damaged(path, (528, u64(1024)), (1024, b"\xff" * 20))
    open_node(str(path)).close()
    with pytest.raises(ImageError, match="metadata at sector 2 lies on other metadata"):
        open_node(str(path), readonly=False)
