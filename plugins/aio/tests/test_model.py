"""Many requests in flight leave and return the bytes that a model says."""

from __future__ import annotations

import random
import subprocess
from collections import defaultdict
from pathlib import Path
from queue import SimpleQueue

import pytest
from aio_kit import LONG, Setup, cache_for, carry, data_of, memory, reading, writing

from vm_core.block.backend import BlockBackend
from vm_core.block.node import Node
from vm_core.block.open import create_image
from vm_core.block.request import Op, Request
from vm_core.testing.iopeer import PEER_IMG as PEER

SIZE = 4 << 20
STEPS = 20_000 if LONG else 1500
DEPTH = 48


class Driver:
    """Keeps random requests in flight, never two of which at least one is a change on the same bytes."""

    def __init__(self, backend: BlockBackend, size: int, seed: int, align: int) -> None:
        self.backend = backend
        self.model = bytearray(backend.node.pread(0, size) if backend.node else b"")
        self.random = random.Random(seed)
        self.size = size
        self.align = align
        self.flying: dict[Request, bytes] = {}
        self.batches: SimpleQueue[list[Request]] = SimpleQueue()
        self.counts: defaultdict[str, int] = defaultdict(int)
        backend.set_completion_sink(self.batches.put)

    def run(self, steps: int) -> None:
        """Send *steps* requests and check each answer."""
        sent = 0
        while sent < steps or self.flying:
            batch: list[Request] = []
            while sent < steps and len(self.flying) < DEPTH and len(batch) < 16:
                request = self.propose()
                if request is not None:
                    batch.append(request)
                sent += 1
            if batch:
                self.backend.submit(batch)
            if self.flying:
                for request in self.batches.get():
                    self.check(request)

    def free(self, op: Op, start: int, end: int) -> bool:
        return not any(
            other.offset < end and start < other.offset + other.length
            for other in self.flying
            if op is not Op.READ or other.op is not Op.READ
        )

    def propose(self) -> Request | None:
        """A request that disturbs none in flight; None where the dice fell on one that does."""
        dice = self.random
        op = dice.choice((Op.READ, Op.READ, Op.READ, Op.WRITE, Op.WRITE, Op.WRITE, Op.DISCARD, Op.ZERO, Op.FLUSH))
        if op is Op.FLUSH:
            request = Request(op)
            self.flying[request] = b""
            return request
        unit = self.align if dice.random() < 0.7 else dice.choice((512, 4096))
        length = -(-dice.choice((1, 512, 4096, 4096, 4096, 9000, 65536, 300_000)) // unit) * unit
        offset = dice.randrange(0, (self.size - length) // unit) * unit
        if not self.free(op, offset, offset + length):
            return None
        if op is Op.READ:
            pieces = self.random.choice((1, 1, 3))
            buffers = self.cut(memory(length), pieces)
            request = Request(op, offset, length, buffers)
            self.flying[request] = bytes(self.model[offset : offset + length])
        elif op is Op.WRITE:
            data = dice.randbytes(min(length, 64)) * (length // 64 + 1)
            view = memory(length)
            view[:] = data[:length]
            source = view.toreadonly() if dice.random() < 0.3 else view
            request = Request(op, offset, length, self.cut(source, dice.choice((1, 1, 2))), fua=dice.random() < 0.1)
            self.flying[request] = data[:length]
        else:
            request = Request(op, offset, length, unmap=dice.random() < 0.5)
            self.flying[request] = b""
        return request

    def cut(self, view: memoryview, pieces: int) -> list[memoryview]:
        step = max(self.align, len(view) // pieces // self.align * self.align)
        return [view[start : start + step] for start in range(0, len(view), step)]

    def check(self, request: Request) -> None:
        expected = self.flying.pop(request)
        self.counts[request.op.name] += 1
        assert request.status == 0, request
        start, end = request.offset, request.offset + request.length
        if request.op is Op.READ:
            assert data_of(request) == expected, request
        elif request.op is Op.WRITE:
            self.model[start:end] = expected
        elif request.op is Op.ZERO:
            self.model[start:end] = bytes(end - start)
        elif request.op is Op.DISCARD:
            # It may have done something or not, here and there.
            assert self.backend.node is not None
            found = self.backend.node.pread(start, end - start)
            before = self.model[start:end]
            assert all(new in (0, old) for new, old in zip(found, before, strict=True)), request
            self.model[start:end] = found


def qcow2(setup: Setup, *, backing: bool, **options: str) -> Path:
    pytest.importorskip("vm_qcow2")
    path = setup.folder / "disk.qcow2"
    if backing:
        base = setup.raw(random.Random(7).randbytes(SIZE), "base.raw")
        options |= {"backing_file": str(base), "backing_fmt": "raw"}
    create_image(str(path), "qcow2", SIZE, dict(options))
    return path


def image(setup: Setup, kind: str, engine: str, direct: bool) -> tuple[Node, Path]:
    cache = cache_for(engine, direct=direct)
    if kind == "raw":
        path = setup.raw(random.Random(1).randbytes(SIZE))
        return setup.open(path, cache=cache), path
    if kind == "toy":
        try:
            return setup.toy(SIZE, cache=cache), setup.folder / "disk.toy"
        except Exception as error:
            if "O_DIRECT" in str(error):
                pytest.skip("the file system of the tests has no O_DIRECT")
            raise
    path = qcow2(setup, backing=kind == "overlay", cluster_size="4096" if kind == "small" else "65536")
    return setup.open(path, format="qcow2", cache=cache), path


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["raw", "toy", "qcow2", "small", "overlay"])
def test_model(setup: Setup, engine: str, kind: str, direct: bool) -> None:
    """Random reads, writes, discards, zeroes and flushes, 48 in flight, do what a bytearray does; so does the peer."""
    if engine == "native" and not direct:
        pytest.skip("Linux AIO is for O_DIRECT alone")
    node, path = image(setup, kind, engine, direct)
    backend = setup.backend(node, engine, entries=32)
    driver = Driver(backend, SIZE, seed=len(kind) + direct, align=512 if direct else 1)
    driver.run(STEPS)
    assert all(driver.counts[op.name] for op in Op), driver.counts
    assert node.pread(0, SIZE) == driver.model
    backend.close()
    if kind != "toy" and PEER is not None:
        wanted = setup.raw(bytes(driver.model), "wanted.raw")
        format = "raw" if kind == "raw" else "qcow2"
        subprocess.run([PEER, "compare", "-q", "-f", "raw", "-F", format, wanted, path], check=True)
        if format == "qcow2":
            subprocess.run([PEER, "check", "-q", path], check=True)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_overlapping(setup: Setup, engine: str, kind: str) -> None:
    """Of overlapping writes in flight together each byte is one's; nothing of before shines through a covered range."""
    node, _ = image(setup, kind, engine, engine == "native")
    backend = setup.backend(node, engine)
    dice = random.Random(3)
    for _ in range(200 if LONG else 20):
        base = dice.randrange(0, SIZE // 65536 - 4) * 65536
        spans = []
        for value in range(1, 25):
            start = base + dice.randrange(0, 128) * 512
            spans.append((start, start + dice.randrange(1, 200) * 512, value))
        requests = [writing(start, bytes([value]) * (end - start)) for start, end, value in spans]
        requests[5:5] = [Request(Op.FLUSH), reading(base, 65536)]
        carry(backend, requests)
        assert all(request.status == 0 for request in requests)
        found = node.pread(base, 4 * 65536)
        for sector in range(0, len(found), 512):
            writers = {value for start, end, value in spans if start <= base + sector < end}
            if writers:
                assert set(found[sector : sector + 512]) <= writers


def test_discard_in_between(setup: Setup, engine: str) -> None:
    """Reads in flight across discards and new allocations of the same clusters see old bytes, zeroes or new ones."""
    node, path = image(setup, "small", engine, engine == "native")
    backend = setup.backend(node, engine)
    carry(backend, [writing(start, b"\x11" * 65536) for start in range(0, 1 << 20, 65536)])
    dice = random.Random(9)
    for turn in range(300 if LONG else 40):
        where = dice.randrange(0, 1 << 8) * 4096
        other = dice.randrange(0, 1 << 8) * 4096
        reads = [reading(where, 4096) for _ in range(4)]
        # The write may be given the very cluster that the discard gives back.
        changes = [Request(Op.DISCARD, where, 4096), writing(other, bytes([0x20 + turn % 8]) * 4096)]
        batch = [reads[0], *changes, *reads[1:]]
        dice.shuffle(batch)
        carry(backend, batch)
        for read in reads:
            values = set(data_of(read))
            assert read.status == 0
            assert len(values) == 1, "half of one and half of another"
    backend.close()
    if PEER is not None:
        subprocess.run([PEER, "check", "-q", path], check=True)
