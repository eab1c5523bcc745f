"""Extents and images of kinds that other programs write."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from vmdk_images import UNMAPPED, ZEROED, cowd, describe, sesparse, stream

from vm_core.block.gate import Gate
from vm_core.block.mapping import Kind
from vm_core.block.node import Node
from vm_core.block.open import open_node
from vm_core.errors import BlockError, ImageError
from vm_core.testing.qemu import LONG, Qemu

KIB, MIB = 1 << 10, 1 << 20


def opened(path: Path, *, readonly: bool = True) -> Node:
    return open_node(str(path), format="vmdk", readonly=readonly)


@pytest.mark.parametrize("grain_sectors", [1, 16])
def test_vmfs_sparse(tmp_path: Path, qemu: Qemu, grain_sectors: int) -> None:
    """An ESXi host sparse extent reads as the peer reads it; what is written there the peer reads."""
    chance = random.Random(grain_sectors)
    size = 4096 * grain_sectors * 512 * 3 + 7 * 512
    grain = grain_sectors * 512
    grains = {number: chance.randbytes(grain) for number in (0, 1, 2, 5000, 9000, 12288)}
    cowd(tmp_path / "d-delta.vmdk", size // 512, grains, grain_sectors)
    path = tmp_path / "d.vmdk"
    path.write_text(describe(f'RW {size // 512} VMFSSPARSE "d-delta.vmdk"', kind="vmfsSparse"))
    model = bytearray(-(-size // grain) * grain)
    for number, data in grains.items():
        model[number * grain : (number + 1) * grain] = data
    model = model[:size]
    assert qemu.read(path) == model
    with opened(path) as node:
        assert node.pread(0, size) == model
        assert node.cluster_size == grain
    with opened(path, readonly=False) as node:
        for _ in range(200 if LONG else 60):
            length = chance.randrange(1, 20_000)
            offset = chance.randrange(size - length)
            data = chance.randbytes(length)
            node.pwrite(offset, data)
            model[offset : offset + length] = data
            if chance.random() < 0.1:
                node.flush()
        assert node.pread(0, size) == model
    assert qemu.read(path) == model
    qemu.sound(path)
    free = int.from_bytes((tmp_path / "d-delta.vmdk").read_bytes()[28:32], "little")
    assert free == (tmp_path / "d-delta.vmdk").stat().st_size // 512, "the next free sector is where the file ends"


def test_grain_tables_of_vmfs_sparse_extents_are_made_when_needed(tmp_path: Path, qemu: Qemu) -> None:
    """A delta disk that holds nothing has no grain tables; writing makes them."""
    size = 20 * MIB
    cowd(tmp_path / "d-delta.vmdk", size // 512, {}, 1)
    path = tmp_path / "d.vmdk"
    path.write_text(describe(f'RW {size // 512} VMFSSPARSE "d-delta.vmdk"', kind="vmfsSparse"))
    model = bytearray(size)
    with opened(path, readonly=False) as node:
        for offset in (0, 3 * MIB, 19 * MIB + 100, 5):
            node.pwrite(offset, b"data" * 3000)
            model[offset : offset + 12000] = b"data" * 3000
        assert node.pread(0, size) == model
    assert qemu.read(path) == model
    qemu.sound(path)


def test_se_sparse(tmp_path: Path, qemu: Qemu) -> None:
    """Space-efficient sparse extents read as the peer reads them, and are never written."""
    chance = random.Random(1)
    size = 40 * MIB + 4096
    grains: dict[int, bytes | int] = {n: chance.randbytes(4096) for n in (0, 1, 2, 3, 700, 4095, 4096, 9000, 10240)}
    grains |= {10: ZEROED, 11: ZEROED, 12: UNMAPPED, 8200: ZEROED}
    # More grains than twelve bits can number.
    grains |= {n: n.to_bytes(4, "little") * 1024 for n in range(5000, 8200 if not LONG else 9000) if n not in grains}
    sesparse(tmp_path / "d-sesparse.vmdk", size // 512, grains)
    path = tmp_path / "d.vmdk"
    path.write_text(describe(f'RW {size // 512} SESPARSE "d-sesparse.vmdk"', kind="seSparse"))
    model = bytearray(size)
    for number, data in grains.items():
        if isinstance(data, bytes):
            model[number * 4096 : (number + 1) * 4096] = data
    with opened(path) as node:
        assert node.pread(0, size) == model
        kinds = {run.offset: (run.kind, run.length) for run in node.map(0, size)}
        assert kinds[0] == (Kind.DATA, 16384)
        assert kinds[40960] == (Kind.ZERO, 12288)
        ours = node.info()
    assert qemu.read(path) == model
    theirs = qemu.info(path)["format-specific"]["data"]
    assert ours == theirs
    with pytest.raises(ImageError, match="No write support for seSparse images available"):
        opened(path, readonly=False)


@pytest.mark.parametrize("version", [1, 3])
def test_streams_with_a_footer(tmp_path: Path, qemu: Qemu, version: int) -> None:
    """A stream whose directory stands at its end, as VMware's tools write them, reads as the peer reads it."""
    chance = random.Random(version)
    sectors = 3 * 512 * 128 + 1000
    grains = {n: chance.randbytes(300) * 218 + bytes(136) for n in (0, 1, 2, 511, 1024, 1100, 1536, 1540)}
    grains = {n: data[:65536] for n, data in grains.items()}
    path = tmp_path / "d.vmdk"
    stream(path, sectors, grains, version=version)
    model = bytearray(sectors * 512 + 65536)
    for number, data in grains.items():
        model[number * 65536 : (number + 1) * 65536] = data
    model = model[: sectors * 512]
    with opened(path) as node:
        assert node.pread(0, node.size) == model
        assert node.info()["extents"][0]["compressed"] is True
    assert qemu.read(path) == model


