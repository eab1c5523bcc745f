"""What a copy reads is planned: every byte once, data whole, zeroes and the backing image's left alone."""

from __future__ import annotations

import itertools
import random

import pytest

from vm_core.block.jobs.source import Request, Run, Source, read_request, requests
from vm_core.block.mapping import Kind
from vm_core.block.node import sectors_up
from vm_core.testing.nodes import MemoryNode

K = 1024


def random_runs(chance: random.Random, size: int, *, unallocated: bool) -> list[Run]:
    node = MemoryNode(bytes(chance.randrange(1, 256) for _ in range(64)) * (size // 64 + 1))
    kinds = [Kind.DATA, Kind.ZERO] + [Kind.UNALLOCATED] * unallocated
    runs: list[Run] = []
    position = 0
    while position < size:
        length = min(size - position, 512 * chance.choice((1, 2, 3, 7, 8, 9, 40, 200)))
        kind = chance.choice(kinds)
        runs.append(Run(kind, position, length, node if kind is Kind.DATA else None, position))
        position += length
    return runs


def expand(found: list[Request], size: int) -> tuple[bytearray, bytearray]:
    """The bytes that requests bring, and which of them are told (1 data, 2 zeroes)."""
    data, told = bytearray(size), bytearray(size)
    for one in found:
        assert not any(told[one.offset : one.offset + one.length]), "told twice"
        if one.kind is Kind.DATA:
            buffer = bytearray(b"?" * one.length)
            with memoryview(buffer) as view:
                read_request(one, view)
            data[one.offset : one.offset + one.length] = buffer
            told[one.offset : one.offset + one.length] = b"\1" * one.length
        else:
            told[one.offset : one.offset + one.length] = b"\2" * one.length
    return data, told


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("grain", [1, 4 * K, 64 * K])
def test_every_byte_is_planned_once(seed: int, grain: int) -> None:
    """Requests are in order, whole clusters, no longer than a step, and bring what the runs hold."""
    chance = random.Random(seed * 7 + grain)
    size = 512 * chance.randrange(1, 1500)
    runs = random_runs(chance, size, unallocated=grain == 1)
    step = 64 * K
    found = list(requests(iter(runs), size, grain=grain, step=step, zeroes=True))
    assert [one.number for one in found] == list(range(len(found)))
    assert all(a.offset + a.length <= b.offset for a, b in itertools.pairwise(found))
    for one in found:
        if one.kind is Kind.DATA:
            assert 0 < one.length <= step
            assert one.offset % grain == 0
            assert (one.offset + one.length) % grain == 0 or one.offset + one.length == size
    data, told = expand(found, size)
    for run in runs:
        where = slice(run.offset, run.offset + run.length)
        if run.kind is Kind.DATA:
            assert run.node is not None
            assert data[where] == run.node.pread(run.host, run.length)
            assert set(told[where]) == {1}
        elif run.kind is Kind.ZERO:
            assert not any(data[where])
            assert set(told[where]) <= {1, 2}
        else:
            assert not any(told[where])


def test_zeroes_are_left_out_unless_asked_for() -> None:
    """Known zeroes are requests only where the target does not read as zeroes by itself."""
    runs = [Run(Kind.ZERO, 0, 64 * K), Run(Kind.DATA, 64 * K, K, MemoryNode(b"x" * 65 * K), 64 * K)]
    assert [one.kind for one in requests(iter(runs), 65 * K)] == [Kind.DATA]
    assert [one.kind for one in requests(iter(runs), 65 * K, zeroes=True)] == [Kind.ZERO, Kind.DATA]


def test_images_stand_behind_each_other_at_sectors() -> None:
    """Each image begins at a whole sector, and zeroes fill the rest of the one before."""
    source = Source([MemoryNode(b"a" * 700), MemoryNode(b"b" * 512)])
    assert source.size == 1536 == sectors_up(700) + 512
    data, _ = expand(list(requests(source.runs(), source.size)), source.size)
    assert bytes(data) == b"a" * 700 + bytes(324) + b"b" * 512
