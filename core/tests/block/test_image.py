"""The Python API: vm_core.open and vm_core.create."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vm_core

K = 1024


def test_like_a_binary_file(tmp_path: Path) -> None:
    """Reading, writing, seeking, wrapping in a buffered reader: as with any binary file, of fixed length."""
    path = tmp_path / "disk"
    with vm_core.open(path, "x", size="64k") as image:
        assert image.size == 64 * K
        assert image.format == "raw"
        assert image.writable()
        assert image.write(b"hello") == 5
        assert image.tell() == 5
        assert image.seek(-4, os.SEEK_END) == 64 * K - 4
        assert image.write(bytearray(b"tail")) == 4
        assert image.read(1) == b""
        with pytest.raises(OSError):
            image.write(b"x")
        image.seek(0)
        assert image.read(7) == b"hello\0\0"
        image.seek(64 * K - 4)
        assert image.readall() == b"tail"
        image.truncate(128 * K)
        assert image.size == 128 * K
        with pytest.raises(io.UnsupportedOperation):
            image.fileno()
    assert image.closed
    with pytest.raises(ValueError):
        image.pread(0, 1)
    assert path.read_bytes()[:5] == b"hello"
    with vm_core.open(path, format="raw") as image:
        assert io.BufferedReader(image).read(5) == b"hello"
    with pytest.raises(FileExistsError):
        vm_core.open(path, "x", size=K)


def test_modes(tmp_path: Path) -> None:
    """r cannot write, nonsense is refused, create options belong to creating."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    with vm_core.open(path, format="raw") as image:
        assert not image.writable()
        with pytest.raises(OSError):
            image.pwrite(0, b"x")
    for mode in ("a", "rw", "", "+r", "rr"):
        with pytest.raises(ValueError):
            vm_core.open(path, mode)
    for mode in ("rb", "r+b", "rb+"):
        vm_core.open(path, mode, format="raw").close()
    with pytest.raises(vm_core.UsageError, match="size"):
        vm_core.open(path, "r", size=5)


@pytest.mark.skipif(sys.platform != "linux", reason="holes are asked for the Linux way")
def test_map(tmp_path: Path) -> None:
    """map() tells data from holes, and where the data is."""
    path = tmp_path / "disk"
    vm_core.create(path, "1M")
    with vm_core.open(path, "r+", format="raw") as image:
        image.pwrite(256 * K, b"x" * 64 * K)
        image.zero(300 * K, 4 * K)
        runs = list(image.map())
        assert [(run.start, run.length, run.data, run.zero) for run in runs] == [
            (0, 4 * K, True, False),
            (4 * K, 252 * K, False, True),
            (256 * K, 44 * K, True, False),
            (300 * K, 4 * K, False, True),
            (304 * K, 16 * K, True, False),
            (320 * K, 704 * K, False, True),
        ]
        assert runs[2].offset == 256 * K
        assert runs[2].filename == str(path)
        assert next(image.map(300 * K, K)).zero
        assert image.info["virtual-size"] == 1 << 20
        image.discard(0, 1 << 20)
        assert image.read(1 << 20) == bytes(1 << 20)


@pytest.mark.usefixtures("toy_driver")
def test_backing_chain(tmp_path: Path) -> None:
    """backing and chain show the images below; map tells in which one a run is."""
    vm_core.create(tmp_path / "base", "64k", format="toy")
    with vm_core.open(tmp_path / "base", "r+") as image:
        image.write(b"b" * 32 * K)
    vm_core.create(tmp_path / "top", format="toy", backing="base", backing_format="toy")
    with vm_core.open(tmp_path / "top", "r+") as image:
        image.write(b"t" * 4 * K)
        assert [one.name for one in image.chain] == [str(tmp_path / "top"), str(tmp_path / "base")]
        assert [(run.start, run.length, run.depth, run.allocated) for run in image.map()] == [
            (0, 4 * K, 0, True),
            (4 * K, 28 * K, 1, True),
            (32 * K, 32 * K, 1, False),
        ]
        assert image.backing is not None
        image.backing.close()
        assert image.pread(4 * K, 2) == b"bb", "closing the view of a backing image does not close the image"
    with vm_core.open(tmp_path / "top", backing=False) as image:
        assert image.pread(4 * K, 2) == b"\0\0"


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (Debian: qemu-utils) is not installed")
def test_map_agrees_with_qemu_img(tmp_path: Path) -> None:
    """On a raw file with holes map() gives the entries of qemu-img map."""
    import json

    path = tmp_path / "disk"
    with path.open("wb") as file:
        for start in (0, 128 * K, 700 * K):
            file.seek(start)
            file.write(b"x" * 64 * K)
        file.truncate(1 << 20)
    out = subprocess.run(
        ["qemu-img", "map", "-f", "raw", "--output=json", path], check=True, capture_output=True
    ).stdout
    expected = [(e["start"], e["length"], e["data"], e["zero"], e["depth"], e.get("offset")) for e in json.loads(out)]
    with vm_core.open(path, format="raw") as image:
        assert [(e.start, e.length, e.data, e.zero, e.depth, e.offset) for e in image.map()] == expected


def test_opening_a_raw_image_imports_little() -> None:
    """With the format named, neither plugins nor attrs nor pluggy are imported."""
    code = (
        "import sys, tempfile, vm_core\n"
        "with tempfile.NamedTemporaryFile() as f:\n"
        "    f.write(bytes(512)); f.flush()\n"
        "    vm_core.open(f.name, 'r+', format='raw').close()\n"
        "heavy = ('attr', 'attrs', 'pluggy', 'rich', 'asyncio', 'argparse', 'ctypes', 'json')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "[]\n"
