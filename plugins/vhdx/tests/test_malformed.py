"""What cannot be read is refused by the peer's exit and, where it has one, sentence; ours names the place."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from vhdx_images import MIB, build, guid, locator, seal

from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError
from vm_core.testing.qemu import Qemu
from vm_vhdx.metadata import read_locator

KIB = 1 << 10
H1, H2, R1, R2 = 64 * KIB, 128 * KIB, 192 * KIB, 256 * KIB
BAT, META = 2 * MIB, 3 * MIB
ITEMS = META + 64 * KIB


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def both(at: int, value: bytes) -> list[tuple[int, bytes]]:
    """The same in both headers, or both region tables."""
    second = H2 if at < R1 else R2
    return [(at, value), (at - (H1 if at < R1 else R1) + second, value)]


def damaged(path: Path, patches: list[tuple[int, bytes]], *, sealing: bool = True) -> None:
    """A new image of 10 MiB with bytes replaced, and its check sums right unless told otherwise."""
    create_image(str(path), "vhdx", 10 * MIB)
    data = bytearray(path.read_bytes())
    for at, value in patches:
        data[at : at + len(value)] = value
    if sealing:
        for at, length in ((H1, 4 * KIB), (H2, 4 * KIB), (R1, 64 * KIB), (R2, 64 * KIB)):
            seal(data, at, length)
    path.write_bytes(data)


REFUSED = [
    [(0, b"x")],
    both(H1 + 66, u16(2)),
    both(H1 + 64, u16(1)),
    both(H1 + 72, u64(4096)),
    both(H1 + 72, u64(2 * MIB)),
    both(R1, b"x"),
    both(R1 + 8, u32(2048)),
    both(R1 + 8, u32(0)),
    both(R1 + 8, u32(1)),
    both(R1 + 16, b"x"),
    [*both(R1 + 48, b"x"), *both(R1 + 48 + 28, u32(1))],
    [*both(R1 + 8, u32(3)), *both(R1 + 80, b"x" * 16 + u64(6 * MIB) + u32(MIB) + u32(1))],
    both(R1 + 32, u64(3 * MIB)),
    both(R1 + 32, u64(2 * MIB + 512)),
    both(R1 + 40, u32(0)),
    [(META, b"x")],
    [(META + 10, u16(4))],
    [(META + 10, u16(0xFFFF))],
    [(META + 32, b"x")],
    [(META + 48, u32(1 << 30))],
    [(ITEMS, u32(0))],
    [(ITEMS, u32(3 * MIB))],
    [(ITEMS, u32(512 * MIB))],
    [(ITEMS + 4, u32(2))],
    [(ITEMS + 8, u64(65 << 40))],
    [(ITEMS + 8, u64(1 << 63))],
    [(ITEMS + 8, u64(2 << 40))],
    [(ITEMS + 32, u32(1024))],
    [(ITEMS + 32, u32(0))],
    [(BAT, u64(6))],
    [(BAT, u64(8 * MIB | 6))],
    [(BAT, u64(7 * MIB | 6))],
    [(BAT, u64(1 << 50 | 6))],
    [(BAT, u64((1 << 64) - MIB | 6))],
]


@pytest.mark.parametrize("patches", REFUSED, ids=str)
def test_what_the_peer_refuses(tmp_path: Path, qemu: Qemu, patches: list[tuple[int, bytes]]) -> None:
    """Each is refused here too, in the peer's last words; where it says more before, ours contain that."""
    path = tmp_path / "disk.vhdx"
    damaged(path, patches)
    *before, words = qemu.error("info", "-f", "vhdx", path).split("\n")
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="vhdx")
    assert f"Could not open '{path}': {caught.value.peer}" == words.removeprefix("qemu-img: ")
    assert caught.value.reason
    if before and "overlaps" not in before[0]:
        assert caught.value.reason == before[0]


@pytest.mark.parametrize("at", [H1, H2, R1])
def test_one_broken_copy_is_not_enough(tmp_path: Path, at: int) -> None:
    """Of headers and region tables the other copy is used."""
    path = tmp_path / "disk.vhdx"
    damaged(path, [(at + 5, b"xyz")], sealing=False)
    with open_node(str(path)) as node:
        assert node.size == 10 * MIB


def test_no_header_is(tmp_path: Path, qemu: Qemu) -> None:
    """With both headers broken there is nothing to go by."""
    path = tmp_path / "disk.vhdx"
    damaged(path, both(H1 + 5, b"xyz"), sealing=False)
    words = qemu.error("info", "-f", "vhdx", path)
    with pytest.raises(ImageError) as caught:
        open_node(str(path))
    assert f"Could not open '{path}': {caught.value.peer}" == words


