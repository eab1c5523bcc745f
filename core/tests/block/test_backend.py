"""BlockBackend: batches, cache modes, error policies, media, draining."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.backend import BlockBackend
from vm_core.block.cache import MODES, CacheMode
from vm_core.block.node import Buffer
from vm_core.block.open import open_node
from vm_core.block.raw import RawNode
from vm_core.block.request import Op, Request
from vm_core.errors import BlockError, FatalError, PluginError, UsageError
from vm_core.testing.nodes import FailingNode, MemoryNode, PassingNode

K = 1024


class Watching(PassingNode):
    """Notes every change and its fua flag."""

    def __init__(self, size: int = 64 * K) -> None:
        super().__init__(MemoryNode(bytes(size)))
        self.log: list[tuple[Any, ...]] = []

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        self.log.append(("write", offset, fua))
        super().write(offset, buffers, fua=fua)

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        self.log.append(("zero", offset, fua))
        super().zero(offset, length, unmap=unmap, fua=fua)

    def flush(self) -> None:
        self.log.append(("flush",))
        super().flush()


class Waiter:
    """Collects completed requests."""

    def __init__(self) -> None:
        self.done: list[Request] = []
        self.batches: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, batch: list[Request]) -> None:
        with self._changed:
            self.done += batch
            self.batches.append(len(batch))
            self._changed.notify_all()

    def wait(self, count: int) -> list[Request]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.done) >= count, 10), f"{len(self.done)} of {count}"
            return self.done


def write(offset: int, data: bytes, **how: Any) -> Request:
    return Request(Op.WRITE, offset, len(data), (memoryview(data),), **how)


def test_a_medium_is_whole_sectors(tmp_path: Path) -> None:
    """Where a file ends in a sector all of that is there: zeroes behind the end, until the guest writes them."""
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 700)
    waiter = Waiter()
    backend = BlockBackend(open_node(str(path), format="raw", readonly=False))
    backend.set_completion_sink(waiter)
    assert backend.size == 1024
    read = Request(Op.READ, 512, 512, (memoryview(bytearray(b"x" * 512)),))
    backend.submit([read])
    assert waiter.wait(1)[0].status == 0
    assert bytes(read.buffers[0]) == b"a" * 188 + bytes(324)
    backend.submit([Request(Op.READ, 512, 513, (memoryview(bytearray(513)),)), write(1000, b"b" * 25)])
    assert [one.status for one in waiter.wait(3)[1:]] == [errno.EIO, errno.EIO]
    backend.submit([Request(Op.DISCARD, 512, 512), Request(Op.DISCARD, 1000, 24)])
    assert [one.status for one in waiter.wait(5)[3:]] == [0, 0]
    backend.submit([write(512, b"b" * 512)])
    assert waiter.wait(6)[5].status == 0
    backend.close()
    assert path.read_bytes() == b"a" * 512 + b"b" * 512


def test_batches_complete_once_each(tmp_path: Path) -> None:
    """Hundreds of requests in batches from two threads each complete exactly once, with the right bytes."""
    path = tmp_path / "disk"
    data = random.Random(3).randbytes(1 << 20)
    path.write_bytes(data)
    backend = BlockBackend(open_node(str(path), format="raw"))
    waiter = Waiter()
    backend.set_completion_sink(waiter)

    def submit(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            batch = []
            for _ in range(20):
                length = chance.randrange(1, 9000)
                offset = chance.randrange((1 << 20) - length)
                batch.append(Request(Op.READ, offset, length, (memoryview(bytearray(length)),)))
            backend.submit(batch)

    threads = [threading.Thread(target=submit, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.drain()
    done = waiter.wait(1200)
    assert len(done) == 1200
    assert len({id(request) for request in done}) == 1200
    assert all(bytes(r.buffers[0]) == data[r.offset : r.offset + r.length] for r in done)
    assert backend.stats.reads == 1200
    assert backend.stats.read_bytes == sum(r.length for r in done)
    assert backend.inflight == 0
    backend.close()


def test_done_is_called_without_a_sink() -> None:
    """A request's own callback is the completion where no sink is set."""
    backend = BlockBackend(MemoryNode(bytes(K)))
    event = threading.Event()
    backend.submit([write(0, b"abc", done=lambda request: event.set())])
    assert event.wait(10)
    assert backend.read(0, 3) == b"abc"
    backend.close()


@pytest.mark.parametrize("mode", sorted(MODES))
def test_cache_modes(mode: str) -> None:
    """writethrough and directsync make each change stable; the others flush when asked; unsafe never does."""
    node = Watching()
    backend = BlockBackend(node, cache=CacheMode.parse(mode))
    through = mode in ("writethrough", "directsync")
    assert backend.write_cache is not through
    backend.write(0, b"x")
    backend.zero(K, 10)
    assert node.log == [("write", 0, through), ("zero", K, through)]
    backend.write(0, b"x", fua=True)
    assert node.log[-1] == ("write", 0, mode != "unsafe")
    node.log = []
    backend.flush()
    assert node.log == ([] if mode == "unsafe" else [("flush",)])
    backend.close()


