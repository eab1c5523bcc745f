"""FormatNode moves data for any format: tested with the toy format against a bytearray."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vm_core.block.extents import walk
from vm_core.block.formatnode import FormatNode
from vm_core.block.mapping import Kind
from vm_core.block.open import OpenContext
from vm_core.block.passage import Hold, release
from vm_core.errors import BlockError
from vm_core.testing.nodes import FailingNode, MemoryNode, RecordingNode
from vm_core.testing.replay import power_cuts
from vm_core.testing.toy import FROZEN, PLACE, Toy

CLUSTER = 1024


def make(size: int, cluster: int = CLUSTER, **options: Any) -> MemoryNode:
    file = MemoryNode()
    Toy.create(file, size, {"cluster_size": cluster, **options})
    return file


def open_toy(file: Any, *, readonly: bool = False, backing: Any = None) -> FormatNode:
    return FormatNode(Toy.open(file, {}, OpenContext(readonly=readonly)), driver="toy", backing=backing)


SIZE = 40 * CLUSTER + 300  # ends within a cluster
BASE_SIZE = 30 * CLUSTER + 77  # shorter, and ends within another
ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 6 * CLUSTER)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))


class Model(RuleBasedStateMachine):
    """A chain of two images under random operations reads like a bytearray, whatever fails on the way."""

    @initialize(seed=st.integers(0, 1 << 30), detect=st.sampled_from(["off", "on", "unmap"]), backed=st.booleans())
    def start(self, seed: int, detect: str, backed: bool) -> None:
        chance = random.Random(seed)
        self.model = bytearray(SIZE)
        self.frozen: dict[int, bytes] = {}
        base: FormatNode | None = None
        if backed:
            base_file = make(BASE_SIZE)
            base = open_toy(base_file)
            for _ in range(6):
                offset = chance.randrange(BASE_SIZE)
                data = chance.randbytes(min(chance.randrange(1, 5 * CLUSTER), BASE_SIZE - offset))
                base.pwrite(offset, data)
                self.model[offset : offset + len(data)] = data
            base.flush()
            base.readonly = base.format.readonly = True
        self.file = make(SIZE)
        self.fail = 0
        self.node = open_toy(FailingNode(self.file, self._decide), backing=base)
        self.node.detect_zeroes = detect
        self.detect = detect

    def _decide(self, operation: str, offset: int, length: int) -> int:
        if self.fail and operation in ("write", "zero"):
            self.fail -= 1
            return 0 if self.fail else errno.ENOSPC
        return 0

    @rule(where=ranges, fill=st.one_of(st.just(0), st.integers(1, 255)), split=st.integers(1, 3), fua=st.booleans())
    def write(self, where: tuple[int, int], fill: int, split: int, fua: bool) -> None:
        offset, length = where
        data = bytes((fill + index % 7 if fill else 0) & 255 for index in range(length))
        step = -(-length // split)
        view = memoryview(data)
        self.node.write(offset, [view[start : start + step] for start in range(0, length, step)], fua=fua)
        self.model[offset : offset + length] = data

    @rule(where=ranges, countdown=st.integers(1, 3))
    def write_that_fails(self, where: tuple[int, int], countdown: int) -> None:
        """A failed write leaves each byte as it was or as it was to become, and the image whole."""
        offset, length = where
        data = bytes([0xEE]) * length
        self.fail = countdown + 1
        try:
            self.node.pwrite(offset, data)
            self.model[offset : offset + length] = data
        except BlockError as error:
            assert error.code == errno.ENOSPC  # noqa: PT017 - it may also succeed
            now = self.node.pread(offset, length)
            for index, byte in enumerate(now):
                assert byte in (self.model[offset + index], 0xEE)
            self.model[offset : offset + length] = now
        finally:
            self.fail = 0

    @rule(where=ranges, unmap=st.booleans())
    def zero(self, where: tuple[int, int], unmap: bool) -> None:
        offset, length = where
        self.node.zero(offset, length, unmap=unmap)
        self.model[offset : offset + length] = bytes(length)

    @rule(where=ranges)
    def discard(self, where: tuple[int, int]) -> None:
        offset, length = where
        self.node.discard(offset, length)
        start, end = -(-offset // CLUSTER) * CLUSTER, offset + length
        end = end if end == SIZE else end // CLUSTER * CLUSTER
        if start < end:
            self.model[start:end] = bytes(end - start)

    @rule(index=st.integers(0, SIZE // CLUSTER - 1))
    def invert(self, index: int) -> None:
        """Store a cluster as SPECIAL, with the bytes it has."""
        offset = index * CLUSTER
        with self.node.quiesce() as toy:
            assert isinstance(toy, Toy)
            toy.store_inverted(offset, bytes(self.model[offset : offset + CLUSTER]))

    @rule()
    def freeze(self) -> None:
        """As a snapshot does: nothing allocated may be overwritten where it is."""
        with self.node.quiesce() as toy:
            assert isinstance(toy, Toy)
            toy.freeze()
            self.frozen = {
                entry & PLACE: self.file.pread(entry & PLACE, CLUSTER) for entry in toy._table if entry & FROZEN
            }

    @rule(where=ranges)
    def read(self, where: tuple[int, int]) -> None:
        offset, length = where
        buffer = bytearray(b"\xff" * length)
        self.node.read(offset, [memoryview(buffer)])
        assert buffer == self.model[offset : offset + length]
        buffer = bytearray(b"\xff" * length)
        if self.node.read_nowait(offset, [memoryview(buffer)]):
            assert buffer == self.model[offset : offset + length]

    @rule()
    def flush(self) -> None:
        self.node.flush()

    @rule()
    def reopen(self) -> None:
        backing, detect = self.node.backing, self.detect
        self.frozen.clear()  # the toy forgets what its snapshots own
        self.node.close()
        self.node = open_toy(FailingNode(self.file, self._decide), backing=backing)
        self.node.detect_zeroes = detect

    @precondition(lambda self: hasattr(self, "node"))
    @invariant()
    def reads_like_the_model(self) -> None:
        buffer = bytearray(b"\xff" * (SIZE + 10))
        self.node.read(0, [memoryview(buffer)])
        assert buffer == self.model + bytes(10)

    @precondition(lambda self: hasattr(self, "node"))
    @invariant()
    def walks_like_the_model(self) -> None:
        """The walk covers everything once, in order, and what it says of each run is true."""
        position = 0
        for extent in walk(self.node):
            assert extent.offset == position
            assert extent.length > 0
            expected = self.model[extent.offset : extent.end]
            if extent.kind is Kind.ZERO:
                assert not any(expected)
            elif extent.kind is Kind.DATA:
                assert extent.storage is not None
                assert extent.storage.pread(extent.host, extent.length) == expected
            else:
                assert extent.kind is Kind.SPECIAL
                assert isinstance(extent.owner, FormatNode)
            position = extent.end
        assert position == SIZE

    @precondition(lambda self: hasattr(self, "node"))
    @invariant()
    def clusters_are_used_once_and_not_lost(self) -> None:
        toy = self.node.format
        assert isinstance(toy, Toy)
        assert toy.check() == {"corruptions": 0, "leaks": 0, "check-errors": 0}
        for host, data in self.frozen.items():
            assert self.file.pread(host, CLUSTER) == data, "a frozen cluster was overwritten"


Model.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Model.TestCase


def test_write_past_the_end_is_an_io_error() -> None:
    """A format node does not grow by writing: EIO, and nothing is written."""
    node = open_toy(make(4 * CLUSTER))
    with pytest.raises(BlockError) as caught:
        node.pwrite(4 * CLUSTER - 1, b"xx")
    assert caught.value.code == errno.EIO
    assert node.pread(0, 4 * CLUSTER) == bytes(4 * CLUSTER)


def test_read_only_node_refuses_changes() -> None:
    """Writing, zeroing and discarding a read-only image is refused."""
    node = open_toy(make(4 * CLUSTER), readonly=True)
    changes: list[Callable[[], None]] = [
        lambda: node.pwrite(0, b"x"),
        lambda: node.zero(0, 10),
        lambda: node.discard(0, CLUSTER),
    ]
    for change in changes:
        with pytest.raises(BlockError) as caught:
            change()
        assert caught.value.code == errno.EACCES


def test_discard_ignored_by_policy() -> None:
    """With discard=ignore nothing happens, and zeroing keeps host space."""
    node = open_toy(make(4 * CLUSTER))
    node.pwrite(0, b"a" * 4 * CLUSTER)
    node.discard_unmap = False
    node.discard(0, 4 * CLUSTER)
    assert node.pread(0, 4 * CLUSTER) == b"a" * 4 * CLUSTER


def test_contiguous_clusters_are_one_system_call() -> None:
    """A read or write over many clusters that adjoin on the host is one request to the storage."""
    calls: list[tuple[str, int]] = []

    def note(operation: str, offset: int, length: int) -> int:
        calls.append((operation, length))
        return 0

    node = open_toy(FailingNode(make(64 * CLUSTER), note))
    calls.clear()
    node.pwrite(100, b"a" * (40 * CLUSTER))
    # The file is made to end with a whole cluster; the data is one write.
    assert [operation for operation, _ in calls] == ["zero", "write"]
    calls.clear()
    assert node.pread(0, 64 * CLUSTER) == bytes(100) + b"a" * 40 * CLUSTER + bytes(24 * CLUSTER - 100)
    assert len(calls) == 1


def test_decompressed_runs_are_kept_and_forgotten() -> None:
    """Small reads of one SPECIAL run transform it once; a write to it is seen at once."""
    node = open_toy(make(4 * CLUSTER))
    with node.quiesce() as toy:
        assert isinstance(toy, Toy)
        toy.store_inverted(CLUSTER, bytes(range(256)) * (CLUSTER // 256))
    count = 0
    original = toy.read_special

    def counted(mapping: Any) -> bytes:
        nonlocal count
        count += 1
        return original(mapping)

    toy.read_special = counted  # type: ignore[method-assign]
    for offset in range(0, CLUSTER, 64):
        assert node.pread(CLUSTER + offset, 64) == (bytes(range(256)) * 4)[offset : offset + 64]
    assert count == 1
    node.pwrite(CLUSTER + 5, b"new")
    assert node.pread(CLUSTER, 10) == bytes(range(5)) + b"new" + bytes([8, 9])


def test_a_unit_transformed_anew_is_read_anew() -> None:
    """What was kept of a SPECIAL run is forgotten when its cluster is rewritten, even as SPECIAL again."""
    node = open_toy(make(4 * CLUSTER))
    for fill in (b"1", b"2"):
        with node.quiesce() as toy:
            assert isinstance(toy, Toy)
            toy.store_inverted(CLUSTER, fill * CLUSTER)
        assert node.pread(CLUSTER + 10, 10) == fill * 10
        node.pwrite(CLUSTER, b"x")
        assert node.pread(CLUSTER, 10) == b"x" + fill * 9


def test_bytes_that_nobody_wrote_are_zeroed_in_the_buffer() -> None:
    """Past the end, and past the end of a shorter backing image, the caller's buffer is overwritten with zeroes."""
    base = open_toy(make(CLUSTER + 5))
    base.pwrite(0, b"b" * (CLUSTER + 5))
    node = open_toy(make(3 * CLUSTER), backing=base)
    buffer = bytearray(b"\xff" * (4 * CLUSTER))
    node.read(0, [memoryview(buffer)])
    assert buffer == b"b" * (CLUSTER + 5) + bytes(3 * CLUSTER - 5)


