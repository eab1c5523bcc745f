"""The protocols file and host_device: against a bytearray, against qemu-io, and under O_DIRECT."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vm_core.block import file as file_module
from vm_core.block.cache import WRITEBACK, CacheMode
from vm_core.block.file import FileProtocol
from vm_core.block.mapping import Kind
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError, LockError

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")
qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io (Debian: qemu-utils) is not installed")

K = 1024
DIRECT = CacheMode.parse("none")


def raw(path: Path, cache: CacheMode = WRITEBACK, **options: object) -> Node:
    return open_node({"driver": "file", "filename": str(path), **options}, readonly=False, cache=cache)


@pytest.fixture(params=["buffered", "direct", "bounced"])
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A file of odd length; through the page cache, with O_DIRECT, and with O_DIRECT and tiny bounce buffers."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(100 * K + 123))
    if request.param == "bounced":
        monkeypatch.setattr(file_module, "BOUNCE", 8192)
    try:
        node = raw(path, CacheMode() if request.param == "buffered" else DIRECT)
    except ImageError as error:
        pytest.skip(str(error))
    yield node
    node.close()


def test_reads_like_a_bytearray(node: Node) -> None:
    """Unaligned vectors of any shape, zeroes and discards, growing and shrinking: the file has the model's bytes."""
    chance = random.Random(5)
    model = bytearray(node.size)
    for _ in range(400):
        action = chance.random()
        offset = chance.randrange(len(model) + 3000)
        length = chance.choice([1, 7, 512, 4096, 4097, chance.randrange(1, 20000)])
        if action < 0.4:
            data = chance.randbytes(length)
            view, pieces, position = memoryview(data), [], 0
            while position < length:
                step = chance.choice([512, chance.randrange(1, 5000), length])
                pieces.append(view[position : position + step])
                position += step
            node.write(offset, pieces, fua=chance.random() < 0.1)
            if offset + length > len(model):
                model.extend(bytes(offset + length - len(model)))
            model[offset : offset + length] = data
        elif action < 0.5:
            node.zero(offset, length, unmap=chance.random() < 0.5)
            if offset + length > len(model):
                model.extend(bytes(offset + length - len(model)))
            model[offset : offset + length] = bytes(length)
        elif action < 0.6:
            node.discard(offset, length)
            end = min(offset + length, len(model))
            if end > offset:
                model[offset:end] = bytes(end - offset)
        elif action < 0.65:
            size = chance.randrange(50 * K, 150 * K)
            node.truncate(size)
            model = model[:size] + bytes(max(0, size - len(model)))
        elif action < 0.7:
            node.flush()
        assert node.size == len(model)
        assert os.path.getsize(node.filename) == len(model)
        found = bytearray(b"\xff" * length)
        node.read(offset, [memoryview(found)])
        assert found == bytes(model[offset : offset + length]).ljust(length, b"\0")
    node.flush()
    assert Path(node.filename).read_bytes() == model


def test_more_vectors_than_one_call_takes(node: Node) -> None:
    """Thousands of buffers are split into several calls."""
    data = random.Random(1).randbytes(5000 * 3)
    view = memoryview(data)
    node.write(77, [view[start : start + 3] for start in range(0, len(data), 3)])
    found = bytearray(len(data))
    back = memoryview(found)
    node.read(77, [back[start : start + 5] for start in range(0, len(data), 5)])
    assert found == data


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call that moves less than asked is followed by another."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(10 * K))
    preadv, pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, b, o, *f: preadv(fd, [b[0][:100]], o, *f))
    monkeypatch.setattr(os, "pwritev", lambda fd, b, o, *f: pwritev(fd, [b[0][:70]], o, *f))
    data = random.Random(2).randbytes(3 * K)
    with raw(path) as node:
        node.pwrite(500, data)
        assert node.pread(500, len(data)) == data
        node.write(0, [memoryview(data)], fua=True)
        assert node.pread(0, len(data)) == data