def test_unknown_words_are_refused() -> None:
    """Cache modes, policies and engines are refused by name."""
    with pytest.raises(UsageError, match=r"cache mode 'writebck'.*writeback"):
        CacheMode.parse("writebck")
    with pytest.raises(UsageError, match="rerror=enospc"):
        BlockBackend(None, rerror="enospc")
    with pytest.raises(UsageError, match="werror=explode"):
        BlockBackend(None, werror="explode")
    backend = BlockBackend(MemoryNode(bytes(K)), engine="io_urinf")
    with pytest.raises(PluginError, match="io_urinf"):
        backend.submit([Request(Op.FLUSH)])
    assert CacheMode.parse("none") == CacheMode(direct=True)
    assert CacheMode(direct=True, writethrough=True).name == "directsync"


def test_write_cache_off_flushes_first() -> None:
    """Switching the write cache off makes what it held stable, and every later write."""
    node = Watching()
    backend = BlockBackend(node)
    backend.write(0, b"x")
    backend.write_cache = False
    assert node.log == [("write", 0, False), ("flush",)]
    backend.write(1, b"x")
    assert node.log[-1] == ("write", 1, True)
    backend.write_cache = True
    backend.write(2, b"x")
    assert node.log[-1] == ("write", 2, False)
    event = threading.Event()
    backend.set_write_cache(False, lambda request: event.set())
    assert event.wait(10)
    assert node.log[-1:] == [("flush",)]
    backend.close()


def failing(code: int, *operations: str) -> tuple[FailingNode, Callable[[], None]]:
    broken = True

    def mend() -> None:
        nonlocal broken
        broken = False

    return (
        FailingNode(
            MemoryNode(bytes(64 * K)), lambda operation, o, n: code if broken and operation in operations else 0
        ),
        mend,
    )


@pytest.mark.parametrize(
    ("policy", "code", "action"),
    [
        ("report", errno.EIO, "report"),
        ("ignore", errno.EIO, "ignore"),
        ("stop", errno.EIO, "stop"),
        ("enospc", errno.ENOSPC, "stop"),
        ("enospc", errno.EIO, "report"),
    ],
)
def test_write_error_policies(policy: str, code: int, action: str) -> None:
    """A failed write is reported, ignored, or kept for a retry that succeeds once the cause is gone."""
    node, mend = failing(code, "write")
    backend = BlockBackend(node, werror=policy)
    waiter, told = Waiter(), []
    backend.set_completion_sink(waiter)
    backend.on_error.append(lambda request, what: told.append((request.status, what)))
    backend.submit([write(0, b"data")])
    assert backend.drain(10)
    assert told == [(0 if action == "ignore" else code, action)]
    if action == "stop":
        assert not waiter.done
        assert backend.stopped_requests == 1
        mend()
        backend.retry()
        assert waiter.wait(1)[0].status == 0
        assert backend.read(0, 4) == b"data"
        assert backend.stopped_requests == 0
    else:
        assert waiter.wait(1)[0].status == (0 if action == "ignore" else code)
    backend.close()


def test_read_errors_have_their_own_policy() -> None:
    """rerror decides about reads, werror about all else."""
    node, mend = failing(errno.EIO, "read", "flush")
    backend = BlockBackend(node, rerror="stop", werror="report")
    waiter = Waiter()
    backend.set_completion_sink(waiter)
    backend.submit([Request(Op.READ, 0, 4, (memoryview(bytearray(4)),)), Request(Op.FLUSH)])
    assert backend.drain(10)
    assert [(r.op, r.status) for r in waiter.done] == [(Op.FLUSH, errno.EIO)]
    assert [r.op for r in backend.cancel_stopped()] == [Op.READ]
    assert backend.stats.failed_flushes == 1
    mend()
    backend.close()