def test_deep_chains_do_not_recurse() -> None:
    """A chain of 600 images is read and walked without recursion."""
    node: FormatNode | None = None
    for level in range(600):
        above = open_toy(make(4 * CLUSTER), backing=node)
        if level == 0:
            above.pwrite(0, b"bottom")
        node = above
    assert node is not None
    assert node.pread(0, 8) == b"bottom\0\0"
    assert next(walk(node)).depth == 599


def test_power_cut_keeps_what_was_flushed() -> None:
    """Whatever a power cut drops, tears or reorders, the image opens and has every flushed byte."""
    chance = random.Random(7)
    recorder = RecordingNode(make(24 * CLUSTER))
    node = open_toy(recorder)
    model = bytearray(node.size)
    recorder.mark((bytes(model), frozenset()))
    touched: set[int] = set()
    for _ in range(60):
        offset = chance.randrange(node.size)
        length = min(chance.randrange(1, 3 * CLUSTER), node.size - offset)
        action = chance.random()
        if action < 0.6:
            data = chance.randbytes(length)
            node.pwrite(offset, data)
            model[offset : offset + length] = data
        elif action < 0.8:
            node.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            node.flush()
            recorder.mark(bytes(model))
            touched.clear()
    node.flush()
    recorder.mark(bytes(model))
    cuts = 0
    previous: list[bytes] = [m for _, m in recorder.marks if isinstance(m, bytes)]
    final = previous[-1]
    for cut in power_cuts(recorder, seed=3, limit=80):
        image = MemoryNode(cut.image)
        opened = open_toy(image, readonly=True)
        opened.pread(0, opened.size)
        cuts += 1
        if cut.mark == final and cut.moment >= recorder.marks[-1][0]:
            assert opened.pread(0, opened.size) == final
    assert cuts > 100


