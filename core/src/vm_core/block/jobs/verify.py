"""Verify: whether an image still holds what a manifest of it says, block by block.

Theory of operation. A manifest (:mod:`.manifest`) has a digest for each block of what the guest sees, through all
backing images. So it does not depend on the format: the manifests of a raw image and of a compressed one with the same
bytes are the same. What metadata says is zero is not read, and blocks are read and hashed by several threads
(``hashlib`` lets the others run meanwhile). What is kept is a digest a block, and nothing else.

The digest of the image's bytes themselves, which ``sha256sum`` and ``b2sum`` give for a raw image, is the ``sum``. It
takes each byte in turn, zeroes too, and is made where it is asked for only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from ...errors import UsageError
from ..mapping import Kind
from ..node import Node
from . import pipeline
from .convert import CopyError
from .job import Job
from .manifest import ALGORITHMS, MOST_BLOCK, Manifest, count_blocks
from .memory import page_buffer
from .source import Request, Source, read_request, requests
from .zeroes import all_zero

if TYPE_CHECKING:
    from hashlib import _Hash

#: What a block has if nothing was said, of an image that is not too large for it.
BLOCK = 1 << 20
#: Larger blocks are taken before there are as many as this.
SOME = 1 << 20
#: Bytes that a thread reads at a time.
STEP = 2 << 20
_ZEROES = bytes(1 << 20)


class Range(NamedTuple):
    """Guest bytes; *reason* where they could not be read."""

    offset: int
    length: int
    reason: str = ""


class Verification(NamedTuple):
    """What came of comparing an image with a manifest of it."""

    #: What the image holds now.
    manifest: Manifest
    #: Runs of blocks that hold something else, and of such as could not be read; ascending.
    differences: list[Range]
    unreadable: list[Range]
    #: The sizes differ.
    resized: bool
    #: The sum was asked for, and is another one.
    sum_differs: bool = False

    @property
    def same(self) -> bool:
        """The image holds what it held."""
        return not (self.differences or self.unreadable or self.resized or self.sum_differs)


def default_block(size: int) -> int:
    """The block size for an image of *size* bytes where none is asked for."""
    block = BLOCK
    while -(-size // block) > SOME and block < MOST_BLOCK:
        block *= 2
    return block


def make_manifest(
    node: Node,
    *,
    algorithm: str = "sha256",
    block_size: int | None = None,
    with_sum: bool = False,
    job: Job | None = None,
    workers: int = 8,
) -> Manifest:
    """The manifest of what *node* shows. Raises UsageError, CopyError (something cannot be read), Cancelled."""
    block = default_block(node.size) if block_size is None else block_size
    found, unreadable = _hash(node, algorithm, block, with_sum, job or Job(), workers)
    if unreadable:
        raise unreadable[min(unreadable)]
    return found


def verify(
    node: Node, manifest: Manifest, *, with_sum: bool = False, job: Job | None = None, workers: int = 8
) -> Verification:
    """Compare what *node* shows with *manifest*; all differences are found. Raises Cancelled."""
    block = manifest.block_size
    now, unreadable = _hash(node, manifest.algorithm, block, with_sum, job or Job(), workers)
    width = ALGORITHMS[manifest.algorithm]
    common = min(len(now.present), len(manifest.present))
    differs = bytearray(common)
    for start in range(0, common, 4096):
        stop = min(start + 4096, common)
        same = now.present[start:stop] == manifest.present[start:stop]
        if same and now.digests[start * width : stop * width] == manifest.digests[start * width : stop * width]:
            continue
        for number in range(start, stop):
            differs[number] = now.at(number) != manifest.at(number) and number not in unreadable
    size = min(now.size, manifest.size)
    if manifest.size < now.size and size % block and differs[-1] and _end_is_same(node, manifest):
        differs[-1] = 0
    found = [Range(first * block, min(after * block, size) - first * block) for first, after in _runs(differs)]
    bad = [
        Range(number * block, min(block, now.size - number * block), error.text)
        for number, error in sorted(unreadable.items())
    ]
    resized = now.size != manifest.size
    # A sum is of no use where something is missing.
    other = bool(with_sum and manifest.sum and not bad and now.sum != manifest.sum)
    return Verification(now, found, bad, resized, other)


def _end_is_same(node: Node, manifest: Manifest) -> bool:
    """Whether an image that has grown holds what the manifest says of its former end, which was a part of a block."""
    last = len(manifest.present) - 1
    data = bytearray(manifest.size - last * manifest.block_size)
    node.read(last * manifest.block_size, (memoryview(data),))
    if all_zero(data, 0, len(data)):
        return not manifest.present[last]
    return hashlib.new(manifest.algorithm, data).digest() == manifest.at(last)


def _runs(flags: bytearray) -> Iterator[tuple[int, int]]:
    """Runs (first, after) of flags that are set."""
    start = flags.find(1)
    while start >= 0:
        stop = flags.find(0, start)
        stop = len(flags) if stop < 0 else stop
        yield start, stop
        start = flags.find(1, stop)


def _hash(
    node: Node, algorithm: str, block_size: int, with_sum: bool, job: Job, workers: int
) -> tuple[Manifest, dict[int, CopyError]]:
    """What *node* holds, and the errors by the blocks that could not be read."""
    if algorithm not in ALGORITHMS:
        raise UsageError(f"algorithm '{algorithm}' is not known; there is: {', '.join(ALGORITHMS)}")
    return _Hasher(node, algorithm, block_size, with_sum, job, workers).run()


class _Hasher:
    """One pass over an image."""

    def __init__(self, node: Node, algorithm: str, block_size: int, with_sum: bool, job: Job, workers: int) -> None:
        self.node = node
        self.size = node.size
        self.algorithm = algorithm
        self.block_size = block_size
        self.job = job
        self.workers = workers
        self.width = ALGORITHMS[algorithm]
        count = count_blocks(self.size, block_size)
        self.digests = bytearray(count * self.width)
        self.present = bytearray(count)
        self.unreadable: dict[int, CopyError] = {}
        #: The sum so far, and how many bytes are in it.
        self.sum: _Hash | None = hashlib.new(algorithm) if with_sum else None
        self.summed = 0
        self._turns = pipeline.Turns() if with_sum else None
        self._lock = Lock()

    def run(self) -> tuple[Manifest, dict[int, CopyError]]:
        self.job.start(self.size)
        step = max(STEP, self.block_size)
        pipeline.run(
            requests(Source([self.node]).runs(), self.size, grain=self.block_size, step=step, zeroes=True),
            self._work,
            workers=pipeline.worker_count(self.workers) if self.size > STEP else 1,
            make_state=lambda: page_buffer(min(step, max(self.size, 1)), self.size),
            turns=self._turns,
        )
        total = ""
        if self.sum is not None:
            self._sum_zeroes(self.size)
            total = self.sum.hexdigest()
        self.job.finish()
        manifest = Manifest(self.size, self.block_size, self.algorithm, bytes(self.digests), bytes(self.present), total)
        return manifest, self.unreadable

    def _work(self, request: Request, buffer: bytearray) -> None:
        self.job.check()
        length = max(0, min(request.length, self.size - request.offset))
        if request.kind is Kind.DATA:
            with memoryview(buffer) as view:
                self._hash(request, view, buffer, length)
        if self._turns is not None:
            self._turns.wait(request.number)
            self._add(request, buffer, length)
            self._turns.done()
        self.job.advance(length)

    def _hash(self, request: Request, view: memoryview, buffer: bytearray, length: int) -> None:
        block, first = self.block_size, request.offset // self.block_size
        bad = self._read(request, view, length)
        for start in range(0, length, block):
            stop, number = min(start + block, length), first + start // block
            if number in bad or all_zero(buffer, start, stop):
                continue
            digest = hashlib.new(self.algorithm, view[start:stop]).digest()
            self.digests[number * self.width : (number + 1) * self.width] = digest
            self.present[number] = 1

    def _read(self, request: Request, view: memoryview, length: int) -> set[int]:
        """Read all of a request; where that fails block by block. Returns the blocks that could not be read."""
        try:
            read_request(request, view)
        except OSError:
            pass
        else:
            return set()
        block = self.block_size
        bad = set()
        for start in range(0, length, block):
            stop, offset = min(start + block, length), request.offset + start
            try:
                self.node.read(offset, (view[start:stop],))
            except OSError as error:
                number = offset // block
                bad.add(number)
                with self._lock:
                    self.unreadable[number] = CopyError("reading", offset, error)
        return bad

    def _add(self, request: Request, buffer: bytearray, length: int) -> None:
        """To the sum. It is this request's turn."""
        assert self.sum is not None
        self._sum_zeroes(request.offset)
        if request.kind is Kind.DATA:
            with memoryview(buffer) as view:
                self.sum.update(view[:length])
            self.summed += length

    def _sum_zeroes(self, end: int) -> None:
        assert self.sum is not None
        with memoryview(_ZEROES) as zeroes:
            while self.summed < end:
                self.job.check()
                count = min(len(_ZEROES), end - self.summed)
                self.sum.update(zeroes[:count])
                self.summed += count