def test_a_driver_s_bug_is_an_io_error(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception that nobody expects fails the request and shows its traceback; the engine goes on."""

    class Broken(PassingNode):
        def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
            raise ZeroDivisionError

    backend = BlockBackend(Broken(MemoryNode(bytes(K))))
    waiter = Waiter()
    backend.set_completion_sink(waiter)
    backend.submit([write(0, b"x")])
    assert waiter.wait(1)[0].status == errno.EIO
    assert "ZeroDivisionError" in capsys.readouterr().err
    backend.submit([Request(Op.FLUSH)])
    assert waiter.wait(2)[1].status == 0
    backend.close()


def test_what_ends_everything_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A FatalError fails its request, reaches whoever listens, and is kept; nothing is printed."""

    class Different(PassingNode):
        def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
            raise FatalError("the images differ")

    backend = BlockBackend(Different(MemoryNode(bytes(K))))
    told: list[str] = []
    backend.on_fatal.append(lambda error: told.append(str(error)))
    waiter = Waiter()
    backend.set_completion_sink(waiter)
    backend.submit([Request(Op.READ, 0, 512, (memoryview(bytearray(512)),))])
    assert waiter.wait(1)[0].status == errno.EIO
    assert told == ["the images differ"] == [str(backend.fatal)]
    assert capsys.readouterr().err == ""
    backend.close()


def test_requests_past_the_end_fail() -> None:
    """Reads and writes that reach past the medium's end are I/O errors, wherever they start."""
    backend = BlockBackend(RawNode(MemoryNode(bytes(K))))
    waiter = Waiter()
    backend.set_completion_sink(waiter)
    buffer = memoryview(bytearray(K))
    backend.submit([Request(Op.READ, 512, K, (buffer,)), Request(Op.WRITE, 512, K, (buffer,)), Request(Op.ZERO, K, 1)])
    assert [r.status for r in waiter.wait(3)] == [errno.EIO] * 3
    assert backend.size == K
    backend.close()


def test_media_change() -> None:
    """A removable drive changes media when nothing is in flight; a locked tray stays shut unless forced."""
    backend = BlockBackend(None, name="cd0", removable=True)
    changes: list[bool] = []
    backend.on_medium_change.append(changes.append)
    assert backend.size == 0
    with pytest.raises(BlockError) as caught:
        backend.read(0, 1)
    assert caught.value.code == errno.ENOMEDIUM
    disc = MemoryNode(b"disc" * 100, readonly=True)
    assert backend.set_medium(disc) is None
    assert backend.readonly
    assert backend.read(0, 4) == b"disc"
    backend.locked = True
    with pytest.raises(UsageError, match="cd0 is locked"):
        backend.eject()
    assert backend.eject(force=True) is disc
    assert backend.tray_open
    assert changes == [True, False]
    fixed = BlockBackend(MemoryNode(bytes(K)), name="hd0")
    with pytest.raises(UsageError, match="not removable"):
        fixed.eject()
    backend.close()
    fixed.close()


def test_resize_tells_the_device() -> None:
    """Listeners get the new size."""
    backend = BlockBackend(RawNode(MemoryNode(bytes(K))))
    sizes: list[int] = []
    backend.on_resize.append(sizes.append)
    backend.resize(4 * K)
    assert sizes == [4 * K]
    assert backend.size == 4 * K
    backend.close()


def test_read_only_drive_refuses_writes() -> None:
    """A read-only backend on a writable node fails every change with EACCES."""
    backend = BlockBackend(MemoryNode(bytes(K)), readonly=True)
    changes: list[Callable[[], None]] = [
        lambda: backend.write(0, b"x"),
        lambda: backend.zero(0, 1),
        lambda: backend.discard(0, 1),
    ]
    for change in changes:
        with pytest.raises(BlockError) as caught:
            change()
        assert caught.value.code == errno.EACCES
    backend.flush()
    backend.close()


def test_slow_requests_do_not_hold_up_others() -> None:
    """While a flush takes its time, reads and writes submitted with it and after it go on."""
    release = threading.Event()

    class Slow(PassingNode):
        def flush(self) -> None:
            release.wait(10)

    backend = BlockBackend(Slow(MemoryNode(bytes(K))))
    waiter = Waiter()
    backend.set_completion_sink(waiter)
    backend.submit([Request(Op.FLUSH), write(0, b"a"), write(1, b"b")])
    backend.submit([write(2, b"c")])
    assert {r.op for r in waiter.wait(3)} == {Op.WRITE}
    assert not backend.drain(0.05)
    release.set()
    assert backend.drain(10)
    assert backend.read(0, 3) == b"abc"
    backend.close()


def test_submitting_does_not_block() -> None:
    """With every worker stuck in the host's I/O, submitting returns at once."""
    release = threading.Event()

    class Stuck(PassingNode):
        def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
            release.wait(10)
            super().write(offset, buffers, fua=fua)

    backend = BlockBackend(Stuck(MemoryNode(bytes(K))))
    started = time.monotonic()
    for number in range(100):
        backend.submit([write(number, b"x", fua=True)])
    assert time.monotonic() - started < 2
    release.set()
    assert backend.drain(10)
    assert backend.stats.writes == 100
    backend.close()


def test_close_leaves_no_threads(tmp_path: Path) -> None:
    """After close there are no workers, and the medium is closed."""
    before = threading.active_count()
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    backend = BlockBackend(open_node(str(path), readonly=False, format="raw"))
    backend.submit([write(0, b"x", fua=True) for _ in range(50)])
    backend.close()
    backend.close()
    assert threading.active_count() == before
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert path.read_bytes()[:1] == b"x"
    with pytest.raises(UsageError, match="closed"):
        backend.submit([Request(Op.FLUSH)])