def test_many_threads_on_one_image() -> None:
    """Threads that write, zero, discard and read their own stripes of shared clusters never see each other's bytes."""
    clusters, stripe = 16, CLUSTER // 4
    file = make(clusters * CLUSTER)
    base = open_toy(make(clusters * CLUSTER))
    base.pwrite(0, bytes([9]) * clusters * CLUSTER)
    node = open_toy(file, backing=base)
    failures: list[str] = []
    start = threading.Barrier(5)

    def work(number: int) -> None:
        chance = random.Random(number)
        mine = {index: bytes([9]) * stripe for index in range(clusters)}
        start.wait()
        try:
            for _ in range(400):
                index = chance.randrange(clusters)
                offset = index * CLUSTER + number * stripe
                if chance.random() < 0.4:
                    data = bytes([number * 50 + chance.randrange(50)]) * stripe
                    node.pwrite(offset, data)
                    mine[index] = data
                elif chance.random() < 0.2:
                    node.zero(offset, stripe)
                    mine[index] = bytes(stripe)
                found = node.pread(offset, stripe)
                if found != mine[index]:
                    failures.append(f"stripe {number} of cluster {index}: {found[:4]!r}, not {mine[index][:4]!r}")
                    return
        except Exception as error:
            failures.append(repr(error))

    def flusher() -> None:
        start.wait()
        for _ in range(60):
            node.flush()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)] + [threading.Thread(target=flusher)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    assert not failures
    toy = node.format
    assert isinstance(toy, Toy)
    assert toy.check()["corruptions"] == 0


@pytest.mark.parametrize("write", [False, True])
def test_a_driver_that_somebody_has_to_himself_is_not_asked(write: bool) -> None:
    """While the image is quiesced neither the search for host spans nor a read from the page cache calls the driver."""
    node = open_toy(make(4 * CLUSTER))
    node.pwrite(0, b"x" * CLUSTER)
    toy = node.format
    assert isinstance(toy, Toy)
    asked: list[int] = []
    mapped = toy.map_cached
    toy.map_cached = lambda offset, length: asked.append(offset) or mapped(offset, length)  # type: ignore
    holds: list[Hold] = []
    with node.quiesce():
        assert not node.host_spans(0, 512, [], holds, write=write, stable=False)
        assert not node.read_nowait(0, [memoryview(bytearray(512))])
    assert not asked
    assert not holds
    node.host_spans(0, 512, [], holds, write=write, stable=False)
    node.read_nowait(0, [memoryview(bytearray(512))])
    assert asked == [0, 0]
    release(holds)
    with node.quiesce():  # no ticket is left
        pass


def flushing_slowly() -> tuple[FormatNode, threading.Event, threading.Event, list[str]]:
    """An image whose file stops in a flush until it is let go: the node, "it is inside", "go on", and what happened."""
    inside, go = threading.Event(), threading.Event()
    happened: list[str] = []
    file = make(8 * CLUSTER)

    def decide(operation: str, offset: int, length: int) -> int:
        if operation == "flush" and threading.current_thread().name == "flusher":
            happened.append("file")
            inside.set()
            assert go.wait(10)
        return 0

    node = open_toy(FailingNode(file, decide))
    driver_flush = node.format.flush

    def noted() -> None:
        happened.append("driver")
        driver_flush()

    node.format.flush = noted  # type: ignore[method-assign]
    return node, inside, go, happened


def test_a_flush_in_flight_delays_quiesce() -> None:
    """An image is quiet only when a flush has ended, too; requests go on meanwhile."""
    node, inside, go, happened = flushing_slowly()
    flusher = threading.Thread(target=node.flush, name="flusher")
    flusher.start()
    assert inside.wait(10)
    # It keeps no request waiting, of whatever kind.
    node.pwrite(0, b"a" * CLUSTER)
    node.zero(CLUSTER, CLUSTER)
    node.discard(0, CLUSTER)
    assert node.pread(0, 10) == bytes(10)
    quiet = threading.Event()

    def quiesce() -> None:
        with node.quiesce():
            happened.append("quiet")
            quiet.set()

    other = threading.Thread(target=quiesce)
    other.start()
    assert not quiet.wait(0.2)
    assert "driver" not in happened
    go.set()
    flusher.join(10)
    other.join(10)
    assert not flusher.is_alive()
    assert not other.is_alive()
    assert happened[-1] == "quiet"
    assert "driver" in happened


@pytest.mark.parametrize("call", ["flush", "info", "map", "copy_up", "read", "write", "zero", "quiesce"])
def test_nothing_reaches_the_driver_of_a_quiet_image(call: str) -> None:
    """Whatever another thread wants of a quiesced image, its driver hears of it when that is over."""
    node = open_toy(make(8 * CLUSTER))
    node.pwrite(0, b"a" * CLUSTER)
    calls: list[str] = []
    for name in ("flush", "info", "map", "allocate", "zero"):
        original = getattr(node.format, name)

        def noted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        setattr(node.format, name, noted)

    def quiesce() -> None:
        with node.quiesce() as driver:
            driver.info()

    what: dict[str, Callable[[], object]] = {
        "flush": node.flush,
        "info": node.info,
        "map": lambda: list(node.map(0, node.size)),
        "copy_up": lambda: node.copy_up(2 * CLUSTER, CLUSTER),
        "read": lambda: node.pread(0, 10),
        "write": lambda: node.pwrite(0, b"b"),
        "zero": lambda: node.zero(0, CLUSTER),
        "quiesce": quiesce,
    }
    thread = threading.Thread(target=what[call])
    with node.quiesce():
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not calls
    thread.join(10)
    assert not thread.is_alive()
    assert calls


def test_whoever_quiesced_the_image_may_use_it() -> None:
    """Inside, the same thread flushes, reads, writes, resizes and quiesces without waiting for itself; and after it,
    nothing is left locked."""
    node = open_toy(make(8 * CLUSTER))
    node.pwrite(2 * CLUSTER, b"a" * CLUSTER)

    def use() -> None:
        with node.quiesce() as toy:
            assert isinstance(toy, Toy)
            toy.freeze()
            node.flush()
            node.pwrite(0, b"b" * 100)
            node.write(2 * CLUSTER + 5, [memoryview(b"c")], fua=True)
            node.zero(CLUSTER, 10)
            node.discard(4 * CLUSTER, CLUSTER)
            assert node.pread(2 * CLUSTER, 7) == b"aaaaaca"
            assert sum(run.length for run in node.map(0, node.size)) == node.size
            node.info()
            with node.quiesce() as again:
                assert again is toy
                node.flush()
            node.truncate(10 * CLUSTER)
            node.set_backing(None)
            toy.store_inverted(6 * CLUSTER, b"d" * CLUSTER)
            assert node.pread(6 * CLUSTER, 3) == b"ddd"
            toy.store_inverted(6 * CLUSTER, b"e" * CLUSTER)
            assert node.pread(6 * CLUSTER, 3) == b"eee"

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for itself"
    assert node.pread(0, 3) == b"bbb"
    assert node.pread(6 * CLUSTER, 3) == b"eee"
    node.close()


def test_flushes_and_quiesces_of_many_threads() -> None:
    """Threads that write stably, flush, quiesce, and flush inside, never meet in the driver and never stand still."""
    node = open_toy(make(16 * CLUSTER))
    users = 0
    most: list[int] = []
    gate = threading.Lock()
    original = node.format.flush

    def flush() -> None:
        nonlocal users
        with gate:
            users += 1
            most.append(users)
        original()
        with gate:
            users -= 1

    node.format.flush = flush  # type: ignore[method-assign]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        nonlocal users
        chance = random.Random(number)
        try:
            for _ in range(150):
                action = chance.randrange(5)
                if action == 0:
                    node.flush()
                elif action == 1:
                    node.pwrite(chance.randrange(15 * CLUSTER), bytes([number]) * 700)
                elif action == 2:
                    node.write(number * CLUSTER, [memoryview(b"s" * 50)], fua=True)
                elif action == 3:
                    with node.quiesce():
                        with gate:
                            users += 1
                            most.append(users)
                        node.pread(0, 100)
                        with gate:
                            users -= 1
                else:
                    with node.quiesce():
                        node.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "standstill"
    assert not failures
    assert max(most) == 1
    node.close()


def test_an_interrupted_wait_leaves_no_lock_behind() -> None:
    """Whoever is interrupted (Ctrl-C) while it waits for a range keeps nobody else waiting afterwards."""
    node = open_toy(make(4 * CLUSTER))
    ranges = node._ranges
    ticket = node.begin_write(0, CLUSTER)

    def interrupt() -> None:
        raise KeyboardInterrupt

    ranges._changed.wait = lambda timeout=None: interrupt()  # type: ignore[assignment,method-assign,return-value]
    waits: list[Callable[[], object]] = [
        lambda: node.pread(0, 10),
        lambda: node.pwrite(0, b"x"),
        lambda: node.quiesce().__enter__(),
    ]
    for wait in waits:
        with pytest.raises(KeyboardInterrupt):
            wait()
    node.cancel_write(ticket)
    assert not ranges._held
    assert not ranges._exclusives
    node.pwrite(0, b"y")
    node.flush()
    node.close()


def test_freed_clusters_are_not_reused_under_a_reader() -> None:
    """While a reader is in the middle of its data, a discard of that range waits, so nobody can take its clusters."""
    file = make(4 * CLUSTER)
    inside, go = threading.Event(), threading.Event()
    slow = False

    def decide(operation: str, offset: int, length: int) -> int:
        if slow and operation == "read" and threading.current_thread().name == "reader":
            inside.set()
            go.wait(10)
        return 0

    node = open_toy(FailingNode(file, decide))
    node.pwrite(0, b"A" * CLUSTER)
    slow = True
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(node.pread(0, CLUSTER)), name="reader")
    reader.start()
    assert inside.wait(10)
    done = threading.Event()

    def reuse() -> None:
        node.discard(0, CLUSTER)
        node.flush()
        node.pwrite(2 * CLUSTER, b"B" * CLUSTER)
        done.set()

    other = threading.Thread(target=reuse)
    other.start()
    assert not done.wait(0.2)
    go.set()
    reader.join(10)
    other.join(10)
    assert found == [b"A" * CLUSTER]
    assert done.is_set()
