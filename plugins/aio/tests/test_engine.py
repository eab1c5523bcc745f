"""What the engines make of a kernel's answers, and what they hold meanwhile, with a kernel that does as it is told."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable

import pytest
from aio_kit import Scripted, Setup, carry, data_of, file_below, reading, writing

from vm_core.block import file as file_module
from vm_core.block.cache import CacheMode
from vm_core.block.node import Node
from vm_core.block.request import Op, Request
from vm_core.testing.nodes import MemoryNode

SIZE = 1 << 20


def disk(setup: Setup) -> tuple[bytes, Node]:
    data = random.Random(5).randbytes(SIZE)
    return data, setup.open(setup.raw(data))


def no_cache(node: Node) -> None:
    """Reads are not answered from the page cache, so the engine gets them all."""
    file_below(node)._can_nowait = False


def test_short_transfers_go_on(setup: Setup) -> None:
    """Reads and writes of which the kernel moves a part go on where they stopped, in the middle of buffers too."""
    data, node = disk(setup)
    no_cache(node)
    dice = random.Random(2)
    kernel = Scripted(verdict=lambda write, offset, length: dice.randrange(1, length + 1))
    backend = setup.scripted(node, kernel)
    reads = [reading(start, 9000) for start in range(0, 200_000, 7001)]
    for read in reads:
        view = read.buffers[0]
        read.buffers = (view[:13], view[13:5000], view[5000:])
    carry(backend, reads)
    for read in reads:
        assert read.status == 0
        assert data_of(read) == data[read.offset : read.offset + 9000]
    assert len(kernel.seen) > len(reads)
    carry(backend, [writing(500_000, b"x" * 70_000), writing(700_000, b"y" * 3)])
    assert node.pread(499_999, 70_002) == data[499_999:500_000] + b"x" * 70_000 + data[570_000:570_001]
    assert node.pread(700_000, 4) == b"yyy" + data[700_003:700_004]


def test_buffers_of_no_length(setup: Setup) -> None:
    """Buffers without any bytes may be among those of a request, as with any other engine."""
    data, node = disk(setup)
    no_cache(node)
    backend = setup.scripted(node, Scripted())
    read, write = reading(4096, 1024), writing(8192, b"z" * 512)
    view = read.buffers[0]
    read.buffers = (memoryview(bytearray()), view[:512], view[512:512], view[512:])
    write.buffers = (*write.buffers, memoryview(bytearray()))
    carry(backend, [read, write])
    assert read.status == write.status == 0
    assert data_of(read) == data[4096:5120]
    assert node.pread(8192, 513) == b"z" * 512 + data[8704:8705]


def test_end_of_file(setup: Setup) -> None:
    """A cluster of which the file has only the beginning reads as zeroes from there on."""
    node = setup.toy(1 << 16)
    node.pwrite(0, b"\xee" * 65536)
    node.flush()
    node.flush()
    file = file_below(node)
    os.truncate(file.filename, file.size - 1000)
    no_cache(node)
    kernel = Scripted()
    backend = setup.scripted(node, kernel)
    request = reading(0, 65536)
    carry(backend, [request])
    assert data_of(request) == b"\xee" * 64536 + bytes(1000)
    assert len(kernel.seen) == 2


@pytest.mark.parametrize(
    "code", [errno.EAGAIN, errno.EINTR, errno.ECANCELED, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOMEM]
)
def test_refusals_are_carried_out_otherwise(setup: Setup, code: int) -> None:
    """What the kernel refuses for no fault of the disk's is done by the workers; the guest sees nothing of it."""
    data, node = disk(setup)
    no_cache(node)
    kernel = Scripted(verdict=lambda write, offset, length: -code if offset < SIZE // 2 else length)
    backend = setup.scripted(node, kernel)
    requests = [reading(start, 4096) for start in range(0, SIZE, 65536)]
    requests += [writing(start + 8192, b"w" * 4096) for start in range(0, SIZE, 65536)]
    carry(backend, requests)
    assert all(request.status == 0 for request in requests)
    assert all(data_of(one) == data[one.offset : one.offset + 4096] for one in requests if one.op is Op.READ)
    for start in range(0, SIZE, 65536):
        assert node.pread(start + 8192, 4096) == b"w" * 4096


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENODATA])
def test_errors(setup: Setup, code: int) -> None:
    """The disk's own errors are the request's status, once all of its parts have come back; others go well."""
    _, node = disk(setup)
    no_cache(node)
    kernel = Scripted(verdict=lambda write, offset, length: -code if offset // 4096 % 2 else length)
    backend = setup.scripted(node, kernel)
    requests = [reading(start, 4096) for start in range(0, 65536, 4096)]
    requests += [writing(start, b"w" * 4096) for start in range(65536, 131072, 4096)]
    carry(backend, requests)
    assert [request.status for request in requests] == [0, code] * 16
    assert backend.stats.failed_reads == backend.stats.failed_writes == 8


def test_an_error_in_one_part(setup: Setup) -> None:
    """A request of several runs fails as a whole if one run fails, even where another was refused in passing."""
    node = setup.toy(1 << 16)
    for start in (0, 8192, 4096, 12288):  # not in order, so that runs do not adjoin
        node.pwrite(start, bytes([1 + start // 4096]) * 4096)
    no_cache(node)
    kernel = Scripted(slots=2)
    answers = iter((-errno.EAGAIN, 4096, -errno.EIO, 4096))
    kernel.verdict = lambda write, offset, length: next(answers)
    backend = setup.scripted(node, kernel)
    request = reading(0, 16384)
    carry(backend, [request])
    assert request.status == errno.EIO
    assert len(kernel.seen) == 4


def test_more_than_slots(setup: Setup) -> None:
    """Requests beyond the kernel's entries wait for their turn and lose none."""
    data, node = disk(setup)
    no_cache(node)
    kernel = Scripted(slots=4)
    backend = setup.scripted(node, kernel)
    requests = [reading(start, 512) for start in range(0, 512 * 1000, 512)]
    carry(backend, requests)
    assert kernel.most <= 4
    assert all(data_of(one) == data[one.offset : one.offset + 512] for one in requests)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node.discard(4096, 8192),
        lambda node: node.zero(4096, 4096, unmap=True),
        lambda node: node.truncate(1 << 15),
        lambda node: node.quiesce().__enter__(),
    ],
    ids=["discard", "zero", "truncate", "quiesce"],
)
@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
def test_mappings_stay(setup: Setup, op: Op, change: Callable[[Node], None]) -> None:
    """While a read or a write in place is in the kernel, nobody changes the mapping of its clusters."""
    node = setup.toy(1 << 16)
    node.pwrite(0, b"\x55" * 65536)
    no_cache(node)
    kernel = Scripted()
    kernel.held = True
    backend = setup.scripted(node, kernel)
    request = reading(4096, 4096) if op is Op.READ else writing(4096, b"\x66" * 4096)
    backend.submit([request])
    assert len(kernel.seen) == 1
    changing = threading.Thread(target=change, args=(node,))
    changing.start()
    changing.join(0.2)
    assert changing.is_alive(), "the change did not wait for what is in flight"
    # Who comes after the change waits for it, off the kernel's queue.
    later = reading(4096, 512)
    backend.submit([later])
    assert len(kernel.seen) == 1
    kernel.let_go()
    changing.join(10)
    assert not changing.is_alive()
    if op is Op.READ:
        assert data_of(request) == b"\x55" * 4096


def test_other_clusters_do_not_wait(setup: Setup) -> None:
    """What is in flight on one cluster holds up no change of another."""
    node = setup.toy(1 << 16)
    node.pwrite(0, b"\x55" * 65536)
    no_cache(node)
    kernel = Scripted()
    kernel.held = True
    backend = setup.scripted(node, kernel)
    backend.submit([reading(4096, 4096)])
    node.discard(16384, 4096)
    node.pwrite(20480, b"\x77" * 100)
    kernel.let_go()


def test_unaligned_writes_wait_for_direct_ones(setup: Setup) -> None:
    """Under O_DIRECT a write of a part of a block, which reads and writes back all of it, waits for one in flight."""
    _, _ = setup, None
    node = setup.open(setup.raw(bytes(SIZE)), cache=CacheMode(direct=True))
    kernel = Scripted()
    kernel.held = True
    backend = setup.scripted(node, kernel)
    whole = writing(0, b"\x11" * 4096)
    backend.submit([whole])
    part = threading.Thread(target=node.pwrite, args=(100, b"\x22" * 7))
    part.start()
    part.join(0.2)
    assert part.is_alive()
    kernel.let_go()
    part.join(10)
    assert node.pread(0, 4096) == b"\x11" * 100 + b"\x22" * 7 + b"\x11" * 3989


def test_flush_follows_writes(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush after a write that the engine completed reaches the disk; one with nothing new to tell does not."""
    synced: list[int] = []
    monkeypatch.setattr(file_module, "_sync", synced.append)
    _, node = disk(setup)
    backend = setup.scripted(node, Scripted())
    carry(backend, [Request(Op.FLUSH)])
    assert not synced
    carry(backend, [writing(0, b"x" * 512)])
    carry(backend, [Request(Op.FLUSH)])
    carry(backend, [Request(Op.FLUSH)])
    assert len(synced) == 1


def test_a_failed_write_is_flushed_too(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that failed may have left something behind, so the next flush goes to the disk."""
    synced: list[int] = []
    monkeypatch.setattr(file_module, "_sync", synced.append)
    _, node = disk(setup)
    backend = setup.scripted(node, Scripted(verdict=lambda write, offset, length: -errno.EIO))
    carry(backend, [writing(0, b"x" * 512)])
    carry(backend, [Request(Op.FLUSH)])
    assert len(synced) == 1


@pytest.mark.parametrize("how", ["fua", "write cache off", "writethrough"])
def test_stable_writes(setup: Setup, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A write that has to be stable is: by the kernel's flag on a plain file, by a flush of everything on a format."""
    synced: list[int] = []
    monkeypatch.setattr(file_module, "_sync", synced.append)
    cache = CacheMode(writethrough=how == "writethrough")
    for node in (disk(setup)[1], setup.toy(1 << 16)):
        node.pwrite(0, b"\x01" * 4096)
        node.flush()
        synced.clear()
        kernel = Scripted()
        backend = setup.scripted(node, kernel, cache=cache)
        if how == "write cache off":
            backend.write_cache = False
        carry(backend, [writing(512, b"x" * 512, fua=how == "fua")])
        if node.driver == "raw":
            assert [entry[3] for entry in kernel.seen] == [True]
            assert not synced
        else:
            assert not kernel.seen
            assert synced
        assert node.pread(511, 3) == b"\x01xx"


def test_what_the_kernel_cannot_do(setup: Setup) -> None:
    """Allocating writes, zeroes, discards, guarded and other nodes' requests go by the workers, and go well."""
    node = setup.toy(1 << 16)
    kernel = Scripted()
    backend = setup.scripted(node, kernel)
    requests = [writing(0, b"new" * 1000), Request(Op.ZERO, 8192, 4096), Request(Op.DISCARD, 16384, 4096)]
    carry(backend, [*requests, Request(Op.FLUSH)])
    assert not kernel.seen
    assert node.pread(0, 3000) == b"new" * 1000
    other = Scripted()
    backend = setup.scripted(MemoryNode(bytes(8192)), other)
    request = writing(100, b"abc")
    carry(backend, [request])
    assert not other.seen
    assert request.status == 0
    past = reading(8000, 4096)
    carry(backend, [past])
    assert past.status == errno.EIO


def test_guarded_raw(setup: Setup) -> None:
    """Through an engine too, a raw image that was only guessed to be one does not become another format."""
    from vm_core.block.open import open_node

    node = open_node({"filename": str(setup.raw(bytes(SIZE)))}, readonly=False, warn=lambda text: None)
    kernel = Scripted()
    backend = setup.scripted(node, kernel)
    header, inside = writing(0, b"QFI\xfb\0\0\0\3" + bytes(504)), writing(SIZE // 2, b"QFI\xfb\0\0\0\3" + bytes(504))
    carry(backend, [header, inside])
    assert header.status == errno.EPERM
    assert inside.status == 0
    assert [entry[1] for entry in kernel.seen] == [SIZE // 2]


def test_read_only(setup: Setup) -> None:
    """Writes to what may only be read fail as they do without an engine."""
    node = setup.open(setup.raw(bytes(SIZE)), readonly=True)
    kernel = Scripted()
    request = writing(0, b"x" * 512)
    carry(setup.scripted(node, kernel), [request])
    assert request.status == errno.EACCES
    assert not kernel.seen


def test_attended(setup: Setup) -> None:
    """An engine that is attended hands requests back on the thread that polls, those of its workers included."""
    data, node = disk(setup)
    no_cache(node)
    kernel = Scripted(slots=4)
    backend = setup.scripted(node, kernel)
    assert backend.attend()
    threads: set[int] = set()
    finished: list[Request] = []

    def sink(requests: list[Request]) -> None:
        threads.add(threading.get_ident())
        finished.extend(requests)

    backend.set_completion_sink(sink)
    requests = [reading(start, 512) for start in range(0, 512 * 50, 512)]
    backend.submit(requests)
    assert not finished
    while len(finished) < 50:
        backend.poll()
    assert all(data_of(one) == data[one.offset : one.offset + 512] for one in requests)
    assert threads == {threading.get_ident()}
