"""The tests that every format driver should pass: subclass, say what the driver can do, run pytest.

    from vm_core.testing.conformance import FormatConformance

    class TestTiny(FormatConformance):
        driver = "tiny"                                # installed, or registered by a fixture

        def samples(self, directory):                  # images made by somebody else, with what they hold
            yield Sample(directory / "a.tiny", expected_bytes)

What a driver can do is taken from its descriptor: one with the capabilities ``create`` and ``write`` needs no samples,
its images are made here. An *oracle*, an independent program that reads the format, is worth more than all of this
together: override :meth:`FormatConformance.oracle_read` (and ``oracle_check``, ``oracle_make``) where there is one.

Fuzzing is short and repeatable; ``VM_FUZZ_ROUNDS`` makes it longer, ``VM_FUZZ_SEED`` different.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vm_core.block.extents import walk
from vm_core.block.formatnode import FormatNode
from vm_core.block.gate import Gate
from vm_core.block.mapping import Kind
from vm_core.block.node import Node
from vm_core.block.open import open_node
from vm_core.block.probe import HEAD, TAIL, score
from vm_core.descriptors import FormatDriver
from vm_core.errors import BlockError, VmError
from vm_core.plugins import registry

from .nodes import FailingNode, MemoryNode, RecordingNode
from .replay import power_cuts

#: Seconds and bytes of memory that one malformed image may cost.
TIME_LIMIT = 2.0
MEMORY_LIMIT = 256 << 20


class Sample(NamedTuple):
    """An image and the bytes that a guest finds in it."""

    path: Path
    data: bytes
    #: Options that opening it takes, beside ``driver`` and ``file``.
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


class FormatConformance:
    """Subclass and set :attr:`driver`; everything else has a default."""

    #: The driver's name.
    driver: str = ""
    #: Create options to try, one image each.
    create_options: tuple[dict[str, Any], ...] = ({},)
    #: Virtual size of the images made here; of no whole number of clusters, where the format allows it.
    size: int = 3 * 1024 * 1024 + 512
    #: What offsets and lengths are multiples of; 1 unless the format cannot hold others.
    granularity: int = 1
    #: Random operations per model test, malformed images per fuzz test, moments of power cut tried.
    operations: int = 150
    rounds: int = int(os.environ.get("VM_FUZZ_ROUNDS", "150"))
    seed: int = int(os.environ.get("VM_FUZZ_SEED", "1"))
    cuts: int = 120
    #: Virtual size of the images that suffer power cuts, at most.
    cut_size: int = 512 * 1024
    #: Bytes from the start of an image where bits are flipped; the metadata should lie there.
    metadata: int = 1 << 20
    #: Bytes from the start of an image that are tried field by field.
    header: int = 112

    # To be overridden where there is something to say

    def samples(self, directory: Path) -> Iterable[Sample]:
        """Images of the format from elsewhere, put into *directory*."""
        return ()

    def oracle_read(self, path: Path) -> bytes | None:
        """What another program finds in the image; None without one."""
        return None

    def oracle_check(self, path: Path) -> None:
        """Raise where another program finds the image damaged (leaks are allowed)."""

    def oracle_make(self, path: Path, data: bytes, options: dict[str, Any]) -> bool:
        """Have another program make an image of *data* with the create *options*; False where it cannot."""
        return False

    # Helpers

    @property
    def descriptor(self) -> FormatDriver:
        found = registry().find("format", self.driver)
        assert isinstance(found, FormatDriver)
        return found

    def can(self, capability: str) -> bool:
        """Whether the descriptor claims *capability*."""
        return capability in self.descriptor.capabilities

    def need(self, *capabilities: str) -> None:
        """Skip the test where the driver lacks a capability."""
        for capability in capabilities:
            if not self.can(capability):
                pytest.skip(f"{self.driver} does not claim {capability}")

    def open(self, storage: Node | str | Path, *, readonly: bool = True, **options: Any) -> Node:
        """Open an image of the format in a node or file; nothing that it names is opened."""
        file = storage if isinstance(storage, Node) else {"driver": "file", "filename": str(storage)}
        return open_node({"driver": self.driver, "file": file, **options}, readonly=readonly, gate=Gate.none())

    def make(self, options: dict[str, Any], size: int | None = None) -> MemoryNode:
        """An empty image in memory."""
        file = MemoryNode()
        given = dict(options)
        self.descriptor.load().create(file, self.size if size is None else size, given)
        assert not given, f"create options that the driver did not take: {given}"
        return file

    def filled(self, options: dict[str, Any], chance: random.Random) -> tuple[MemoryNode, bytearray]:
        """An image in memory with something in it, and its bytes."""
        file = self.make(options)
        with self.open(file, readonly=False) as node:
            model = bytearray(node.size)
            for _ in range(30):
                self._change(node, model, chance)
        return file, model

    def images(self, directory: Path, chance: random.Random) -> Iterator[tuple[bytes, bytes, dict[str, Any]]]:
        """Whole images with contents and options to open them: the samples, and made ones if the driver can."""
        for sample in self.samples(directory):
            yield sample.path.read_bytes(), sample.data, sample.options
        if self.can("create") and self.can("write"):
            for options in self.create_options:
                file, model = self.filled(options, chance)
                yield file.data(), bytes(model), {}

    def _range(self, size: int, chance: random.Random, longest: int = 200_000) -> tuple[int, int]:
        unit = self.granularity
        length = min(chance.choice([1, 511, 512, 4096, 65536, 65537, chance.randrange(1, longest)]), longest)
        length = min(max(length // unit, 1) * unit, size)
        offset = chance.choice([0, size - length, chance.randrange(size - length + 1)]) // unit * unit
        return offset, min(length, size - offset)

    def _change(self, node: Node, model: bytearray, chance: random.Random) -> str:
        """One random change to both; returns what it was."""
        offset, length = self._range(len(model), chance)
        action = chance.random()
        if action < 0.6:
            data = chance.randbytes(length)
            node.pwrite(offset, data)
            model[offset : offset + length] = data
            return f"write {offset}+{length}"
        if action < 0.8:
            node.zero(offset, length, unmap=chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
            return f"zero {offset}+{length}"
        node.discard(offset, length)
        # A guest may read old or new bytes after a discard: take what is there, at this moment, as the truth …
        found = node.pread(offset, length)
        for index in range(0, length, 512):  # … provided that it is one of the two
            piece = found[index : index + 512]
            assert piece == model[offset + index : offset + index + len(piece)] or not any(
                byte and byte != model[offset + index + at] for at, byte in enumerate(piece)
            ), f"discard {offset}+{length} left bytes that were never written at {offset + index}"
        model[offset : offset + length] = found
        return f"discard {offset}+{length}"

    def check_reads(self, node: Node, data: bytes, chance: random.Random) -> None:
        """The node has exactly *data*, in whole, in pieces and by its extents."""
        assert node.size == len(data)
        assert node.pread(0, len(data) + 100) == data + bytes(100), "whole image"
        for _ in range(40):
            offset, length = self._range(len(data), chance)
            pieces, position = [], 0
            while position < length:
                step = min(chance.randrange(1, 70_000), length - position)
                pieces.append(bytearray(b"\xff" * step))
                position += step
            node.read(offset, [memoryview(piece) for piece in pieces])
            assert b"".join(pieces) == data[offset : offset + length], f"{length} bytes at {offset}"
        self.check_map(node, data)

    def check_map(self, node: Node, data: bytes) -> None:
        """Runs adjoin, cover everything, and say the truth."""
        position = 0
        for run in node.map(0, node.size):
            assert run.offset == position, "runs adjoin"
            assert run.length > 0
            position += run.length
        assert position == node.size
        position = 0
        for extent in walk(node):
            assert extent.offset == position
            expected = data[extent.offset : extent.end]
            if extent.kind is Kind.ZERO:
                assert not any(expected), f"{extent} should be zeroes"
            elif extent.kind is Kind.DATA:
                assert extent.storage is not None
                assert extent.storage.pread(extent.host, extent.length) == expected, f"{extent} is elsewhere"
            else:
                assert extent.kind is Kind.SPECIAL
                assert isinstance(extent.owner, FormatNode)
            position = extent.end

    # The tests

    def test_descriptor_is_complete(self) -> None:
        """The driver is found by name, says in a line what it is, and explains each option."""
        found = self.descriptor
        assert found.summary
        assert "\n" not in found.summary
        assert issubclass(found.load(), object)
        for option in (*found.options, *found.create_options):
            assert option.help, option.name

    def test_probe_knows_its_own(self, tmp_path: Path) -> None:
        """Every image of the format is recognised, and nothing else is."""
        found, chance = self.descriptor, random.Random(self.seed)
        if not found.signatures and found.probe is None:
            pytest.skip(f"{self.driver} is never recognised, only named")
        for image, _, _ in self.images(tmp_path, chance):
            assert score(found, image[:HEAD], image[-TAIL:], len(image), "x") > 0
        for other in (b"", bytes(1 << 17), chance.randbytes(1 << 17), b"QFI", b"\x55\xaa" * 256, b"x" * 100):
            assert score(found, other[:HEAD], other[-TAIL:], len(other), "x.bin") == 0

    def test_reads_what_is_there(self, tmp_path: Path) -> None:
        """Whole, in pieces of any shape, by extents and from another thread, the bytes are those of the image."""
        chance, count = random.Random(self.seed), 0
        for image, data, options in self.images(tmp_path, chance):
            with self.open(MemoryNode(image, readonly=True), **options) as node:
                self.check_reads(node, data, chance)
                failures: list[BaseException] = []
                threads = [
                    threading.Thread(target=_guarded, args=(failures, self.check_reads, node, data, random.Random(n)))
                    for n in range(2)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not failures, failures[0]
            count += 1
        assert count, "no image to read: give samples()"

    def test_oracle_reads_the_same(self, tmp_path: Path) -> None:
        """An independent program finds in our images what we wrote, and finds them sound."""
        self.need("create", "write")
        chance = random.Random(self.seed + 1)
        for number, options in enumerate(self.create_options):
            path = tmp_path / f"{number}.img"
            file, model = self.filled(options, chance)
            path.write_bytes(file.data())
            self.oracle_check(path)
            found = self.oracle_read(path)
            if found is None:
                pytest.skip("no oracle")
            assert found[: len(model)] == model, options
            assert not any(found[len(model) :]), options

    def test_reads_what_the_oracle_wrote(self, tmp_path: Path) -> None:
        """Images of an independent program have the bytes that went into them."""
        chance = random.Random(self.seed + 2)
        data = bytearray(self.size)
        for _ in range(20):
            offset, length = self._range(self.size, chance)
            data[offset : offset + length] = chance.randbytes(length)
        made = 0
        for number, options in enumerate(self.create_options):
            path = tmp_path / f"{number}.img"
            if self.oracle_make(path, bytes(data), options):
                made += 1
                with self.open(path) as node:
                    rest = bytes(node.size - len(data))
                    self.check_reads(node, bytes(data) + rest, chance)
        if not made:
            pytest.skip("no oracle that writes")

    def test_writes_like_a_bytearray(self, tmp_path: Path) -> None:
        """Random writes, zeroes, discards, flushes and reopenings leave what a bytearray would hold."""
        self.need("create", "write")
        for options in self.create_options:
            chance = random.Random(self.seed + 3)
            file = self.make(options)
            node = self.open(file, readonly=False)
            model = bytearray(node.size)
            done: list[str] = []
            for _ in range(self.operations):
                what = chance.random()
                if what < 0.9:
                    done.append(self._change(node, model, chance))
                elif what < 0.95:
                    node.flush()
                else:
                    node.close()
                    node = self.open(file, readonly=False)
                    done.append("reopen")
                offset, length = self._range(len(model), chance)
                assert node.pread(offset, length) == model[offset : offset + length], (options, done[-10:])
            self.check_reads(node, bytes(model), chance)
            node.close()
            path = tmp_path / "image"
            path.write_bytes(file.data())
            self.oracle_check(path)
            found = self.oracle_read(path)
            assert found is None or found[: len(model)] == model, options
            with self.open(MemoryNode(file.data(), readonly=True)) as again:
                assert again.pread(0, len(model)) == model

    def test_survives_errors_of_the_storage(self, tmp_path: Path) -> None:
        """A full or failing disk fails the request; afterwards the image is sound and has what was acknowledged."""
        self.need("create", "write")
        for options in self.create_options:
            chance = random.Random(self.seed + 4)
            file = self.make(options)
            armed = -1

            def decide(operation: str, offset: int, length: int) -> int:
                nonlocal armed
                if armed >= 0 and operation in ("write", "zero", "truncate"):
                    armed -= 1
                    if armed < 0:
                        return errno.ENOSPC
                return 0

            with self.open(FailingNode(file, decide), readonly=False) as node:
                model = bytearray(node.size)
                for _ in range(self.operations // 2):
                    offset, length = self._range(len(model), chance)
                    if chance.random() < 0.3:  # leaves old data in space that will be used again
                        node.zero(offset, length, unmap=True)
                        node.flush()
                        model[offset : offset + length] = bytes(length)
                        continue
                    data = chance.randbytes(length)
                    armed = chance.choice([-1, 0, 1, 2])
                    try:
                        node.pwrite(offset, data)
                        model[offset : offset + length] = data
                    except BlockError as error:
                        assert error.code == errno.ENOSPC  # noqa: PT017 - it may also succeed
                        model[offset : offset + length] = self._old_or_new(node, offset, model, data)
                    armed = -1
                    assert node.pread(offset, length) == model[offset : offset + length]
                node.flush()
            path = tmp_path / "image"
            path.write_bytes(file.data())
            self.oracle_check(path)
            with self.open(MemoryNode(file.data(), readonly=True)) as again:
                assert again.pread(0, len(model)) == model, options

    @staticmethod
    def _old_or_new(node: Node, offset: int, model: bytearray, data: bytes) -> bytes:
        found = node.pread(offset, len(data))
        for index, byte in enumerate(found):
            assert byte in (data[index], model[offset + index]), f"neither old nor new at {offset + index}"
        return found

    def test_power_cuts_lose_nothing_flushed(self, tmp_path: Path) -> None:
        """After every prefix of the writes, with unflushed ones lost, torn or reordered, the image opens, is sound, and
        has every byte that was flushed and not touched since."""
        self.need("create", "write")
        for options in self.create_options:
            chance = random.Random(self.seed + 5)
            recorder = RecordingNode(self.make(options, min(self.size, self.cut_size)))
            node = self.open(recorder, readonly=False)
            model = bytearray(node.size)
            #: Since the flush in force: the ranges changed, by the moment at which each change began.
            touched: list[tuple[int, int, int]] = []
            recorder.mark(bytes(model))
            for _ in range(60):
                what = chance.random()
                if what < 0.25:
                    node.flush()
                    recorder.mark(bytes(model))
                    continue
                # Small changes, so that most of each cluster they touch is flushed data that must not suffer.
                offset, length = self._range(len(model), chance, chance.choice([3000, 3000, 100_000]))
                touched.append((recorder.now(), offset, length))
                data = chance.randbytes(length) if what < 0.8 else bytes(length)
                if what < 0.8:
                    node.pwrite(offset, data)
                else:
                    node.zero(offset, length, unmap=what < 0.9)
                model[offset : offset + length] = data
            node.close()
            recorder.mark(bytes(model))
            since: dict[int, int] = {}
            for when, what in recorder.marks:
                since[id(what)] = when
            path = tmp_path / "cut"
            for number, cut in enumerate(power_cuts(recorder, seed=self.seed, limit=self.cuts, variants=4)):
                if cut.mark is None:
                    continue
                try:
                    with self.open(MemoryNode(cut.image, readonly=True)) as opened:
                        found = opened.pread(0, len(cut.mark))
                except (VmError, BlockError) as error:
                    raise AssertionError(f"{options}: unreadable after a power cut, {cut.story}: {error}") from error
                expected, start = bytearray(cut.mark), since[id(cut.mark)]
                for moment, offset, length in touched:
                    if start <= moment <= cut.moment:
                        expected[offset : offset + length] = found[offset : offset + length]
                assert found == expected, f"{options}: flushed bytes are gone: {cut.story}"
                if number % 7 == 0:
                    path.write_bytes(cut.image)
                    self.oracle_check(path)

    def test_truncated_images_are_one_error(self, tmp_path: Path) -> None:
        """An image that ends too soon gives an error or reads; it never hangs, leaks memory or shows a traceback."""
        chance = random.Random(self.seed + 6)
        for image, _, options in self.images(tmp_path, chance):
            lengths = {0, 1, 4, 511, 512, 513, 4096, len(image) - 1, len(image) - 512}
            lengths |= {chance.randrange(len(image) + 1) for _ in range(self.rounds // 4)}
            for length in sorted(length for length in lengths if 0 <= length <= len(image)):
                self._try_malformed(image[:length], options, f"cut to {length} bytes", chance)

    def test_flipped_bits_are_one_error(self, tmp_path: Path) -> None:
        """Random damage to an image's metadata gives an error or other bytes; nothing worse."""
        chance = random.Random(self.seed + 7)
        for image, _, options in self.images(tmp_path, chance):
            span = min(len(image), self.metadata)
            for _ in range(self.rounds):
                damaged, story = bytearray(image), []
                for _ in range(chance.choice([1, 1, 2, 8])):
                    at = chance.choice([chance.randrange(min(span, 512)), chance.randrange(span)])
                    if chance.random() < 0.5:
                        damaged[at] ^= 1 << chance.randrange(8)
                        story.append(f"bit at {at}")
                    else:
                        value = chance.choice([b"\xff", b"\0", b"\x80", b"\x7f"])
                        width = chance.choice([1, 2, 4, 8])
                        at = at // width * width
                        damaged[at : at + width] = value * width
                        story.append(f"{value * width!r} at {at}")
                self._try_malformed(bytes(damaged), options, ", ".join(story), chance)

    def test_extreme_header_fields_are_one_error(self, tmp_path: Path) -> None:
        """Each field of the header at its largest, smallest or sign-changing value gives an error or reads."""
        chance = random.Random(self.seed + 8)
        for image, _, options in self.images(tmp_path, chance):
            for at in range(0, min(len(image), self.header), 4):
                for value in (b"\xff", b"\0", b"\x80", b"\x7f"):
                    for width in (4, 8) if at % 8 == 0 else (4,):
                        damaged = bytearray(image)
                        damaged[at : at + width] = value * width
                        self._try_malformed(bytes(damaged), options, f"{value * width!r} at {at}", chance)

    def _try_malformed(self, image: bytes, options: dict[str, Any], story: str, chance: random.Random) -> None:
        """Open and use a malformed image: only VmError and BlockError may come out, within the limits."""
        with _limits(story):
            for readonly in (True, False) if self.can("write") else (True,):
                file = MemoryNode(image, limit=len(image) + (64 << 20))
                try:
                    node = self.open(file, readonly=readonly, **options)
                except VmError as error:
                    assert "\n" not in str(error), story  # noqa: PT017 - it may also open
                    continue
                try:
                    size = node.size
                    for offset in {0, size // 2, max(0, size - 4096), chance.randrange(size + 1)}:
                        _expected(node.pread, offset, 4096)
                        if not readonly and offset + 4096 <= size:
                            _expected(node.pwrite, offset, b"w" * 4096)
                    if size <= 64 << 20:
                        _expected(lambda node=node: sum(run.length for run in walk(node)))
                    _expected(node.info)
                finally:
                    _expected(node.close)


class _Overrun(BaseException):
    """The time is up. No Exception, lest a handler on the way take it for an I/O error (as it would a TimeoutError)."""


def _expected(function: Callable[..., Any], *arguments: Any) -> None:
    """Call; errors that a driver may raise are fine."""
    with suppress(VmError, BlockError):
        function(*arguments)


def _guarded(failures: list[BaseException], function: Callable[..., Any], *arguments: Any) -> None:
    try:
        function(*arguments)
    except BaseException as error:
        failures.append(error)


@contextmanager
def _limits(story: str) -> Iterator[None]:
    """Fail what takes too long or too much memory (where the system can tell, in the main thread)."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    def expired(number: int, frame: Any) -> None:
        raise _Overrun

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limited = sys.platform == "linux"
    former = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT, TIME_LIMIT)
    try:
        if limited:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, hard))
        yield
    except _Overrun:
        raise AssertionError(f"more than {TIME_LIMIT} s for an image with {story}") from None
    except MemoryError:
        raise AssertionError(f"more than {MEMORY_LIMIT >> 20} MiB for an image with {story}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
