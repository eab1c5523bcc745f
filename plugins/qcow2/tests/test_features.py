"""Feature bits, header extensions, snapshots, dirty and corrupt images: what others put into an image is respected."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError, PluginError
from vm_core.testing.qemu import Qemu

KIB, MIB = 1 << 10, 1 << 20


def patch(path: Path, offset: int, code: str, *values: object) -> None:
    """Overwrite fields."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(code, *values))


def field(path: Path, offset: int, code: str) -> int:
    """Read a field."""
    with path.open("rb") as file:
        file.seek(offset)
        return int(struct.unpack(code, file.read(struct.calcsize(code)))[0])


@pytest.fixture
def image(tmp_path: Path, qemu: Qemu) -> Path:
    """16 MiB, the first one full of 7."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 16 * MIB)
    qemu.io(path, "write -P 7 0 1M")
    return path


def test_unknown_incompatible_bit_is_refused_by_the_images_own_name_for_it(image: Path) -> None:
    """The feature name table says what an unknown bit is called."""
    table = field(image, 116, ">I")
    assert table % 48 == 0
    patch(image, 112 + 8 + 48, ">BB46s", 0, 7, b"time travel")
    patch(image, 72, ">Q", 1 << 7)
    with pytest.raises(ImageError, match="time travel") as caught:
        open_node(str(image))
    assert str(image) in str(caught.value)
    patch(image, 72, ">Q", 1 << 9)
    with pytest.raises(ImageError, match="Unknown incompatible feature: 200"):
        open_node(str(image))


def test_autoclear_bits_are_cleared_for_writing_only(image: Path) -> None:
    """Features that whoever does not know them must reset are reset when the image is opened for writing."""
    patch(image, 88, ">Q", 1 << 5)
    open_node(str(image)).close()
    assert field(image, 88, ">Q") == 1 << 5
    open_node(str(image), readonly=False).close()
    assert field(image, 88, ">Q") == 0


def test_unknown_header_extension_is_kept(image: Path, qemu: Qemu) -> None:
    """Writing an image leaves header extensions alone that nobody here knows."""
    end = 112 + 8 + field(image, 116, ">I")
    patch(image, end, ">II8sII", 0x12345678, 8, b"whatever", 0, 0)
    with open_node(str(image), readonly=False) as node:
        node.pwrite(5 * MIB, b"x" * MIB)
        node.truncate(9000 * MIB)
    with image.open("rb") as file:
        file.seek(end)
        assert file.read(16) == struct.pack(">II8s", 0x12345678, 8, b"whatever")
    qemu.sound(image)


def test_dirty_image_is_repaired_when_opened_for_writing(tmp_path: Path, qemu: Qemu) -> None:
    """After a crash with lazy refcounts the refcounts are counted anew; reading alone changes nothing."""
    path = tmp_path / "disk.qcow2"
    create_image(str(path), "qcow2", 16 * MIB, {"lazy_refcounts": "on"})
    node = open_node(str(path), readonly=False)
    node.pwrite(0, b"\7" * MIB)
    node.flush()
    crashed = tmp_path / "crashed.qcow2"
    crashed.write_bytes(path.read_bytes())
    node.close()
    assert field(path, 72, ">Q") == 0
    qemu.sound(path)
    assert field(crashed, 72, ">Q") == 1
    assert qemu.check(crashed)["corruptions"] > 0
    before = crashed.read_bytes()
    with open_node(str(crashed)) as node:
        assert node.pread(0, MIB) == b"\7" * MIB
    assert crashed.read_bytes() == before
    with open_node(str(crashed), readonly=False) as node:
        assert node.pread(0, MIB) == b"\7" * MIB
    assert field(crashed, 72, ">Q") == 0
    qemu.sound(crashed)


def test_image_that_the_peer_left_dirty_is_repaired(tmp_path: Path, qemu: Qemu) -> None:
    """qemu-io killed in the middle leaves an image that is mended here."""
    import subprocess

    path = tmp_path / "disk.qcow2"
    qemu.create(path, 16 * MIB, {"lazy_refcounts": "on"})
    subprocess.run(
        [str(qemu.io_path), "-c", "write -P 9 0 1M", "-c", "flush", "-c", "sigraise 9", str(path)], capture_output=True
    )
    assert field(path, 72, ">Q") == 1
    with open_node(str(path), readonly=False) as node:
        assert node.pread(0, 2 * MIB) == b"\x09" * MIB + bytes(MIB)
        node.pwrite(8 * MIB, b"x" * MIB)
    qemu.sound(path)


def test_corrupt_image_is_read_but_not_written(image: Path) -> None:
    """The corrupt bit forbids writing."""
    patch(image, 72, ">Q", 2)
    with open_node(str(image)) as node:
        assert node.pread(0, MIB) == b"\7" * MIB
    with pytest.raises(ImageError, match="corrupt"):
        open_node(str(image), readonly=False)


def test_write_that_would_hit_metadata_marks_the_image_corrupt(
    image: Path, qemu: Qemu, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cluster of refcount 0 that is a table in truth is not given out; from then on nothing is written."""
    blocks = field(image, field(image, 48, ">Q"), ">Q")
    patch(image, blocks, ">40s", bytes(40))
    node = open_node(str(image), readonly=False)
    before = image.read_bytes()[512:]
    with pytest.raises(BlockError, match="overlaps with qcow2_header"):
        node.pwrite(8 * MIB, b"x" * 65536)
    assert "qcow2: Marking image as corrupt: Preventing invalid write on metadata" in capfd.readouterr().err
    for act in (lambda: node.pwrite(0, b"x" * 65536), lambda: node.pread(0, 512), node.flush):
        with pytest.raises(BlockError, match="No medium found"):
            act()
    node.close()
    assert image.read_bytes()[512:] == before
    assert field(image, 72, ">Q") == 2
    patch(image, 72, ">Q", 0)
    qemu.img("check", "-r", "all", image, ok=(0, 2, 3))
    assert qemu.read(image) == b"\7" * MIB + bytes(15 * MIB)