def test_flush_happens_only_after_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second flush without a write between makes no system call; cache=unsafe makes none at all."""
    calls: list[int] = []
    monkeypatch.setattr(file_module, "_sync", calls.append)
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    with raw(path) as node:
        node.flush()
        assert not calls
        node.pwrite(0, b"x")
        node.flush()
        node.flush()
        assert len(calls) == 1
        node.zero(0, 10)
        node.flush()
        assert len(calls) == 2
    with raw(path, CacheMode.parse("unsafe")) as node:
        node.write(0, [memoryview(b"y")], fua=True)
        node.flush()
    assert len(calls) == 2


def test_a_failed_flush_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the pages may be gone: later flushes fail too, although the system says all is well."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    node = raw(path)
    node.pwrite(0, b"x")

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(file_module, "_sync", fail)
        with pytest.raises(BlockError):
            node.flush()
    with pytest.raises(BlockError) as caught:
        node.flush()
    assert caught.value.code == errno.EIO
    with pytest.raises(BlockError):
        node.close()


@linux
def test_fua_is_a_synchronous_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fua the kernel is told (RWF_DSYNC) or, where it does not know how, a flush follows."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    flags: list[int] = []
    pwritev = os.pwritev

    def watched(fd: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        return pwritev(fd, buffers, offset, flag)

    monkeypatch.setattr(os, "pwritev", watched)
    with raw(path) as node:
        node.write(0, [memoryview(b"x")], fua=True)
    assert flags == [os.RWF_DSYNC]
    synced: list[int] = []
    monkeypatch.setattr(file_module, "_sync", synced.append)

    def refuses(fd: int, buffers: list[memoryview], offset: int, flag: int = 0) -> int:
        if flag:
            raise OSError(errno.EOPNOTSUPP, "no")
        return pwritev(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuses)
    with raw(path) as node:
        node.write(0, [memoryview(b"y")], fua=True)
        assert len(synced) == 1
    assert path.read_bytes()[:1] == b"y"


def test_without_the_system_s_help_zeroes_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither fallocate nor holes exist, zeroing writes and discarding does nothing."""
    monkeypatch.setattr(file_module, "fallocate", lambda *args: False)
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 10 * K)
    with raw(path) as node:
        node.discard(0, K)
        node.zero(2 * K, 10 * K, unmap=True)
    assert path.read_bytes() == b"x" * 2 * K + bytes(10 * K)


def test_without_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems without preadv, or without positional I/O at all, the same bytes come out."""
    path = tmp_path / "disk"
    path.write_bytes(b"abcdef" * K)
    monkeypatch.setattr(file_module, "_VECTORED", False)
    monkeypatch.setattr(file_module, "_DSYNC", 0)
    for positional in (True, False):
        if not positional:
            monkeypatch.delattr(os, "pread")
            monkeypatch.delattr(os, "pwrite")
        with raw(path) as node:
            node.write(1, [memoryview(b"12"), memoryview(b"34")])
            buffers = [bytearray(3), bytearray(4)]
            node.read(0, [memoryview(buffer) for buffer in buffers])
            assert buffers == [b"a12", b"34fa"]


@linux
def test_map_shows_holes(tmp_path: Path) -> None:
    """Holes are ZERO, written parts DATA, what lies past the end EOF; all adjoining."""
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(1024 * K)
        file.seek(256 * K)
        file.write(b"x" * 64 * K)
    with raw(path) as node:
        runs = list(node.map(0, 1100 * K))
        assert [(run.kind, run.offset, run.length) for run in runs] == [
            (Kind.ZERO, 0, 256 * K),
            (Kind.DATA, 256 * K, 64 * K),
            (Kind.ZERO, 320 * K, 704 * K),
            (Kind.EOF, 1024 * K, 76 * K),
        ]
        node.discard(256 * K, 64 * K)
        assert [run.kind for run in node.map(0, 1024 * K)] == [Kind.ZERO]
        assert node.allocated() < 64 * K


@linux
def test_discard_ignored(tmp_path: Path) -> None:
    """discard=ignore keeps the space."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 64 * K)
    with raw(path, discard="ignore") as node:
        node.discard(0, 64 * K)
        assert node.pread(0, 10) == b"x" * 10


