"""What cannot be read is refused in the peer's words, or in one line that names the place."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from vdi_images import build

from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError
from vm_core.testing.qemu import Qemu

MIB = 1 << 20


def damaged(path: Path, *patches: tuple[int, bytes]) -> None:
    """A new image of 10 MiB with bytes replaced."""
    create_image(str(path), "vdi", 10 * MIB)
    data = bytearray(path.read_bytes())
    for at, value in patches:
        data[at : at + len(value)] = value
    path.write_bytes(data)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


@pytest.mark.parametrize(
    "patches",
    [
        [(64, b"abcd")],
        [(68, u32(0x10000))],
        [(68, u32(0x20003))],
        [(340, u32(513))],
        [(344, u32(1025))],
        [(360, u32(1024))],
        [(376, u32(0))],
        [(376, u32(0x30000))],
        [(368, u64(11 * MIB))],
        [(368, u64(1 << 62))],
        [(368, u64(1 << 63))],
        [(384, u32(0xFFFFFFFF))],
        [(384, u32(0x1FFFFFFF))],
        [(384, u32(9))],
        [(64, b"abcd"), (68, u32(7))],
        [(64, b"abcd"), (368, u64(1 << 62))],
        [(340, u32(513)), (360, u32(7))],
    ],
    ids=str,
)
def test_the_peers_words(tmp_path: Path, qemu: Qemu, patches: list[tuple[int, bytes]]) -> None:
    """Every header that the peer refuses is refused in the same words."""
    path = tmp_path / "disk.vdi"
    damaged(path, *patches)
    words = qemu.error("info", "-f", "vdi", path)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="vdi")
    assert f"Could not open '{path}': {caught.value.reason}" == words


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ([(380, u32(512))], "512 extra bytes"),
    ],
    ids=str,
)
def test_our_own_words(tmp_path: Path, patches: list[tuple[int, bytes]], words: str) -> None:
    """What the peer does not look at is named with its place."""
    path = tmp_path / "disk.vdi"
    damaged(path, *patches)
    with pytest.raises(ImageError, match=words):
        open_node(str(path), format="vdi")


@pytest.mark.parametrize(
    ("patches", "words"),
    [
        ([(340, u32(0))], "block map at 0x0 lies in the header"),
        ([(344, u32(512))], "data at 0x200 begins before the block map's end at 0x228"),
    ],
    ids=str,
)
def test_what_lies_on_something_else_is_only_read(tmp_path: Path, patches: list[tuple[int, bytes]], words: str) -> None:
    """Writing there would spread the damage."""
    path = tmp_path / "disk.vdi"
    damaged(path, *patches)
    open_node(str(path)).close()
    with pytest.raises(ImageError, match=words):
        open_node(str(path), readonly=False)


def test_a_block_map_that_is_cut_off(tmp_path: Path) -> None:
    """What there is of it is read, like the peer does; nothing else, and nothing is written."""
    path = tmp_path / "disk.vdi"
    damaged(path, (384, u32(0x1FFFFF80)), (344, u32(0x80000000)), (368, u64(0x1FFFFF8000000)))
    with open_node(str(path)) as node:
        assert node.size == 0x1FFFFF8000000
        assert node.pread(0, 512) == bytes(512)
        with pytest.raises(OSError, match=r"\(536870784 entries\) reaches past the end of the file"):
            node.pread(1 << 40, 512)
        found = node.format.check()  # type: ignore[attr-defined]
        assert "block map ends at index 128" in found["messages"][-2]
    with pytest.raises(ImageError, match="open it read-only"):
        open_node(str(path), readonly=False)


@pytest.mark.parametrize(
    ("patches", "writable"),
    [
        ([], True),
        ([(388, u32(100))], True),
        ([(512, u32(0)), (516, u32(0)), (388, u32(2))], False),
        ([(512, u32(50))], False),
        ([(512, u32(50)), (520, u32(3)), (528, u32(3)), (532, u32(0xFFFFFFFE))], False),
    ],
    ids=str,
)
def test_check_tells_what_the_peer_tells(
    tmp_path: Path, qemu: Qemu, patches: list[tuple[int, bytes]], writable: bool
) -> None:
    """The same errors in the same words; and what would spread the damage is only read."""
    path = tmp_path / "disk.vdi"
    damaged(path, *patches)
    theirs = qemu.check(path)
    with open_node(str(path)) as node:
        found = node.format.check()  # type: ignore[attr-defined]
    assert found.get("corruptions", 0) == theirs.get("corruptions", 0)
    assert found["check-errors"] == theirs["check-errors"]
    assert [line for line in theirs["text"].splitlines() if line.startswith("ERROR")] == found["messages"]
    if writable:
        open_node(str(path), readonly=False).close()
    else:
        with pytest.raises(ImageError, match="read-only"):
            open_node(str(path), readonly=False)


def test_a_wrong_count_does_not_hand_out_a_block_twice(tmp_path: Path, qemu: Qemu) -> None:
    """New blocks go behind the last one that is in use, whatever the header says, which is put right by that."""
    path = tmp_path / "disk.vdi"
    create_image(str(path), "vdi", 10 * MIB)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"a" * 2 * MIB)
    data = bytearray(path.read_bytes())
    data[388:392] = u32(0)
    path.write_bytes(data)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(5 * MIB, b"b" * MIB)
        assert node.pread(0, 2 * MIB) == b"a" * 2 * MIB
    qemu.sound(path)


def test_a_truncated_file_is_an_error_where_it_is_read(tmp_path: Path) -> None:
    """A block that lies past the end of the file is not silently zeroes."""
    path = tmp_path / "disk.vdi"
    path.write_bytes(build(b"x" * 3 * MIB)[: MIB + 1024])
    with open_node(str(path)) as node:
        failures = 0
        for index in range(3):
            try:
                node.pread(index * MIB, 512)
            except OSError as error:
                assert "lies outside the file" in str(error)  # noqa: PT017 - two of three
                failures += 1
        assert failures == 2


def test_a_map_of_the_same_block_is_refused_at_once(tmp_path: Path) -> None:
    """Millions of entries that all name one block, which a file with a hole holds for nothing, take no memory."""
    path = tmp_path / "disk.vdi"
    create_image(str(path), "vdi", 100 << 20)
    count = 8_000_000
    head = bytearray(path.read_bytes()[:512])
    struct.pack_into("<I", head, 344, 512 + 4 * count)
    struct.pack_into("<I", head, 384, count)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(512 + 4 * count + (4 << 20))
    open_node(str(path)).close()
    moment = time.process_time()
    with pytest.raises(ImageError, match=r"names more blocks than the file has room for \(4\)"):
        open_node(str(path), readonly=False)
    assert time.process_time() - moment < 5
