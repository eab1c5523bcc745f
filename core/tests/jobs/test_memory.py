"""The buffers of jobs."""

from __future__ import annotations

import ctypes

import pytest

from vm_core.block.jobs.memory import ALIGNMENT, WORTH_ALIGNING, page_buffer


def address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("length", [ALIGNMENT, ALIGNMENT + 512, 256 * 1024, 2 * 1024 * 1024])
def test_large_jobs_get_pages(length: int) -> None:
    """A buffer has the length that was asked for, zeroes, and begins at a page; it can be filled to its last byte."""
    buffers = [page_buffer(length, WORTH_ALIGNING) for _ in range(4)]
    for number, buffer in enumerate(buffers):
        assert address(buffer) % ALIGNMENT == 0
        assert buffer == bytes(length)
        buffer[:] = bytes([number + 1]) * length
    for number, buffer in enumerate(buffers):
        assert buffer == bytes([number + 1]) * length


def test_small_jobs_get_what_there_is() -> None:
    """Who moves little, or needs little, pays nothing for an address."""
    assert page_buffer(65536, WORTH_ALIGNING - 1) == bytes(65536)
    assert page_buffer(512, 1 << 40) == bytes(512)
    assert page_buffer(0, 1 << 40) == b""
