"""What the engines' tests share: images, backends, page-aligned memory, and a kernel that does as it is told."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Condition, Event
from typing import Any

import pytest

from vm_aio.engine import KernelEngine
from vm_aio.memory import VECTOR
from vm_aio.queue import KernelQueue
from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.engine import EngineHost
from vm_core.block.file import FileProtocol
from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Node
from vm_core.block.open import OpenContext, open_node
from vm_core.block.request import Op, Request
from vm_core.errors import ImageError, UsageError
from vm_core.testing.toy import Toy

LONG = os.environ.get("VM_LONG", "") not in ("", "0")


def skip_unless_supported(name: str) -> None:
    """Skip where the kernel refuses the engine: containers often forbid io_uring."""
    backend = BlockBackend(None, engine=name)
    try:
        backend.start()
    except UsageError as error:
        pytest.skip(str(error))
    finally:
        backend.close()


def memory(length: int) -> memoryview:
    """*length* bytes that start on a page."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]


def reading(offset: int, length: int, **more: Any) -> Request:
    return Request(Op.READ, offset, length, (memory(length),), **more)


def writing(offset: int, data: bytes, **more: Any) -> Request:
    view = memory(len(data))
    view[:] = data
    return Request(Op.WRITE, offset, len(data), (view,), **more)


def data_of(request: Request) -> bytes:
    """The bytes of a request's buffers."""
    return b"".join(request.buffers)


def carry(backend: BlockBackend, requests: Sequence[Request], timeout: float = 30) -> None:
    """Submit requests and wait for all of them."""
    left, done = [len(requests)], Event()

    def finished(request: Request) -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    for request in requests:
        request.done = finished
        request.status = -1
    backend.submit(requests)
    assert done.wait(timeout), f"{left[0]} requests were not completed"
    assert backend.drain(timeout)


class Setup:
    """Images in a folder, and what was opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: list[BlockBackend] = []
        self._kernels: list[Scripted] = []

    def raw(self, data: bytes, name: str = "disk.raw") -> Path:
        """A raw image."""
        path = self.folder / name
        path.write_bytes(data)
        return path

    def toy(
        self, size: int, *, cluster: int = 4096, cache: CacheMode | None = None, backing: Node | None = None
    ) -> Node:
        """A new image of core's test format."""
        path = self.folder / "disk.toy"
        with path.open("wb"):
            pass
        plain = open_node({"driver": "file", "filename": str(path)}, readonly=False)
        Toy.create(plain, size, {"cluster_size": cluster})
        plain.close()
        file = open_node(
            {"driver": "file", "filename": str(path)}, readonly=False, cache=cache or CacheMode(), share_writes=True
        )
        toy = Toy.open(file, {}, OpenContext(readonly=False))
        node = FormatNode(toy, driver="toy", backing=backing, owned=[file])
        return node

    def open(self, path: Path, *, format: str = "raw", cache: CacheMode | None = None, readonly: bool = False) -> Node:
        """Open an image; skips where the file system has no O_DIRECT."""
        try:
            return open_node({"filename": str(path)}, format=format, readonly=readonly, cache=cache or CacheMode())
        except ImageError as error:
            if "O_DIRECT" in str(error):
                pytest.skip("the file system of the tests has no O_DIRECT")
            raise

    def backend(self, node: Node, engine: str, *, cache: CacheMode | None = None, **options: Any) -> BlockBackend:
        """A backend on *node*, closed with the test."""
        backend = BlockBackend(node, engine=engine, cache=cache or CacheMode(), engine_options=options, werror="report")
        self._open.append(backend)
        backend.start()
        return backend

    def scripted(self, node: Node, kernel: Scripted, **more: Any) -> BlockBackend:
        """A backend whose engine's kernel is *kernel*."""

        class ScriptedEngine(KernelEngine):
            name = "scripted"

            def make_queue(self, host: EngineHost, entries: int) -> KernelQueue:
                return kernel

        self._kernels.append(kernel)
        backend = BlockBackend(node, werror="report", **more)
        backend._engine = ScriptedEngine(backend, {})
        self._open.append(backend)
        return backend

    def close(self) -> None:
        for kernel in self._kernels:
            kernel.let_go()
        for backend in self._open:
            # One that lost a request would wait for ever.
            assert backend.drain(10), f"{backend.inflight} requests were not completed"
            backend.close()


def cache_for(engine: str, *, direct: bool = False) -> CacheMode:
    """The page cache where the engine can do with it."""
    return CacheMode(direct=direct or engine == "native")


#: Decides about one entry: (write, offset, length) → how many bytes are moved, or a negative errno.
Verdict = Callable[[bool, int, int], int]


class Scripted(KernelQueue):
    """A kernel that moves as many bytes of each entry as it is told to, when it is told to."""

    quick = True

    def __init__(self, slots: int = 8, verdict: Verdict | None = None) -> None:
        self.slots = slots
        self.verdict = verdict or (lambda write, offset, length: length)
        #: Entries that were pushed: (write, offset, length, stable).
        self.seen: list[tuple[bool, int, int, bool]] = []
        #: While set, entries are pushed and do not finish.
        self.held = False
        self._put: list[tuple[int, bool, int, list[tuple[int, int]], int, bool]] = []
        self._waiting: list[tuple[int, bool, int, list[tuple[int, int]], int, bool]] = []
        self._done: deque[tuple[int, int]] = deque()
        self._changed = Condition()
        self._closing = False
        self.most = 0

    def put(self, slot: int, write: bool, fd: int, vectors: int, count: int, offset: int, stable: bool) -> None:
        raw = ctypes.string_at(vectors, VECTOR.size * count)
        self._put.append((slot, write, fd, list(VECTOR.iter_unpack(raw)), offset, stable))

    def push(self) -> list[tuple[int, int]]:
        with self._changed:
            for entry in self._put:
                _, write, _, vectors, offset, stable = entry
                self.seen.append((write, offset, sum(length for _, length in vectors), stable))
                self._waiting.append(entry)
            self._put.clear()
            self.most = max(self.most, len(self._waiting))
            if not self.held:
                self._finish()
        return []

    def let_go(self) -> None:
        """What is held finishes, and what comes no longer is held."""
        with self._changed:
            self.held = False
            self._finish()

    def _finish(self) -> None:
        for slot, write, fd, vectors, offset, _ in self._waiting:
            length = sum(size for _, size in vectors)
            count = self.verdict(write, offset, length)
            if count > 0:
                buffers = [(ctypes.c_char * size).from_address(address) for address, size in vectors]
                views, left = [], count
                for buffer in buffers:
                    views.append(memoryview(buffer).cast("B")[: max(left, 0)])
                    left -= len(views[-1])
                count = os.pwritev(fd, views, offset) if write else os.preadv(fd, views, offset)
            self._done.append((slot, count))
        self._waiting.clear()
        self._changed.notify_all()

    def reap(self) -> list[tuple[int, int]]:
        with self._changed:
            found = list(self._done)
            self._done.clear()
        return found

    def wait(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._done or self._closing)
        return not self._closing

    def push_and_wait(self) -> list[tuple[int, int]]:
        self.push()
        with self._changed:
            self._changed.wait_for(lambda: self._done)
        return []

    def fileno(self) -> int:
        raise NotImplementedError

    def clear(self) -> None:
        pass

    def stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self) -> None:
        assert not self._waiting


def file_below(node: Node) -> FileProtocol:
    """The file at the bottom of *node*."""
    while not isinstance(node, FileProtocol):
        node = next(iter(node.children().values()))
    return node
