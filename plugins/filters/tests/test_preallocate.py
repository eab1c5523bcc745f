"""preallocate: lengths are the peer's, what is ahead is gone afterwards, and the image is the same as without it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, ImageError, UsageError
from vm_core.testing.iopeer import PEER, assert_same, make, needs_peer, ours
from vm_core.testing.nodes import FailingNode, MemoryNode
from vm_filters.preallocate import STEP, Preallocate

K, M = 1 << 10, 1 << 20


class Shell:
    """An interactive qemu-io or vm-io: one command after the other, and the file's length after each."""

    def __init__(self, program: list[str], options: str, path: Path) -> None:
        self._path = path
        self._process = subprocess.Popen(
            [*program, "--image-opts", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.lengths: list[int] = []
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        text = b""
        while not text.endswith(b"qemu-io> "):
            piece = os.read(self._process.stdout.fileno(), 4096)
            assert piece, text
            text += piece
        self.lengths.append(self._path.stat().st_size)

    def type(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        self._wait()

    def end(self) -> None:
        self._process.communicate(b"quit\n", timeout=60)
        assert self._process.returncode == 0
        self.lengths.append(self._path.stat().st_size)


def lengths(program: list[str], path: Path, options: str, commands: list[str]) -> list[int]:
    shell = Shell(program, f"driver=qcow2,file.driver=preallocate,file.file.filename={path}{options}", path)
    for command in commands:
        shell.type(command)
    shell.end()
    return shell.lengths


GROWING = ["write 0 64k", "write 128k 64k", "write 1M 64k", "write 1M 512", "write 192k 192k", "flush", "write 3M 1M"]


@needs_peer
@pytest.mark.parametrize(
    ("options", "commands"),
    [
        ("", GROWING),
        (",file.prealloc-align=0,file.prealloc-size=1M", GROWING),
        (",file.prealloc-align=512,file.prealloc-size=100", GROWING),
        (",file.prealloc-align=1536,file.prealloc-size=70000", GROWING),
        (",file.prealloc-align=64k,file.prealloc-size=64k", GROWING),
        (",file.prealloc-size=0", GROWING),
        (",file.prealloc-align=5M,file.prealloc-size=20M", GROWING),
        (",file.prealloc-size=1E", GROWING),  # no host has as much: written without
        ("", ["write 0 1M", "reopen -r", "reopen -w", "write 2M 1M", "discard 0 1M", "write -z 4M 1M"]),
        *[("", ["write 0 64k", f"truncate -m {mode} 50M", "write 20M 64k"]) for mode in ("falloc", "metadata", "full")],
        *[("", ["write 0 64k", f"truncate -m {mode} 150M", "reopen -r"]) for mode in ("falloc", "full", "off")],
        ("", ["write 5M 1M", "truncate 5M", "write 3M 64k"]),
    ],
)
def test_lengths_like_the_peer(options: str, commands: list[str], tmp_path: Path) -> None:
    """The file is as long as with the peer after every command. Its tables are there before, since the peer writes new
    ones at other moments; and writes are in one piece, as parallel ones lose data in the peer's filter."""
    if find_spec("vm_qcow2") is None:
        pytest.skip("needs vm-qcow2")
    make(tmp_path, "create -q -f qcow2 start.qcow2 10M")
    start, path = tmp_path / "start.qcow2", tmp_path / "disk.qcow2"
    subprocess.run([str(PEER), "-c", "write 9M 64k", str(start)], check=True, capture_output=True, timeout=60)
    found = []
    for program in ([str(PEER)], ours(tmp_path)):
        shutil.copy(start, path)
        found.append(lengths(program, path, options, commands))
    assert found[1] == found[0]


@needs_peer
@pytest.mark.parametrize(
    "options",
    [
        "driver=preallocate",
        "driver=preallocate,file=nosuch",
        "driver=preallocate,file.filename=/nosuch",
        "driver=preallocate,file.filename=x0,prealloc-align=1000",
        "driver=preallocate,file.filename=x0,prealloc-align=-1",
        "driver=preallocate,file.filename=x0,prealloc-size=many",
        "driver=preallocate,file.filename=x0,prealloc-foo=1",
        "driver=preallocate,prealloc-align=512,file.driver=blkdebug,file.align=4096,file.image.filename=x0",
        "driver=preallocate,file.filename=x0,prealloc-align=8k,prealloc-size=12M",
        "driver=raw,file.driver=preallocate,file.file.filename=x0",
    ],
)
def test_options_like_the_peer(options: str, tmp_path: Path) -> None:
    """Options are taken and refused as by the peer, and what the guest sees is the same."""
    if "blkdebug" in options and find_spec("vm_blkdebug") is None:
        pytest.skip("needs vm-blkdebug")
    commands = (
        "length",
        "map",
        "write -P 3 0 64k",
        "write 1M 64k",
        "truncate 5M",
        "length",
        "read -P 3 0 64k",
        "flush",
    )
    words = ["--image-opts", *(word for line in commands for word in ("-c", line)), options]
    assert_same(tmp_path, ("create -q -f raw x0 1M",), words)


FORMATS = [
    ("qcow2", {}),
    ("qcow2", {"cluster_size": 4096}),
    ("qcow2", {"lazy_refcounts": True}),
    ("qcow", {}),
    ("qed", {}),
    ("vdi", {}),
    ("vmdk", {}),
    ("vpc", {}),
    ("vhdx", {}),
    ("parallels", {}),
]


@pytest.fixture(params=FORMATS, ids=lambda param: "-".join([param[0], *param[1]]))
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """An image of a format that is installed."""
    format, options = request.param
    if find_spec(f"vm_{format}") is None:
        pytest.skip(f"needs vm-{format}")
    path = tmp_path / "start"
    create_image(str(path), format, 40 * M, options)
    return format, path


def filtered(path: Path, format: str, **options: object) -> Node:
    file = {"driver": "preallocate", "file": {"driver": "file", "filename": str(path)}, **options}
    return open_node({"driver": format, "file": file}, readonly=False)


@pytest.mark.parametrize("seed", range(3))
def test_the_image_is_the_same_without_it(image: tuple[str, Path], seed: int, tmp_path: Path) -> None:
    """Whatever is written, zeroed and discarded: afterwards the file is the one that it would be without the filter,
    byte for byte and in length, and meanwhile it is longer."""
    format, start = image
    chance = random.Random(seed)
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    shutil.copy(start, plain)
    shutil.copy(start, ahead)
    align, size = chance.choice([(512, 1 * M), (1 * M, 128 * M), (4096, 5 * M)])
    nodes = [
        open_node({"driver": format, "file": {"driver": "file", "filename": str(plain)}}, readonly=False),
        filtered(ahead, format, **{"prealloc-align": align, "prealloc-size": size}),
    ]
    longer = 0
    model = bytearray(40 * M)
    for _ in range(25):
        offset = chance.randrange(0, 39 * M, 512)
        length = min(chance.choice([512, 4096, 70000 // 512 * 512, 2 * M]), 40 * M - offset)
        action = chance.random()
        data = bytes([chance.randrange(1, 255)]) * length
        for node in nodes:
            if action < 0.7:
                node.pwrite(offset, data)
            elif action < 0.8:
                node.zero(offset, length)
            elif action < 0.9:
                node.flush()
            else:
                node.reopen(readonly=True)
                if node is nodes[1]:
                    assert abs(plain.stat().st_size - ahead.stat().st_size) < M  # nothing is left ahead
                node.reopen(readonly=False)
        if action < 0.7:
            model[offset : offset + length] = data
        elif action < 0.8:
            model[offset : offset + length] = bytes(length)
        assert nodes[1].pread(offset, length) == model[offset : offset + length]
        longer = max(longer, ahead.stat().st_size - plain.stat().st_size)
    assert nodes[1].pread(0, 40 * M) == model
    for node in nodes:
        node.close()
    assert longer > size // 2
    assert plain.stat().st_size == ahead.stat().st_size
    if format not in ("vhdx", "vmdk"):  # these write identifiers anew when they are opened
        assert plain.read_bytes() == ahead.read_bytes()
    with open_node({"driver": format, "file": {"driver": "file", "filename": str(ahead)}}) as node:
        assert node.pread(0, 40 * M) == model


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Node]:
    path = tmp_path / "host"
    path.write_bytes(b"o" * (64 * K))
    with open_node({"driver": "file", "filename": str(path)}, readonly=False) as node:
        if not node.zero_fast(0, 512):
            pytest.skip("the file system of the tests sets no space aside")
        node.pwrite(0, b"o" * 512)
        yield node


def test_the_filter_tells_where_writes_end(host: Node) -> None:
    """What is above sees the length that writes gave the file; the blocks of the next ones are there already."""
    node = Preallocate(host, align=4 * K, size=1 * M, owned=False)
    assert (node.size, host.size) == (64 * K, 64 * K)
    node.pwrite(0, b"x")
    assert (node.size, host.size) == (64 * K, 64 * K)
    node.pwrite(64 * K, b"y" * 100)
    assert (node.size, host.size) == (64 * K + 100, 64 * K + 1 * M + 4 * K)
    taken = host.allocated()
    node.pwrite(100 * K, b"z" * 400 * K)
    assert (node.size, host.size, host.allocated()) == (500 * K, 64 * K + 1 * M + 4 * K, taken)
    assert node.pread(0, 64 * K + 200) == b"x" + b"o" * (64 * K - 1) + b"y" * 100 + bytes(100)
    assert node.pread(499 * K, 2 * K) == b"z" * K + bytes(K)
    assert sum(run.length for run in node.map(0, 500 * K)) == 500 * K
    node.close()
    assert host.size == 500 * K
    node.close()


def test_zeroes_ahead_are_there_already(host: Node) -> None:
    """Zeroes behind the last data only move the end; between data they are written; space may be given back."""
    node = Preallocate(host, align=K, size=1 * M, owned=False)
    node.zero(64 * K, 10 * K)
    assert (node.size, host.size) == (74 * K, 74 * K + 1 * M)
    node.pwrite(70 * K, b"d" * 20 * K)
    assert node.zero_fast(100 * K, 10 * K)
    assert node.size == 110 * K
    node.zero(80 * K, 40 * K)  # data and what is behind it
    assert (node.size, host.size) == (120 * K, 74 * K + 1 * M)
    assert node.pread(60 * K, 60 * K) == b"o" * 4 * K + bytes(6 * K) + b"d" * 10 * K + bytes(40 * K)
    taken = host.allocated()
    node.zero(64 * K, 50 * K, unmap=True)
    assert host.allocated() < taken
    node.discard(0, 64 * K)
    node.flush()
    assert node.pread(0, 120 * K) == bytes(120 * K)
    node.close()
    assert host.size == 120 * K


def test_resizing(host: Node) -> None:
    """A resize drops what is ahead and leaves holes; a step of a growing file goes into it; space for a range ahead is
    not set aside twice."""
    node = Preallocate(host, align=M, size=2 * M, owned=False)
    node.pwrite(64 * K, b"a" * 64 * K)
    assert host.size == 3 * M
    node.truncate(1 * M)  # a step
    assert (node.size, host.size) == (1 * M, 3 * M)
    node.truncate(4 * M)  # a step over the end of what is there
    assert (node.size, host.size) == (4 * M, 4 * M)
    node.pwrite(3 * M, b"b" * 512)
    assert (node.size, host.size) == (4 * M, 6 * M)
    node.reserve(5 * M, 512 * K)
    assert (node.size, host.size) == (5 * M + 512 * K, 6 * M)
    node.reserve(5 * M, 2 * M)
    assert (node.size, host.size) == (7 * M, 7 * M)
    node.pwrite(7 * M, b"c" * 512)
    assert host.size == 10 * M
    taken = host.allocated()
    node.truncate(9 * M + STEP)
    assert (node.size, host.size) == (9 * M + STEP, 9 * M + STEP)
    assert host.allocated() < taken
    assert node.pread(7 * M, 2 * M) == b"c" * 512 + bytes(2 * M - 512)
    node.truncate(100)
    assert (node.size, host.size) == (100, 100)
    node.truncate(K)
    assert node.pread(0, K) == b"o" * 100 + bytes(K - 100)
    node.close()
    assert host.size == K


def test_read_only(tmp_path: Path) -> None:
    """What is ahead is gone while the image is read-only, and nothing is changed then."""
    path = tmp_path / "host"
    path.write_bytes(bytes(K))
    with open_node(
        {"driver": "preallocate", "file": {"driver": "file", "filename": str(path)}}, readonly=False
    ) as node:
        node.pwrite(2 * K, b"x" * K)
        assert path.stat().st_size == 129 * M
        node.reopen(readonly=True)
        assert path.stat().st_size == 3 * K
        changes = (
            lambda: node.pwrite(4 * K, b"x"),
            lambda: node.zero(4 * K, 1),
            lambda: node.zero_fast(4 * K, 1),
            lambda: node.discard(0, 1),
            lambda: node.truncate(9 * K),
        )
        for change in changes:
            with pytest.raises(BlockError):
                change()
        assert path.stat().st_size == 3 * K
        node.reopen(readonly=False)
        node.pwrite(4 * K, b"x" * K)
        assert path.stat().st_size == 129 * M
    assert path.stat().st_size == 5 * K


def test_without_space_it_is_written_all_the_same(host: Node) -> None:
    """Where the space cannot be had – a full disk, a file system that cannot – writes go on without it, and it is asked
    for no more than once."""
    asked: list[int] = []

    class Refusing(FailingNode):
        #: What it has set aside before it notices, as some file systems do.
        partly = 0

        def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
            asked.append(offset)
            if self.partly:
                host.reserve(offset, self.partly)
            raise BlockError.of(errno.ENOSPC)

    for partly in (0, 100 * K):
        asked.clear()
        file = Refusing(host, lambda operation, offset, length: 0)
        file.partly = partly
        node = Preallocate(file, size=1 * M, owned=False)
        size = host.size
        node.pwrite(size, b"a" * 10 * K)
        assert host.size == size + 10 * K
        node.pwrite(size + 20 * K, b"b" * K)
        assert (host.size, node.size) == (size + 21 * K, size + 21 * K)
        assert node.pread(size, 21 * K) == b"a" * 10 * K + bytes(10 * K) + b"b" * K
        assert len(asked) == 1
        node.close()
        assert host.size == size + 21 * K
    memory = MemoryNode(b"m" * 100)
    node = Preallocate(memory)
    node.pwrite(100, b"n" * 100)
    assert (memory.size, node.size) == (200, 200)
    node = Preallocate(memory, size=1 << 63)
    node.pwrite(200, b"n" * 100)
    assert (memory.size, node.size) == (300, 300)


def test_a_failed_write_is_no_length(host: Node) -> None:
    """A write past the end that fails leaves the length as the file has it; the next one is as good as ever."""
    fail = True

    def decide(operation: str, offset: int, length: int) -> int:
        return errno.EIO if fail and operation == "write" else 0

    for ahead in (0, 1 * M):
        fail = True
        size = host.size
        node = Preallocate(FailingNode(host, decide), align=1, size=ahead, owned=False)
        with pytest.raises(OSError, match="Input/output"):
            node.pwrite(size, b"a" * 8 * K)
        fail = False
        assert size <= node.size <= size + 8 * K
        node.pwrite(size, b"b" * 4 * K)
        node.close()
        assert size + 4 * K <= host.size <= size + 8 * K
        assert host.pread(size, 4 * K) == b"b" * 4 * K


def test_threads(host: Node) -> None:
    """Writers side by side at the growing end never meet the zeroes that are put there."""
    node = Preallocate(host, align=1, size=3000, owned=False)
    piece, count = 1000, 200
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            start.wait()
            for index in range(count):
                offset = 64 * K + (index * 4 + number) * piece
                node.pwrite(offset, bytes([number + 1]) * piece)
                assert node.size >= offset + piece
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    expected = b"".join(bytes([number + 1]) * piece for number in range(4)) * count
    assert node.pread(64 * K, 4 * count * piece) == expected
    node.close()
    assert host.size == 64 * K + 4 * count * piece


def test_engines_move_what_lies_below_the_end(host: Node) -> None:
    """An engine may move the bytes of what is there by itself, not of a write that moves the end."""
    node = Preallocate(host, align=K, size=1 * M, owned=False)
    assert node.host_spans(0, K, [], [], write=False, stable=False)
    assert not node.host_spans(0, K, [], [], write=True, stable=False)  # nothing is known yet
    node.pwrite(64 * K, b"x" * K)
    assert node.host_spans(60 * K, 5 * K, [], [], write=True, stable=False)
    assert not node.host_spans(60 * K, 6 * K, [], [], write=True, stable=False)
    buffer = memoryview(bytearray(K))
    if node.read_nowait(64 * K, [buffer]):
        assert bytes(buffer) == b"x" * K
    node.close()


@pytest.mark.parametrize("options", [{"prealloc-align": 100}, {"prealloc-align": "1k5"}, {"prealloc-size": -1}])
def test_wrong_options(options: dict[str, object], tmp_path: Path) -> None:
    """Options that make no sense are refused by name."""
    path = tmp_path / "host"
    path.write_bytes(bytes(K))
    with pytest.raises((ImageError, UsageError), match=next(iter(options))):
        open_node({"driver": "preallocate", "file": {"driver": "file", "filename": str(path)}, **options})
