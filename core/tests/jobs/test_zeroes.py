"""Zeroes in data are found as whole blocks, wherever they lie."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.block.jobs.zeroes import all_zero, data_runs, zero_blocks


def naive_runs(data: bytes, grain: int, start: int) -> list[tuple[int, int]]:
    """Block by block."""
    runs: list[tuple[int, int]] = []
    position = 0
    while position < len(data):
        end = min(len(data), position + grain - (start + position) % grain)
        if any(data[position:end]):
            if runs and runs[-1][1] == position:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((position, end))
        position = end
    return runs


@given(
    seed=st.integers(0, 1 << 32),
    grain=st.sampled_from([512, 1024, 4096]),
    length=st.integers(0, 20000),
    skew=st.integers(0, 40).map(lambda n: n * 512),
)
@settings(max_examples=200, deadline=None)
def test_runs_are_those_of_a_look_at_every_byte(seed: int, grain: int, length: int, skew: int) -> None:
    """Runs of data are the blocks with any byte that is not zero, joined."""
    chance = random.Random(seed)
    data = bytearray(length)
    for _ in range(chance.randrange(6)):
        if length:
            at = chance.randrange(length)
            data[at : at + chance.choice((1, 1, 600, 5000))] = b"x"
    data = data[:length].ljust(length, b"\0")
    buffer = bytearray(data) + b"rubbish behind the data"
    assert data_runs(buffer, length, grain, 0, skew) == naive_runs(bytes(data), grain, skew)


def test_short_zeroes_count_as_data() -> None:
    """A gap shorter than the least that is worth a hole stays in its run."""
    data = bytearray(b"x" * 4096 + bytes(4096) + b"y" * 4096 + bytes(8192) + b"z" * 4096)
    assert data_runs(data, len(data), 4096, 8192) == [(0, 12288), (20480, 24576)]


@pytest.mark.parametrize("length", [0, 1, 511, 4096, 256 * 1024, 256 * 1024 + 1, 3 << 20])
def test_a_single_byte_is_seen(length: int) -> None:
    """Any byte that is not zero is found, at the ends and inside, in ranges longer than the constant of zeroes."""
    data = bytearray(length)
    assert all_zero(data, 0, length)
    for at in {0, length // 2, length // 3, length - 1} if length else ():
        data[at] = 1
        assert not all_zero(data, 0, length)
        assert all_zero(data, 0, at)
        assert all_zero(data, at + 1, length)
        data[at] = 0


def test_last_block_may_be_short() -> None:
    """What is behind the last whole block is a block of its own."""
    assert zero_blocks(bytearray(b"x" * 4096 + bytes(100)), 4196, 4096) == [1]
    assert zero_blocks(bytearray(b"x" * 4096 + bytes(99) + b"y"), 4196, 4096) == []