@pytest.mark.parametrize("length", [0, 10, 64 * KIB, 70_000, 128 * KIB, 200_000, MIB, 2 * MIB, 2 * MIB + 5, 3 * MIB])
def test_truncated_images(tmp_path: Path, qemu: Qemu, length: int) -> None:
    """An image cut short is refused."""
    path = tmp_path / "disk.vhdx"
    create_image(str(path), "vhdx", 10 * MIB)
    path.write_bytes(path.read_bytes()[:length])
    qemu.error("info", "-f", "vhdx", path)
    with pytest.raises(ImageError):
        open_node(str(path), format="vhdx")


@pytest.mark.parametrize(
    "patches",
    [
        [],
        [(BAT, u64(6))],
        [(BAT, u64(8 * MIB | 6)), (BAT + 8, u64(9 * MIB | 6))],
        [(BAT, u64(7 * MIB | 6))],
        [(BAT, u64(MIB | 6))],
        [(BAT, u64((1 << 64) - MIB | 6))],
        [(BAT, u64(1 << 50 | 6))],
    ],
    ids=str,
)
def test_check_tells_what_the_peer_tells(tmp_path: Path, qemu: Qemu, patches: list[tuple[int, bytes]]) -> None:
    """The same errors in the same words."""
    path = tmp_path / "disk.vhdx"
    damaged(path, patches)
    theirs = qemu.check(path)
    from vm_core.block.open import OpenContext
    from vm_vhdx.image import Vhdx

    with open_node({"driver": "file", "filename": str(path)}) as file:
        context = OpenContext(filename=str(path))
        context.check = True  # type: ignore[attr-defined, unused-ignore]
        found = Vhdx.open(file, {}, context).check()
    assert found.get("corruptions", 0) == theirs.get("corruptions", 0)
    lines = [line.removeprefix("qemu-img: ") for line in theirs["text"].splitlines() if "VHDX" in line]
    assert found["reports"] == lines


def test_blocks_on_one_another_are_only_read(tmp_path: Path) -> None:
    """Two blocks in one place would spread damage when written."""
    data = bytearray(build(b"a" * MIB + b"b" * MIB))
    entry = data[3 * MIB : 3 * MIB + 8]
    data[3 * MIB + 8 : 3 * MIB + 16] = entry
    path = tmp_path / "disk.vhdx"
    path.write_bytes(data)
    with open_node(str(path)) as node:
        assert node.format.check()["corruptions"] == 1  # type: ignore[attr-defined]
    with pytest.raises(ImageError, match="lies on block"):
        open_node(str(path), readonly=False)


@pytest.mark.parametrize("state", [4, 5, 7])
def test_states_that_mean_nothing(tmp_path: Path, state: int) -> None:
    """Such a block cannot be read or written; the others can."""
    data = bytearray(build(b"a" * MIB + b"b" * MIB))
    data[3 * MIB] = data[3 * MIB] & ~7 | state
    path = tmp_path / "disk.vhdx"
    path.write_bytes(data)
    with open_node(str(path), readonly=False) as node:
        assert node.pread(MIB, 4) == b"bbbb"
        with pytest.raises(OSError, match=f"state {state}"):
            node.pread(0, 4)
        with pytest.raises(OSError, match=f"state {state}"):
            node.pwrite(0, b"x")


def test_unknown_things_that_are_not_required(tmp_path: Path) -> None:
    """Regions and items that need not be understood are passed over."""
    path = tmp_path / "disk.vhdx"
    extra = guid("12345678-1234-1234-1234-123456789abc")
    patches = [*both(R1 + 8, u32(3)), *both(R1 + 80, extra + u64(6 * MIB) + u32(MIB) + u32(0))]
    patches += [(META + 10, u16(6)), (META + 32 + 5 * 32, extra + u32(0x11000) + u32(4) + u32(1) + u32(0))]
    damaged(path, patches)
    with open_node(str(path)) as node:
        assert node.size == 10 * MIB


def test_a_locator_whose_values_lie_on_one_another(tmp_path: Path) -> None:
    """A megabyte that unfolds to gigabytes of names is refused before."""
    pairs = {"parent_linkage": "{x}", "relative_path": ".\\base.vhdx"}
    entry = struct.pack("<IIHH", 512 * KIB, 512 * KIB, 0xFFFE, 0xFFFE)
    data = bytearray(locator(pairs)[:18] + struct.pack("<H", 40_000) + entry * 40_000)
    assert read_locator(locator(pairs), "x") == pairs
    with pytest.raises(ImageError, match="lie on one another"):
        read_locator(bytes(data.ljust(MIB, b"a")), "x")
