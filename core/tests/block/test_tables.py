"""Tables of numbers: runs are found as one by one, and bytes come out as they went in."""

from __future__ import annotations

import random
from array import array

import pytest

from vm_core.block.tables import dump, load, places, run_length, runs


def slow(entries: array[int], index: int, stop: int, step: int) -> int:
    count = 1
    while index + count < stop and entries[index + count] == entries[index + count - 1] + step:
        count += 1
    return count


@pytest.mark.parametrize("code", ["I", "Q"])
@pytest.mark.parametrize("seed", range(20))
def test_run_length(code: str, seed: int) -> None:
    """Runs of equal and of ascending numbers of any length, up to the largest number there is."""
    chance = random.Random(seed)
    top = (1 << 8 * array(code).itemsize) - 1
    entries = array(code)
    while len(entries) < 9000:
        step = chance.choice([0, 0, 1, 7])
        count = chance.choice([1, 2, 15, 16, 17, 100, 4000])
        first = chance.choice([0, top - count * step, chance.randrange(1 << 20)])
        entries.extend(first + n * step for n in range(count))
    for _ in range(200):
        index = chance.randrange(len(entries))
        stop = chance.randrange(index + 1, len(entries) + 1)
        for step in (0, 1, 7):
            assert run_length(entries, index, stop, step) == slow(entries, index, stop, step)


@pytest.mark.parametrize("order", ["big", "little"])
def test_bytes(order: str) -> None:
    """The byte order is that of the format, whatever the machine's."""
    data = bytes(range(16))
    entries = load("I", data, order)  # type: ignore[arg-type]
    assert entries[0] == int.from_bytes(data[:4], order)  # type: ignore[arg-type]
    assert dump(entries, order) == data  # type: ignore[arg-type]
    assert entries[3] == int.from_bytes(data[12:], order), "dumping leaves the array as it is"  # type: ignore[arg-type]


def test_runs() -> None:
    """Consecutive numbers become runs."""
    assert list(runs([])) == []
    assert list(runs([0])) == [(0, 1)]
    assert list(runs([0, 1, 2, 7, 9, 10])) == [(0, 3), (7, 1), (9, 2)]


def test_places() -> None:
    """What is below the limit, in runs; markers that happen to follow on do not belong to them."""
    limit = 0xFFFFFFFE
    entries = array("I", [5, 6, 7, limit, limit, 3, limit - 2, limit - 1, limit, limit + 1, 0])
    assert places(entries, limit, 1) == [(5, 3, 0), (3, 1, 5), (limit - 2, 2, 6), (0, 1, 10)]
