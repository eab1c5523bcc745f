"""Malformed and malicious qcow2 images give one clear error each, within a second and 100 MiB, and change nothing."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmtest import program, run

#: Opens an image for writing, reads all of it in pieces and writes a little: whatever happens must be said in a line.
PROBE = """
import atexit, sys, vm_core
def peak():  # of this program alone: ru_maxrss would remember the process that started it
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
atexit.register(peak)
try:
    with vm_core.open(sys.argv[1], sys.argv[2], format="qcow2") as image:
        for at in range(0, min(image.size, 1 << 26), 1 << 20):
            image.pread(at, 1 << 20)
        for run, _ in zip(image.map(), range(100000)):
            pass
        if sys.argv[2] == "r+":
            image.pwrite(70000, b"x" * 70000)
            image.flush()
except (vm_core.VmError, OSError) as error:
    print(error)
    sys.exit(1)
"""

SIZE_LIMIT = 100 << 20
SECONDS = 1.0


def patch(path: Path, offset: int, form: str, *values: int) -> None:
    """Overwrite fields of an image."""
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(struct.pack(form, *values))


def field(path: Path, offset: int, form: str) -> int:
    """Read a field of an image."""
    with path.open("rb") as f:
        f.seek(offset)
        return int(struct.unpack(form, f.read(struct.calcsize(form)))[0])


def l1(path: Path) -> int:
    """Where the L1 table is."""
    return field(path, 40, ">Q")


def l2(path: Path) -> int:
    """Where the first L2 table is."""
    return field(path, l1(path), ">Q") & 0x00FFFFFFFFFFFE00


def refcount_block(path: Path) -> int:
    """Where the first refcount block is."""
    return field(path, field(path, 48, ">Q"), ">Q")


#: name: (what is done to the image, words that the error must have — None where the image may also open)
CASES: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "empty": (lambda p: os.truncate(p, 0), "qcow2"),
    "ten bytes": (lambda p: os.truncate(p, 10), "qcow2"),
    "truncated header": (lambda p: os.truncate(p, 90), None),
    "truncated after header": (lambda p: os.truncate(p, 65536), ""),
    "truncated in L2": (lambda p: os.truncate(p, l2(p) + 100), None),
    "version 4": (lambda p: patch(p, 4, ">I", 4), "version"),
    "cluster_bits 0": (lambda p: patch(p, 20, ">I", 0), "cluster"),
    "cluster_bits 63": (lambda p: patch(p, 20, ">I", 63), "cluster"),
    "size of all ones": (lambda p: patch(p, 24, ">Q", (1 << 64) - 1), ""),
    "size of an exbibyte": (lambda p: patch(p, 24, ">Q", 1 << 60), ""),
    "crypt method 9": (lambda p: patch(p, 32, ">I", 9), "ncrypt"),
    "L1 of 2^32 entries": (lambda p: patch(p, 36, ">I", 0xFFFFFFFF), "L1"),
    "L1 too small": (lambda p: patch(p, 36, ">I", 0), "L1"),
    "L1 outside": (lambda p: patch(p, 40, ">Q", 1 << 40), "L1"),
    "L1 unaligned": (lambda p: patch(p, 40, ">Q", l1(p) + 1), "L1"),
    "L1 on the header": (lambda p: patch(p, 40, ">Q", 0), ""),
    "refcount table outside": (lambda p: patch(p, 48, ">Q", 1 << 40), None),
    "refcount table of 2^32 clusters": (lambda p: patch(p, 56, ">I", 0xFFFFFFFF), "eference count table"),
    "refcount table unaligned": (lambda p: patch(p, 48, ">Q", 65537), "eference count table"),
    "a million snapshots": (lambda p: patch(p, 60, ">IQ", 1 << 20, 1 << 16), "napshot"),
    "header_length 1": (lambda p: patch(p, 100, ">I", 1), "eader"),
    "header_length of a gigabyte": (lambda p: patch(p, 100, ">I", 1 << 30), "eader"),
    "refcount_order 60": (lambda p: patch(p, 96, ">I", 60), "efcount"),
    "unknown incompatible bit": (lambda p: patch(p, 72, ">Q", 1 << 40), "feature"),
    "extension without end": (lambda p: patch(p, 104 + 8, ">II", 0x12345678, 0xFFFFFFF0), "xtension"),
    "backing name of 4 GiB": (lambda p: patch(p, 8, ">QI", 512, 0xFFFFFFFF), "acking"),
    "backing name past the end": (lambda p: patch(p, 8, ">QI", 1 << 40, 10), "acking"),
    "L2 outside": (lambda p: patch(p, l1(p), ">Q", 1 << 63 | 1 << 40), "L2"),
    "L2 unaligned": (lambda p: patch(p, l1(p), ">Q", 1 << 63 | (l2(p) + 512)), "L2"),
    "L2 is the L1 itself": (lambda p: patch(p, l1(p), ">Q", 1 << 63 | l1(p)), None),
    "L2 is the header": (lambda p: patch(p, l1(p), ">Q", 1 << 63), None),
    "data outside": (lambda p: patch(p, l2(p), ">Q", 1 << 63 | 1 << 45), None),
    "data unaligned": (lambda p: patch(p, l2(p), ">Q", 1 << 63 | 0x50200), "align"),
    "data is the L1": (lambda p: patch(p, l2(p) + 8, ">Q", 1 << 63 | l1(p)), ""),
    "data is the refcount block": (lambda p: patch(p, l2(p) + 8, ">Q", 1 << 63 | refcount_block(p)), ""),
    "compressed run outside": (lambda p: patch(p, l2(p), ">Q", 1 << 62 | 1 << 44), ""),
    "compressed run of rubbish": (lambda p: patch(p, l2(p), ">Q", 1 << 62 | 1 << 54 | 0x200), ""),
    "refcount block outside": (lambda p: patch(p, field(p, 48, ">Q"), ">Q", 1 << 45), ""),
    "refcount block is the L1": (lambda p: patch(p, field(p, 48, ">Q"), ">Q", l1(p)), ""),
    "all refcounts zero": (lambda p: patch(p, refcount_block(p), ">32768s", bytes(32768)), None),  # type: ignore[arg-type]
}


def probe(path: Path, mode: str) -> tuple[int, str, str, float, int]:
    """(exit code, output, errors, seconds, peak bytes) of using an image in a process of its own."""
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", PROBE, str(path), mode], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = child.communicate(timeout=30)
    seconds = time.monotonic() - start
    *lines, peak = out.splitlines(keepends=True)
    return child.returncode, "".join(lines), err, seconds, int(peak) * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small image with data in its first megabyte, made by qemu-img."""
    path = tmp_path / "disk.qcow2"
    run(program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", path, "16M")
    run(program("qemu-io", "qemu-utils"), "-c", "write -P 7 0 1M", path)
    return path


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("name", CASES)
def test_damaged_image(image: Path, name: str, mode: str) -> None:
    """The error is one line that names the image, and nothing else happens."""
    damage, words = CASES[name]
    damage(image)
    before = image.read_bytes()
    code, out, err, seconds, peak = probe(image, mode)
    # What marks an image as corrupt is told at once, in a line of the peer's.
    assert not err or (len(err.splitlines()) == 1 and ("image as corrupt" in err or "Image is corrupt" in err)), err
    assert code in ((0, 1) if words is None or not words else (1,)), out
    if code:
        assert len(out.splitlines()) == 1, out
        if words:
            assert words in out, out
    assert seconds < SECONDS + 1, "slow (a second is allowed for the interpreter's own start on a busy machine)"
    assert peak < SIZE_LIMIT
    if mode == "r":
        assert image.read_bytes() == before


def test_image_that_backs_itself(tmp_path: Path) -> None:
    """An image that names itself as its backing image is one error."""
    path = tmp_path / "loop.qcow2"
    qemu_img = program("qemu-img", "qemu-utils")
    run(qemu_img, "create", "-q", "-f", "qcow2", path, "1M")
    run(qemu_img, "rebase", "-u", "-F", "qcow2", "-b", "loop.qcow2", path)
    code, out, err, *_ = probe(path, "r")
    assert (code, err) == (1, "")
    assert len(out.splitlines()) == 1
    assert "loop.qcow2" in out


def test_ring_of_backing_images(tmp_path: Path) -> None:
    """Two images that back each other are one error."""
    qemu_img = program("qemu-img", "qemu-utils")
    for name in ("a", "b"):
        run(qemu_img, "create", "-q", "-f", "qcow2", tmp_path / name, "1M")
    run(qemu_img, "rebase", "-u", "-F", "qcow2", "-b", "b", tmp_path / "a")
    run(qemu_img, "rebase", "-u", "-F", "qcow2", "-b", "a", tmp_path / "b")
    code, out, err, *_ = probe(tmp_path / "a", "r")
    assert (code, err) == (1, "")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../secret", 'json:{"driver":"file","filename":"/etc/passwd"}', "nbd://127.0.0.1:1/x"]
)
def test_backing_outside_is_refused_with_the_way_to_allow_it(tmp_path: Path, target: str) -> None:
    """A stranger's image cannot make us read a file outside of its folder, or talk to a server."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    path = folder / "disk.qcow2"
    qemu_img = program("qemu-img", "qemu-utils")
    run(qemu_img, "create", "-q", "-f", "qcow2", path, "1M")
    run(qemu_img, "rebase", "-u", "-F", "raw", "-b", target, path)
    code, out, err, *_ = probe(path, "r")
    assert (code, err) == (1, "")
    assert len(out.splitlines()) == 1
    assert "--trust" in out or "backing=follow" in out


def test_symbolic_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """Links are resolved before the folder is compared."""
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    (folder / "base").symlink_to(tmp_path / "secret")
    path = folder / "disk.qcow2"
    qemu_img = program("qemu-img", "qemu-utils")
    run(qemu_img, "create", "-q", "-f", "qcow2", path, "1M")
    run(qemu_img, "rebase", "-u", "-F", "raw", "-b", "base", path)
    code, out, err, *_ = probe(path, "r")
    assert (code, err) == (1, "")
    assert "--trust" in out


def test_absolute_data_file_is_refused(tmp_path: Path) -> None:
    """An external data file outside of the image's folder is not opened."""
    folder = tmp_path / "images"
    folder.mkdir()
    secret = tmp_path / "secret.raw"
    path = folder / "disk.qcow2"
    run(
        program("qemu-img", "qemu-utils"),
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={secret},data_file_raw=on",
        path,
        "1M",
    )
    code, out, err, *_ = probe(path, "r")
    assert (code, err) == (1, "")
    assert len(out.splitlines()) == 1
