"""Verify: whether an image still holds what a manifest of it says, block by block.

Theory of operation. A manifest has the virtual size and a digest for each block of what the guest sees, through all
backing images; a block of zeroes has none. So it does not depend on the format: the manifests of a raw image and of a
compressed one with the same bytes are the same. What metadata says is zero is not read, and blocks are read and hashed
by several threads (``hashlib`` lets the others run meanwhile). What is kept is a digest a block, and nothing else.

``digest`` stands for all of it: the digest of all blocks' digests, one behind the other, with zeroes in the place of
those that are not there. It is part of the manifest, so a manifest that was damaged is noticed. The digest of the
image's bytes themselves, which ``sha256sum`` and ``b2sum`` give for a raw image, is the ``sum``. It takes each byte in
turn, zeroes too, and is made where it is asked for only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import UsageError, VmError
from ..mapping import Kind
from ..node import Node
from . import pipeline
from .convert import CopyError
from .job import Job
from .memory import page_buffer
from .source import Request, Source, read_request, requests
from .zeroes import all_zero

if TYPE_CHECKING:
    from hashlib import _Hash

#: Bytes of a digest by the names of the algorithms.
ALGORITHMS = {"sha256": 32, "blake2b": 64}
#: What a block has, at least and at most, and if nothing was said of an image that is not too large for it.
LEAST_BLOCK, MOST_BLOCK, BLOCK = 4096, 64 << 20, 1 << 20
#: A manifest has this many blocks at most; larger blocks are taken before there are as many as SOME.
MOST, SOME = 1 << 22, 1 << 20
#: Bytes that a thread reads at a time.
STEP = 2 << 20
#: What a manifest says that it is.
KIND, VERSION = "vm-img manifest", 1
_ZEROES = bytes(1 << 20)


class ManifestError(VmError):
    """A manifest is not one, or not whole."""


class Range(NamedTuple):
    """Guest bytes; *reason* where they could not be read."""

    offset: int
    length: int
    reason: str = ""


class Manifest(NamedTuple):
    """What an image held."""

    size: int
    block_size: int
    algorithm: str
    #: The digests of all blocks one behind the other, zeroes for blocks of zeroes.
    digests: bytes
    #: For each block whether it has a digest.
    present: bytes
    #: The digest of the bytes themselves, in hexadecimal; empty if it was not made.
    sum: str = ""

    @property
    def digest(self) -> str:
        """The digest of the digests."""
        return hashlib.new(self.algorithm, self.digests).hexdigest()

    def at(self, block: int) -> bytes:
        """The digest of one block, empty for zeroes."""
        width = ALGORITHMS[self.algorithm]
        return self.digests[block * width : block * width + width] if self.present[block] else b""

    def lines(self) -> Iterator[str]:
        """The manifest as JSON, in pieces."""
        import json

        head = {
            "kind": KIND,
            "version": VERSION,
            "virtual-size": self.size,
            "block-size": self.block_size,
            "algorithm": self.algorithm,
            "digest": self.digest,
        }
        if self.sum:
            head["sum"] = self.sum
        yield "{\n" + "".join(f'  "{name}": {json.dumps(value)},\n' for name, value in head.items())
        count = len(self.present)
        yield '  "blocks": ['
        for block in range(count):
            text = f'"{self.at(block).hex()}"' if self.present[block] else "null"
            yield f"\n    {text}{',' if block + 1 < count else ''}"
        yield "\n  ]\n}\n"

    @classmethod
    def parse(cls, data: bytes | str) -> Manifest:
        """The manifest in *data*. Raises ManifestError, with what is wrong."""
        import json

        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"not a manifest: {error}") from None
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise ManifestError(f"not a manifest: its \"kind\" is not '{KIND}'")
        if value.get("version") != VERSION:
            raise ManifestError(f"version {value.get('version')!r} is not known; {VERSION} is")
        size, block_size = _number(value, "virtual-size"), _number(value, "block-size")
        algorithm = value.get("algorithm")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            raise ManifestError(f"algorithm {algorithm!r} is not known; there is: {', '.join(ALGORITHMS)}")
        try:
            count = _blocks(size, block_size)
        except UsageError as error:
            raise ManifestError(str(error)) from None
        blocks = value.get("blocks")
        if not isinstance(blocks, list) or len(blocks) != count:
            has = len(blocks) if isinstance(blocks, list) else "no"
            raise ManifestError(f"it has {has} blocks; an image of {size} bytes has {count}")
        width = ALGORITHMS[algorithm]
        digests, present = bytearray(count * width), bytearray(count)
        for number, text in enumerate(blocks):
            if text is None:
                continue
            try:
                digest = bytes.fromhex(text)
            except (ValueError, TypeError):
                digest = b""
            if len(digest) != width:
                raise ManifestError(f"block {number} is no digest of {width} bytes in hexadecimal, and not null")
            digests[number * width : number * width + width] = digest
            present[number] = 1
        total = value.get("sum", "")
        if not isinstance(total, str) or (total and len(total) != 2 * width):
            raise ManifestError(f'its "sum" is no digest of {width} bytes in hexadecimal')
        found = cls(size, block_size, algorithm, bytes(digests), bytes(present), total)
        if value.get("digest") != found.digest:
            raise ManifestError('it was changed or damaged: its digests are not those of which its "digest" was made')
        return found


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


def _number(value: dict[str, Any], name: str) -> int:
    found = value.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 63:
        raise ManifestError(f'its "{name}" is no number of bytes')
    return found


def _blocks(size: int, block_size: int) -> int:
    """How many blocks there are. Raises UsageError."""
    if not LEAST_BLOCK <= block_size <= MOST_BLOCK or block_size & block_size - 1:
        raise UsageError(
            f"a block size of {block_size} bytes is not possible: a power of two from {LEAST_BLOCK} to {MOST_BLOCK} is"
        )
    count = -(-size // block_size)
    if count > MOST:
        raise UsageError(f"{size} bytes have {count} blocks of {block_size} bytes; at most {MOST} are possible")
    return count


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
    found = [Range(first * block, min(after * block, size) - first * block) for first, after in _runs(differs)]
    bad = [
        Range(number * block, min(block, now.size - number * block), error.text)
        for number, error in sorted(unreadable.items())
    ]
    resized = now.size != manifest.size
    # A sum is of no use where something is missing.
    other = bool(with_sum and manifest.sum and not bad and now.sum != manifest.sum)
    return Verification(now, found, bad, resized, other)


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
        count = _blocks(self.size, block_size)
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
