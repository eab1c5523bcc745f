"""The engines on the kernel that is there."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from aio_kit import Setup, cache_for, carry, data_of, file_below, memory, reading, writing

from vm_aio import syscalls
from vm_aio.linuxaio import Context
from vm_aio.uring import Ring
from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.file import FileProtocol
from vm_core.block.raw import RawNode
from vm_core.block.request import Op, Request
from vm_core.errors import UsageError

SIZE = 1 << 20


def spread(offset: int, length: int) -> Request:
    """A read into 3000 buffers."""
    request = reading(offset, length)
    view = request.buffers[0]
    request.buffers = [view[start : start + 7] for start in range(0, length, 7)]
    return request


def test_direct(setup: Setup, engine: str) -> None:
    """With O_DIRECT requests of any offset, length and memory are served, aligned or not."""
    data = bytearray(random.Random(5).randbytes(SIZE + 100))
    node = setup.open(setup.raw(bytes(data)), cache=CacheMode(direct=True))
    backend = setup.backend(node, engine)
    dice = random.Random(6)
    requests = []
    for _ in range(200):
        unit = dice.choice((1, 512, 4096))
        length = dice.randrange(1, 20) * unit
        offset = dice.randrange(0, (SIZE - length) // unit) * unit
        request = reading(offset, length)
        if dice.random() < 0.3:
            shift = dice.choice((1, 3, 16, 512))
            request.buffers = (memory(length + shift)[shift:],)
        requests.append(request)
    requests.append(reading(SIZE - 412, 512))
    requests.append(reading(SIZE, 100))
    carry(backend, requests)
    for request in requests:
        assert request.status == 0, request
        assert data_of(request) == data[request.offset : request.offset + request.length]
    for _ in range(60):
        unit = dice.choice((1, 512, 4096))
        length = dice.randrange(1, 20) * unit
        offset = dice.randrange(0, (SIZE - length) // unit) * unit
        fresh = dice.randbytes(length)
        request = writing(offset, fresh, fua=dice.random() < 0.2)
        if dice.random() < 0.3:
            request.buffers = (memoryview(b"?" + fresh)[1:],)
        carry(backend, [request])
        assert request.status == 0
        data[offset : offset + length] = fresh
    backend.close()
    assert (setup.folder / "disk.raw").read_bytes() == data


def test_many_buffers(setup: Setup, engine: str) -> None:
    """More buffers than a system call takes, and more bytes than are written at once."""
    data = random.Random(5).randbytes(8 << 20)
    node = setup.open(setup.raw(data), cache=cache_for(engine))
    file_below(node)._can_nowait = False
    backend = setup.backend(node, engine)
    request = spread(512, 21_000)
    large = writing(1 << 20, b"large" * (1 << 20))
    carry(backend, [request, large])
    assert request.status == large.status == 0
    assert data_of(request) == data[512 : 512 + 21_000]
    assert (
        node.pread((1 << 20) - 1, (5 << 20) + 2) == data[(1 << 20) - 1 : 1 << 20] + data_of(large) + data[6 << 20 :][:1]
    )


def test_more_than_entries(setup: Setup, engine: str) -> None:
    """Hundreds of requests in one batch through a queue of two entries."""
    data = random.Random(5).randbytes(SIZE)
    node = setup.open(setup.raw(data), cache=cache_for(engine))
    file_below(node)._can_nowait = False
    backend = setup.backend(node, engine, entries=2)
    requests = [reading(start, 4096) for start in range(0, SIZE, 4096)]
    carry(backend, requests)
    assert all(data_of(one) == data[one.offset : one.offset + 4096] for one in requests)


def expect(requests: list[Request]) -> threading.Semaphore:
    """What is released once for each of *requests*."""
    left = threading.Semaphore(0)
    for request in requests:
        request.done = lambda _: left.release()
    return left


def test_submitting_threads_may_end(setup: Setup, engine: str) -> None:
    """Requests complete although the thread that submitted them is gone."""
    data = random.Random(5).randbytes(SIZE)
    node = setup.open(setup.raw(data), cache=cache_for(engine, direct=True))
    backend = setup.backend(node, engine)
    for _ in range(20):
        requests = [reading(start, 16384) for start in range(0, SIZE, 16384)]
        left = expect(requests)
        thread = threading.Thread(target=backend.submit, args=(requests,))
        thread.start()
        thread.join()
        for _ in requests:
            assert left.acquire(timeout=30)
        for one in requests:
            assert one.status == 0
            assert data_of(one) == data[one.offset : one.offset + 16384]


def test_many_threads(setup: Setup, engine: str) -> None:
    """Several threads submit at the same time, and each gets its own bytes."""
    data = random.Random(5).randbytes(SIZE)
    node = setup.open(setup.raw(data), cache=cache_for(engine))
    file_below(node)._can_nowait = False
    backend = setup.backend(node, engine, entries=16)
    wrong: list[object] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(40):
            requests = [reading(dice.randrange(0, 255) * 4096, 4096) for _ in range(9)]
            left = expect(requests)
            backend.submit(requests)
            for _ in requests:
                if not left.acquire(timeout=30):
                    wrong.append("lost")
                    return
            wrong.extend(one for one in requests if data_of(one) != data[one.offset : one.offset + 4096])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def left_behind() -> tuple[int, int, int]:
    """Descriptors, threads and mappings of rings."""
    maps = Path("/proc/self/maps").read_text()
    return (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        maps.count("io_uring") + maps.count("[aio]"),
    )


@pytest.mark.parametrize("attended", [False, True])
def test_nothing_is_left(setup: Setup, engine: str, attended: bool) -> None:
    """Closing gives descriptors, threads and mappings back, used or not; a second close does nothing."""
    path = setup.raw(bytes(SIZE))
    before = left_behind()
    for turn in range(12):
        node = setup.open(path, cache=cache_for(engine))
        file_below(node)._can_nowait = False
        backend = BlockBackend(node, engine=engine)
        backend.start()
        if attended:
            assert backend.attend()
        if turn % 3:
            requests: list[Request] = [reading(start, 4096) for start in range(0, SIZE, 65536)]
            if turn % 3 == 2:
                requests += [Request(Op.ZERO, 0, 100), Request(Op.FLUSH)]
            backend.submit(requests)
            assert backend.drain(None if attended else 30)
        backend.close()
        backend.close()
    assert left_behind() == before


def broken(kind: str) -> tuple[FileProtocol, Request]:
    """A file on which a request fails, and the request."""
    if kind == "full":
        file = FileProtocol(os.open("/dev/full", os.O_RDWR), "/dev/full", readonly=False)
        file._size = SIZE
        return file, writing(4096, b"x" * 4096)
    file = FileProtocol(os.open("/tmp", os.O_RDONLY), "/tmp")
    file._size = SIZE
    return file, reading(4096, 4096)


@pytest.mark.parametrize("kind", ["full", "directory"])
def test_errors_are_the_same(setup: Setup, engine: str, kind: str) -> None:
    """A request fails with the status that it fails with on threads."""
    statuses = []
    for name in ("threads", engine):
        file, request = broken(kind)
        file.direct = True  # so that native takes it
        backend = setup.backend(RawNode(file, owned=[file]), name)
        carry(backend, [request])
        statuses.append(request.status)
        file._written = file._flushed  # there is nothing to flush on such a thing
    assert statuses[0] == statuses[1] != 0


LIMITED = """
import resource, sys
from aio_kit import writing, carry
from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.open import open_node
path, engine = sys.argv[1:]
cache = CacheMode(direct=engine == "native")
node = open_node({"filename": path}, format="raw", readonly=False, cache=cache)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
backend = BlockBackend(node, engine=engine, cache=cache, werror="report")
requests = [writing(4096, b"a" * 4096), writing(131072, b"b" * 4096), writing(65536 - 512, b"c" * 1024)]
carry(backend, requests)
print(*[request.status for request in requests])
"""


def test_file_size_limit(setup: Setup, engine: str) -> None:
    """Writes beyond the limit of a file's size (ulimit -f) fail as they do on threads, those across it in part."""
    found = []
    for name in ("threads", engine):
        path = setup.raw(bytes(SIZE))
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, path, name],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
        )
        if "O_DIRECT" in done.stderr:
            pytest.skip("the file system of the tests has no O_DIRECT")
        found.append((done.stdout.split(), path.read_bytes()))
    assert found[0] == found[1]
    assert found[0][0] == ["0", str(errno.EFBIG), str(errno.EFBIG)]


