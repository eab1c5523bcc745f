"""A thread that hands its requests back by polling may call nodes directly, whatever its requests hold."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from aio_kit import LONG, Scripted, Setup, cache_for, file_below, memory, reading, skip_unless_supported, writing

from vm_core.block import attended
from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Node
from vm_core.block.request import Op, Request

SIZE = 1 << 16


def in_time(function: Callable[[], object], seconds: float = 20) -> None:
    """Call *function* on a thread of its own, which has to end: a standstill fails the test, not the run."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "standstill"
    if failures:
        raise failures[0]


def quiesce(node: Node) -> None:
    assert isinstance(node, FormatNode)
    with node.quiesce() as driver:
        node.flush()
        driver.info()


CALLS: dict[str, Callable[[BlockBackend, Node], object]] = {
    "discard": lambda backend, node: node.discard(4096, 8192),
    "zero": lambda backend, node: node.zero(4096, 4096, unmap=True),
    "truncate": lambda backend, node: node.truncate(SIZE * 2),
    "quiesce": lambda backend, node: quiesce(node),
    "reopen": lambda backend, node: (node.flush(), node.reopen(readonly=True), node.reopen(readonly=False)),
    "backend.discard": lambda backend, node: backend.discard(4096, 8192),
    "backend.zero": lambda backend, node: backend.zero(0, SIZE),
    "backend.resize": lambda backend, node: backend.resize(SIZE * 2),
    "backend.flush": lambda backend, node: backend.flush(),
    "drain": lambda backend, node: backend.drain(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_direct_calls(setup: Setup, op: Op, call: str) -> None:
    """What has to wait for the thread's own requests lets them finish; they are handed back by the next poll, each
    once, and not from within the call."""
    node = setup.toy(SIZE)
    node.pwrite(0, b"\x55" * SIZE)
    file_below(node)._can_nowait = False
    kernel = Scripted(slots=2)
    kernel.held = True
    backend = setup.scripted(node, kernel)
    finished: list[Request] = []
    backend.set_completion_sink(finished.extend)
    starts = range(0, 8 * 4096, 4096)
    requests = [reading(at, 4096) if op is Op.READ else writing(at, b"\x66" * 4096) for at in starts]

    def work() -> None:
        assert backend.attend()
        backend.submit(requests)
        letting_go = threading.Timer(0.1, kernel.let_go)
        letting_go.start()
        CALLS[call](backend, node)
        if call != "drain":
            assert not finished
        letting_go.join()
        while len(finished) < len(requests):
            backend.poll()
        assert backend.drain()
        backend.close(keep_medium=True)
        assert not attended.current.settlers

    in_time(work)
    assert sorted(map(id, finished)) == sorted(map(id, requests))
    assert {request.status for request in requests} == {0}
    if op is Op.READ:
        assert all(bytes(request.buffers[0]) == b"\x55" * 4096 for request in requests)


def test_parts_of_blocks(setup: Setup) -> None:
    """Under O_DIRECT too: a write of a part of a block waits for the block's transfers, which this thread finishes."""
    node = setup.open(setup.raw(bytes(SIZE)), cache=CacheMode(direct=True))
    kernel = Scripted()
    kernel.held = True
    backend = setup.scripted(node, kernel)

    def work() -> None:
        assert backend.attend()
        backend.submit([writing(0, b"\x11" * 4096)])
        letting_go = threading.Timer(0.1, kernel.let_go)
        letting_go.start()
        node.pwrite(100, b"\x22" * 7)
        letting_go.join()
        assert backend.drain()

    in_time(work)
    assert node.pread(0, 4096) == b"\x11" * 100 + b"\x22" * 7 + b"\x11" * 3989


def test_another_thread_that_waits(setup: Setup) -> None:
    """Another thread quiesces the image, waiting for a request of the polling one, and that one flushes behind it."""
    node = setup.toy(SIZE)
    node.pwrite(0, b"\x55" * SIZE)
    file_below(node)._can_nowait = False
    assert isinstance(node, FormatNode)
    kernel = Scripted()
    kernel.held = True
    backend = setup.scripted(node, kernel)
    quiet = threading.Thread(target=quiesce, args=(node,), daemon=True)

    def work() -> None:
        assert backend.attend()
        backend.submit([reading(0, 4096)])
        quiet.start()
        while node._ranges._exclusives == 0:
            pass
        letting_go = threading.Timer(0.1, kernel.let_go)
        letting_go.start()
        node.flush()
        node.pwrite(0, b"\x66" * 10)
        letting_go.join()
        assert backend.drain()

    in_time(work)
    quiet.join(10)
    assert not quiet.is_alive()
    assert node.pread(0, 11) == b"\x66" * 10 + b"\x55"


def test_other_threads_wait_as_ever(setup: Setup) -> None:
    """A thread that attends to nothing waits for the locks without touching the engine of another."""
    node = setup.toy(SIZE)
    node.pwrite(0, b"\x55" * SIZE)
    file_below(node)._can_nowait = False
    kernel = Scripted()
    backend = setup.scripted(node, kernel)
    done = threading.Event()

    def work() -> None:
        assert backend.attend()
        backend.submit([reading(0, 4096)])
        other = threading.Thread(target=lambda: (node.discard(0, 4096), done.set()), daemon=True)
        other.start()
        assert not done.wait(0.2), "the lock is held until this thread polls"
        backend.poll()
        assert done.wait(10)

    in_time(work)


@pytest.mark.parametrize("engine", ["io_uring", "native"])
@pytest.mark.parametrize("seed", range(20 if LONG else 4))
def test_mixed(setup: Setup, engine: str, seed: int) -> None:
    """Requests and direct calls of all kinds, mixed, on a real kernel: nothing stands still, every request comes back
    once, and the image holds what was written last."""
    skip_unless_supported(engine)
    chance = random.Random(seed)
    piece = 4096
    mode = cache_for(engine)
    node = setup.toy(SIZE, cache=mode)
    node.pwrite(0, b"\1" * (SIZE // 2))
    backend = setup.backend(node, engine, cache=mode)
    model = [1] * (SIZE // 2 // piece) + [0] * (SIZE // 2 // piece)
    finished: list[Request] = []
    sent: list[Request] = []
    backend.set_completion_sink(finished.extend)

    def settle() -> None:
        while len(finished) < len(sent):
            backend.poll()

    def work() -> None:
        assert backend.attend()
        for turn in range(120):
            batch = []
            for index in chance.sample(range(len(model)), chance.randrange(1, 6)):
                if chance.random() < 0.5:
                    model[index] = 2 + turn
                    view = memory(piece)
                    view[:] = bytes([2 + turn]) * piece
                    batch.append(Request(Op.WRITE, index * piece, piece, (view,)))
            sent.extend(batch)
            if batch:
                backend.submit(batch)
            busy = {request.offset // piece for request in batch}
            index = chance.choice([one for one in range(len(model)) if one not in busy])
            action = chance.randrange(7)
            if action == 0:
                node.flush()
            elif action == 1:
                node.discard(index * piece, piece)
                model[index] = 0
            elif action == 2:
                node.zero(index * piece + 7, piece - 7)
                node.pwrite(index * piece, bytes(7))
                model[index] = 0
            elif action == 3:
                quiesce(node)
            elif action == 4:
                backend.resize(SIZE)
            elif action == 5:
                assert node.pread(index * piece, 1)[0] in (model[index], *range(2 + turn + 1))
            else:
                backend.drain()
            settle()
        assert backend.drain()

    in_time(work, 60)
    assert len(finished) == len(sent)
    assert {request.status for request in sent} <= {0}
    found: Any = [node.pread(index * piece, piece) for index in range(len(model))]
    assert found == [bytes([value]) * piece for value in model]