@linux
def test_direct_alignment_is_found(tmp_path: Path) -> None:
    """With O_DIRECT the node knows the block size, a power of two from 512 to 4096."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(64 * K))
    try:
        node = raw(path, DIRECT)
    except ImageError as error:
        pytest.skip(str(error))
    with node:
        assert node.request_alignment in (512, 1024, 2048, 4096)
        assert isinstance(node, FileProtocol)
        import fcntl

        assert fcntl.fcntl(node.fileno(), fcntl.F_GETFL) & os.O_DIRECT


@linux
@pytest.mark.parametrize("unshare", [True, False])
def test_reopen_changes_the_mode(tmp_path: Path, unshare: bool) -> None:
    """A file changes between read-only and read-write and keeps its locks."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    node = open_node({"driver": "file", "filename": str(path)})
    if unshare:
        node.claim()
    with pytest.raises(BlockError):
        node.pwrite(0, b"x")
    node.reopen(readonly=False)
    node.pwrite(0, b"x")
    if unshare:
        with pytest.raises(LockError):
            open_node(str(path), format="raw")
    node.reopen(readonly=True)
    with pytest.raises(BlockError):
        node.pwrite(0, b"x")
    open_node(str(path), format="raw").close()
    node.close()


# With QEMU's tools


def qemu_io(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-io", *arguments], capture_output=True, text=True, timeout=30)


@qemu
@linux
@pytest.mark.parametrize("readonly", [True, False])
def test_we_keep_qemu_out(tmp_path: Path, readonly: bool) -> None:
    """While we have an image open, qemu-io cannot write to it; while we write, it cannot read it without -U."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    with open_node({"driver": "raw", "file.filename": str(path)}, readonly=readonly):
        writing = qemu_io("-f", "qcow2", "-c", "write 0 4k", str(path))
        assert 'Failed to get "write" lock' in writing.stderr + writing.stdout
        reading = qemu_io("-r", "-f", "qcow2", "-c", "read 0 4k", str(path))
        assert ("Failed to get shared" in reading.stderr + reading.stdout) is not readonly
        shared = qemu_io("-r", "-U", "-f", "qcow2", "-c", "read 0 4k", str(path))
        assert "read 4096/4096" in shared.stdout
    assert "wrote 4096/4096" in qemu_io("-f", "qcow2", "-c", "write 0 4k", str(path)).stdout


@qemu
@linux
def test_qemu_keeps_us_out(tmp_path: Path) -> None:
    """While qemu-io writes to an image we neither write nor read it, except with share."""
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("write 0 4k\n")
        while "wrote" not in holder.stdout.readline():
            pass
        for readonly, text in ((False, 'Failed to get "write" lock'), (True, 'Failed to get shared "write" lock')):
            with pytest.raises(LockError) as caught:
                open_node(str(path), readonly=readonly, format="raw")
            assert text in str(caught.value)
            assert f"Is another process using the image [{path}]?" in str(caught.value)
        with open_node(str(path), share=True, format="raw") as node:
            assert node.pread(0, 4) == b"QFI\xfb"
        with pytest.raises(LockError):
            create_image(str(path), "raw", K)
    finally:
        holder.communicate("quit\n", timeout=10)
    open_node(str(path), readonly=False, format="raw").close()


@qemu
def test_qemu_reads_what_we_wrote(tmp_path: Path) -> None:
    """Random writes, zeroes and discards through the raw node leave the bytes that qemu-img and qemu-io see."""
    path, model_path = tmp_path / "disk", tmp_path / "model"
    create_image(str(path), "raw", 1 << 20, {"preallocation": "falloc"})
    assert path.stat().st_size == 1 << 20
    model = bytearray(1 << 20)
    chance = random.Random(11)
    with open_node(str(path), readonly=False, format="raw") as node:
        for _ in range(200):
            offset = chance.randrange(1 << 20)
            length = min(chance.randrange(1, 50000), (1 << 20) - offset)
            if chance.random() < 0.7:
                data = chance.randbytes(length)
                node.pwrite(offset, data)
                model[offset : offset + length] = data
            else:
                node.zero(offset, length, unmap=chance.random() < 0.5)
                model[offset : offset + length] = bytes(length)
    model_path.write_bytes(model)
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", path, model_path], check=True, capture_output=True)
    assert "read 4096/4096" in qemu_io("-f", "raw", "-c", "write -P 7 4k 4k", "-c", "read -P 7 4k 4k", str(path)).stdout
    with open_node(str(path), format="raw") as node:
        assert node.pread(4 * K, 4 * K) == bytes([7]) * 4 * K


# Devices


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A loop device of 1 MiB."""
    backing = tmp_path / "loop.img"
    backing.write_bytes(b"L" * (1 << 20))
    done = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


@pytest.mark.skipif(shutil.which("losetup") is None, reason="losetup is not installed")
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_host_device(loop: str, cache: str) -> None:
    """A device is found by its path, has its own size, does not grow, and zeroes and discards."""
    with open_node(loop, readonly=False, cache=CacheMode.parse(cache), format="raw") as node:
        assert node.children()["file"].driver == "host_device"
        assert node.size == 1 << 20
        node.pwrite(1000, b"hello")
        node.flush()
        assert node.pread(999, 7) == b"LhelloL"
        node.zero(4096, 8192)
        node.zero(100, 50, unmap=True)
        assert node.pread(4095, 8194) == b"L" + bytes(8192) + b"L"
        assert node.pread(99, 52) == b"L" + bytes(50) + b"L"
        node.discard(512 * K, 64 * K)
        with pytest.raises(BlockError):
            node.pwrite((1 << 20) - 1, b"xx")
        with pytest.raises(BlockError):
            node.truncate(2 << 20)
        assert node.pread((1 << 20) - 1, 3) == b"L\0\0"
    with pytest.raises(ImageError, match=r"regular file.*host_device"):
        open_node({"driver": "file", "filename": loop})
    with pytest.raises(ImageError, match="Cannot grow device"):
        create_image(loop, "raw", 2 << 20)


def reserving(
    path: Path, monkeypatch: pytest.MonkeyPatch, fallocate: Callable[[int, int, int, int], bool]
) -> FileProtocol:
    """A new file on a file system where setting space aside is worth it, and is done by *fallocate*."""
    monkeypatch.setattr(file_module, "fallocate", fallocate)
    monkeypatch.setattr(file_module, "worth_reserving", lambda fd: True)
    return FileProtocol(os.open(path, os.O_RDWR | os.O_CREAT), str(path), readonly=False)


def test_space_is_set_aside_for_large_writes_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a job expects to write much, large writes come after fallocate, small ones do not; the size stays."""
    calls: list[tuple[int, int, int]] = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
        calls.append((mode, offset, length))
        return True

    node = reserving(tmp_path / "disk", monkeypatch, fallocate)
    large = os.urandom(file_module.RESERVE_LEAST)
    node.pwrite(0, large)
    assert not calls
    node.expect_much()
    node.pwrite(1 << 20, large)
    node.pwrite(2 << 20, large[:-1])
    assert calls == [(file_module.KEEP_SIZE, 1 << 20, len(large))]
    assert node.size == (2 << 20) + len(large) - 1
    assert node.pread(1 << 20, len(large)) == large
    node.close()


@pytest.mark.parametrize("failure", [errno.ENOSPC, 0])
def test_a_write_goes_on_where_space_cannot_be_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    """What the write itself meets is what is told; nothing is set aside any more."""
    calls = 0

    def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
        nonlocal calls
        calls += 1
        if failure:
            raise OSError(failure, os.strerror(failure))
        return False

    node = reserving(tmp_path / "disk", monkeypatch, fallocate)
    node.expect_much()
    data = os.urandom(file_module.RESERVE_LEAST * 2)
    node.pwrite(0, data)
    node.pwrite(len(data), data)
    assert calls == 1
    assert node.pread(0, 2 * len(data)) == data * 2
    node.close()