def test_blkdebug(setup: Setup, engine: str) -> None:
    """Errors that blkdebug injects are told, although its requests never get to the kernel's queue."""
    pytest.importorskip("vm_blkdebug")
    from vm_core.block.open import open_node

    path = setup.raw(bytes(SIZE))
    rules = {"inject-error": [{"event": "read_aio", "errno": str(errno.ENODEV), "once": "on", "sector": "8"}]}
    node = open_node(
        {"driver": "raw", "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, **rules}},
        readonly=False,
        cache=cache_for(engine),
    )
    backend = setup.backend(node, engine)
    first, second = reading(4096, 512), reading(4096, 512)
    carry(backend, [first])
    carry(backend, [second])
    assert (first.status, second.status) == (errno.ENODEV, 0)


# What is refused


def test_native_needs_direct(setup: Setup) -> None:
    """Without O_DIRECT Linux AIO is refused in QEMU's words."""
    node = setup.open(setup.raw(bytes(SIZE)))
    backend = BlockBackend(node, engine="native")
    with pytest.raises(UsageError, match=r"^aio=native was specified, but it requires cache.direct=on, which was not"):
        backend.start()
    backend.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSYS, "this kernel has no io_uring, which Linux has since 5.1; aio=threads works everywhere"),
        (errno.EPERM, "io_uring is forbidden here .*aio=threads works everywhere"),
        (errno.ENOMEM, "ulimit -l.*aio=threads"),
    ],
)
def test_no_io_uring(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    """A kernel without io_uring, or one that forbids it, is told of in one line that says what works."""

    def refused(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(syscalls, "uring_setup", refused)
    with pytest.raises(UsageError, match=words) as caught:
        Ring(8)
    assert "\n" not in str(caught.value)


def test_too_many_for_aio() -> None:
    """More requests than the system has left for Linux AIO are refused by the setting's name."""
    try:
        Context(1).close()
    except UsageError as error:
        pytest.skip(str(error))
    limit = int(Path("/proc/sys/fs/aio-max-nr").read_text())
    with pytest.raises(UsageError, match=r"fs\.aio-max-nr"):
        Context(limit + 1)


@pytest.mark.parametrize("entries", ["0", "5000"])
def test_entries(setup: Setup, engine: str, entries: str) -> None:
    """A number of entries that makes no sense is refused."""
    node = setup.open(setup.raw(bytes(SIZE)), cache=cache_for(engine))
    backend = BlockBackend(node, engine=engine, engine_options={"entries": entries})
    with pytest.raises(UsageError, match="entries"):
        backend.start()
    backend.close()
