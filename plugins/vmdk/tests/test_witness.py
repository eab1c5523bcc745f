"""Independent readers that are no QEMU: libvmdk (pyvmdk), and dissect.hypervisor for space-efficient sparse extents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from vmdk_images import ZEROED, cowd, describe, sesparse, stream

from vm_core.block.open import create_image, open_node

MIB = 1 << 20


def libvmdk_read(path: Path, size: int) -> bytes:
    """What libvmdk finds in an image."""
    pyvmdk = pytest.importorskip("pyvmdk", reason="libvmdk-python is not installed")
    handle: Any = pyvmdk.handle()
    handle.open(str(path))
    try:
        handle.open_extent_data_files()
        assert handle.get_media_size() == size
        data: bytes = handle.read_buffer_at_offset(size, 0)
        return data
    finally:
        handle.close()


@pytest.mark.parametrize(
    "options",
    [
        {"subformat": "monolithicSparse"},
        {"subformat": "monolithicFlat", "adapter_type": "lsilogic"},
        {"subformat": "twoGbMaxExtentSparse", "hwversion": "13"},
        {"subformat": "twoGbMaxExtentFlat"},
        {"subformat": "streamOptimized"},
    ],
    ids=lambda options: options["subformat"],
)
def test_libvmdk_reads_what_is_written_here(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every subformat, as this driver makes and fills it."""
    chance = random.Random(1)
    size = 9 * MIB
    path = tmp_path / "disk.vmdk"
    create_image(str(path), "vmdk", size, options)
    model = bytearray(size)
    with open_node(str(path), readonly=False) as node:
        for offset in chance.sample(range(0, size, 65536), 60):
            data = chance.randbytes(1000) * 65 + bytes(536)
            node.pwrite(offset, data)
            model[offset : offset + 65536] = data
    assert libvmdk_read(path, size) == model


def test_libvmdk_reads_the_same_stream(tmp_path: Path) -> None:
    """A stream with its directory at the end."""
    path = tmp_path / "d.vmdk"
    stream(path, 200_000, {n: bytes([n % 251 + 1]) * 65536 for n in range(0, 1560, 97)})
    with open_node(str(path)) as node:
        assert node.pread(0, node.size) == libvmdk_read(path, node.size)


def test_libvmdk_reads_the_same_vmfs_sparse_extent(tmp_path: Path) -> None:
    """An ESXi host sparse extent, before and after writing."""
    cowd(tmp_path / "d-delta.vmdk", 20_000, {n: bytes([n % 251 + 1]) * 512 for n in range(0, 20_000, 997)})
    path = tmp_path / "d.vmdk"
    path.write_text(describe('RW 20000 VMFSSPARSE "d-delta.vmdk"', kind="vmfsSparse"))
    with open_node(str(path)) as node:
        assert node.pread(0, node.size) == libvmdk_read(path, node.size)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(5_000_000, b"new" * 10_000)
        data = node.pread(0, node.size)
    assert data == libvmdk_read(path, len(data))


def test_dissect_reads_the_same_se_sparse_extent(tmp_path: Path) -> None:
    """A space-efficient sparse extent, with more grains than twelve bits can number."""
    disk = pytest.importorskip("dissect.hypervisor.disk.vmdk", reason="dissect.hypervisor is not installed")
    size = 40 * MIB
    grains: dict[int, bytes | int] = {n: n.to_bytes(4, "little") * 1024 for n in range(3, 10_000, 2)}
    grains |= {100: ZEROED}
    sesparse(tmp_path / "d-sesparse.vmdk", size // 512, grains)
    path = tmp_path / "d.vmdk"
    path.write_text(describe(f'RW {size // 512} SESPARSE "d-sesparse.vmdk"', kind="seSparse"))
    witness: Any = disk.VMDK(path)
    with open_node(str(path)) as node:
        assert node.pread(0, size) == witness.read(size)