def _row(folder: Path, qemu: Qemu, chance: random.Random, sparse: int) -> tuple[Path, int]:
    """An image of four extents of which no two start at multiples of the same grain; *sparse* sectors in one."""
    (folder / "a.bin").write_bytes(chance.randbytes(300 * 512))
    (folder / "b.bin").write_bytes(chance.randbytes(77 * 512))
    qemu.create(folder / "s.vmdk", sparse * 512, {"subformat": "twoGbMaxExtentSparse"})
    qemu.create(folder / "z.vmdk", 640 * 512, {"subformat": "twoGbMaxExtentSparse", "zeroed_grain": True})
    path = folder / "d.vmdk"
    lines = (
        'RW 100 FLAT "a.bin" 55',
        f'RW {sparse} SPARSE "s-s001.vmdk"',
        'RW 77 VMFS "b.bin"',
        'RW 640 SPARSE "z-s001.vmdk"',
    )
    path.write_text(describe("\n".join(lines)))
    return path, (100 + sparse + 77 + 640) * 512


def _change(path: Path, model: bytearray, chance: random.Random) -> None:
    size = len(model)
    with opened(path, readonly=False) as node:
        for _ in range(5):
            length = chance.randrange(1, 200_000)
            offset = chance.randrange(size - length)
            data = chance.randbytes(length) if chance.random() < 0.7 else bytes(length)
            if any(data):
                node.pwrite(offset, data)
            else:
                node.zero(offset, length, unmap=True)
            model[offset : offset + length] = data
        assert node.pread(0, size) == model


def test_all_extents_in_one_image(tmp_path: Path, qemu: Qemu) -> None:
    """FLAT at an offset, VMFS and SPARSE in a row: as the peer reads and writes."""
    chance = random.Random(9)
    path, size = _row(tmp_path, qemu, chance, 1024)
    with opened(path) as node:
        model = bytearray(node.pread(0, size))
        assert node.size == size
        assert node.info() == qemu.info(path)["format-specific"]["data"]
    assert qemu.read(path) == model
    for _ in range(200 if LONG else 20):
        if chance.random() < 0.5:
            _change(path, model, chance)
        else:
            length = chance.randrange(1, 400) * 512
            offset = chance.randrange(size - length) // 512 * 512
            qemu.io(path, f"write -P 170 {offset} {length}")
            model[offset : offset + length] = b"\xaa" * length
        assert qemu.read(path) == model
    qemu.sound(path)


def test_an_extent_that_ends_within_a_grain(tmp_path: Path, qemu: Qemu) -> None:
    """The next extent begins where the descriptor says, whatever is left of the last grain.

    (The peer reads the next extent's first sectors as part of that grain.)
    """
    chance = random.Random(3)
    path, size = _row(tmp_path, qemu, chance, 1001)
    with opened(path) as node:
        model = bytearray(node.pread(0, size))
    start = (100 + 1001) * 512
    assert model[start : start + 77 * 512] == (tmp_path / "b.bin").read_bytes()
    for _ in range(200 if LONG else 20):
        _change(path, model, chance)
    with opened(path) as node:
        assert node.pread(0, size) == model
    assert model[start : start + 77 * 512] == (tmp_path / "b.bin").read_bytes()
    qemu.sound(path)


def test_zero_extents_and_read_only_extents(tmp_path: Path) -> None:
    """ZERO extents are zeroes; RDONLY and ZERO ones take no writes; NOACCESS ones are not read. (QEMU has neither.)"""
    (tmp_path / "a.bin").write_bytes(b"A" * 64 * KIB)
    (tmp_path / "b.bin").write_bytes(b"B" * 64 * KIB)
    path = tmp_path / "d.vmdk"
    path.write_text(
        describe('RW 128 FLAT "a.bin" 0\nRW 128 ZERO\nRDONLY 128 FLAT "b.bin" 0\nNOACCESS 128 FLAT "c.bin" 0')
    )
    with opened(path, readonly=False) as node:
        assert node.size == 256 * KIB
        assert node.pread(0, 192 * KIB) == b"A" * 65536 + bytes(65536) + b"B" * 65536
        node.pwrite(100, b"x")
        for offset in (64 * KIB, 128 * KIB, 192 * KIB - 1):
            with pytest.raises(BlockError):
                node.pwrite(offset, b"x")
        with pytest.raises(BlockError):
            node.pread(192 * KIB, 1)
    assert (tmp_path / "a.bin").read_bytes()[100:101] == b"x"


def test_raw_devices_are_refused_by_name(tmp_path: Path) -> None:
    """A raw device mapping is not opened, whatever the policy."""
    path = tmp_path / "d.vmdk"
    path.write_text(describe('RW 128 VMFSRDM "d-rdm.vmdk"', kind="vmfs"))
    with pytest.raises(ImageError, match=r"VMFSRDM .* is not supported"):
        open_node(str(path), gate=Gate.follow())
    path.write_text(describe('RW 128 VMFSRDM "d-rdm.vmdk"', kind="vmfsRawDeviceMap"))
    with pytest.raises(ImageError, match="Unsupported image type 'vmfsRawDeviceMap'"):
        open_node(str(path))