def test_data_in_place_over_metadata_is_not_written(image: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An L2 entry that points at the refcount table does not let a guest write there."""
    l2 = field(image, field(image, 40, ">Q"), ">Q") & ~(1 << 63)
    table = field(image, 48, ">Q")
    patch(image, l2, ">Q", 1 << 63 | table)
    node = open_node(str(image), readonly=False)
    with pytest.raises(BlockError, match="refcount table"):
        node.pwrite(0, b"x" * 65536)
    node.close()
    assert field(image, table, ">Q") == 2 << 16
    assert "overlaps with refcount table" in capfd.readouterr().err


def test_snapshots_keep_what_they_hold(image: Path, qemu: Qemu) -> None:
    """Overwriting, zeroing and discarding leave internal snapshots as they were, with refcounts to match."""
    qemu.img("snapshot", "-c", "one", image)
    with open_node(str(image), readonly=False) as node:
        assert [one.name for one in node.format.snapshot_table.entries] == ["one"]  # type: ignore[attr-defined]
        node.pwrite(100, b"x" * 100_000)
        node.zero(256 * 1024, 256 * 1024)
        node.discard(512 * 1024, 256 * 1024)
    qemu.sound(image)
    qemu.img("snapshot", "-c", "two", image)
    with open_node(str(image), readonly=False) as node:
        node.pwrite(0, b"y" * MIB)
        found = node.format.check()  # type: ignore[attr-defined]
        assert not found.get("leaks")
        assert not found.get("corruptions")
    qemu.sound(image)
    qemu.img("snapshot", "-a", "two", image)
    expected = bytearray(b"\7" * MIB)
    expected[100:100_100] = b"x" * 100_000
    expected[256 * 1024 : 768 * 1024] = bytes(512 * 1024)
    assert qemu.read(image)[:MIB] == expected
    qemu.img("snapshot", "-a", "one", image)
    assert qemu.read(image) == b"\7" * MIB + bytes(15 * MIB)
    qemu.sound(image)


def test_discard_gives_space_back_to_the_host(image: Path) -> None:
    """What the guest discards is a hole in the file once that is flushed, unless the option says otherwise."""
    for give, expected in ((True, True), (False, False)):
        path = image.with_name(f"copy{give}.qcow2")
        path.write_bytes(image.read_bytes())
        before = path.stat().st_blocks
        options = {"driver": "qcow2", "file.filename": str(path), "pass-discard-request": "on" if give else "off"}
        with open_node(options, readonly=False) as node:
            node.discard(0, MIB)
            node.flush()
            assert (path.stat().st_blocks <= before - MIB // 512) is expected
            assert node.pread(0, MIB) == bytes(MIB)


def test_freed_clusters_are_the_first_to_be_used_again(image: Path) -> None:
    """What the guest discards makes room for new data, which waits for the table that held it to be stable."""
    with open_node(str(image), readonly=False) as node:
        size = image.stat().st_size
        node.discard(0, MIB)
        table = field(image, field(image, 40, ">Q"), ">Q") & ~(1 << 63)
        assert field(image, table, ">Q") & 1 == 0
        node.pwrite(4 * MIB, b"n" * MIB)
        assert image.stat().st_size == size
        # On disk the former place says that there is nothing before anything new is written to the clusters.
        assert field(image, table, ">Q") == 1


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters(tmp_path: Path, qemu: Qemu, kind: str) -> None:
    """Compressed clusters are read in any pieces, and become ordinary ones where they are written to."""
    data = b"".join(bytes([n % 251]) * 777 for n in range(3000))
    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(data)
    qemu.img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, path)
    size = -(-len(data) // 512) * 512
    model = bytearray(data.ljust(size, b"\0"))
    with open_node(str(path), readonly=False) as node:
        assert node.pread(0, size) == model
        for offset, length in ((0, 1), (65535, 2), (100_000, 200_000), (size - 700, 700)):
            assert node.pread(offset, length) == model[offset : offset + length]
        node.pwrite(70_000, b"x" * 100_000)
        model[70_000:170_000] = b"x" * 100_000
        assert node.pread(0, size) == model
    assert qemu.read(path) == model
    qemu.sound(path)


def test_zstd_without_its_package_says_what_to_install(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a zstd cluster without the package names the extra to install."""
    from vm_qcow2 import compression

    raw, path = tmp_path / "raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"a" * 65536)
    qemu.img("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", raw, path)
    compression._zstandard.cache_clear()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with (
        open_node(str(path)) as node,
        pytest.raises((BlockError, PluginError), match=r"pip install 'vm-qcow2\[zstd\]'"),
    ):
        node.pread(0, 512)
    compression._zstandard.cache_clear()


def test_backing_file_shows_through_until_it_is_hidden(tmp_path: Path, qemu: Qemu) -> None:
    """Unallocated clusters read from the backing image; zeroes, discards and growth hide it."""
    base, path = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu.create(base, 4 * MIB)
    qemu.io(base, "write -P 5 0 4M")
    create_image(str(path), "qcow2", MIB + 512, {"backing_file": "base.qcow2", "backing_fmt": "qcow2"})
    model = bytearray(b"\5" * (MIB + 512))
    with open_node(str(path), readonly=False) as node:
        assert node.pread(0, node.size) == model
        node.pwrite(10, b"x")
        node.zero(65536, 65536)
        node.discard(131072, 65536)
        model[10:11] = b"x"
        model[65536:196608] = bytes(131072)
        assert node.pread(0, node.size) == model
        node.truncate(5 * MIB)
        model.extend(bytes(5 * MIB - len(model)))
        assert node.pread(0, node.size) == model
    assert qemu.read(path) == model
    qemu.sound(path)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_sizes_change_both_ways(tmp_path: Path, qemu: Qemu, compat: str) -> None:
    """What was cut off does not come back when an image grows again; the L1 table moves when it has to."""
    path = tmp_path / "disk.qcow2"
    create_image(str(path), "qcow2", MIB, {"cluster_size": 512, "compat": compat})
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"x" * MIB)
        node.truncate(300 * 512 + 512)
        node.truncate(8 * MIB)
        expected = b"x" * (301 * 512) + bytes(8 * MIB - 301 * 512)
        assert node.pread(0, 8 * MIB) == expected
        node.pwrite(8 * MIB - 1, b"e")
    assert qemu.read(path) == expected[:-1] + b"e"
    qemu.sound(path)


def test_bytes_cut_off_do_not_come_back_in_the_peer(image: Path, qemu: Qemu) -> None:
    """What shrinking leaves of the last cluster is cleared: the peer would show it again after growing the image."""
    with open_node(str(image), readonly=False) as node:
        node.truncate(100 * KIB)
    qemu.img("resize", "-q", "-f", "qcow2", image, "1M")
    assert qemu.read(image) == b"\7" * (100 * KIB) + bytes(MIB - 100 * KIB)
