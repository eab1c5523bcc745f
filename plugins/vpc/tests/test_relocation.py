"""Compacting dynamic VHD images: blocks move into the places of blocks that are zeroes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vm_core.block.jobs.compact import compact
from vm_core.block.open import open_node
from vm_core.testing.compaction import CompactionTests, judge, scattered


class TestCompacting(CompactionTests):
    """The kit's tests."""

    driver = "vpc"
    cases = (({}, 1 << 21),)


@pytest.mark.parametrize("blocks", [1, 5])
def test_metadata_between_blocks_stays(tmp_path: Path, blocks: int) -> None:
    """A table that lies *blocks* blocks behind the first one, or behind all, is neither written over nor cut off."""
    image = scattered(tmp_path / "made", "vpc", {}, 1 << 21, seed=1)
    path = tmp_path / "moved.vhd"
    data = bytearray(image.data)
    (at,) = struct.unpack_from(">Q", data, 16)
    (former,) = struct.unpack_from(">Q", data, at + 16)
    (count,) = struct.unpack_from(">I", data, at + 28)
    table = bytearray(data[former : former + 4 * count])
    entries = struct.unpack(f">{count}I", table)
    stride = (1 << 21) + 512
    starts = sorted(entry for entry in entries if entry != 0xFFFFFFFF)
    # Blocks from the given one on move one place up, and the table takes the place.
    border = starts[blocks] if blocks < len(starts) else starts[-1] + stride // 512
    end = len(data) - 512
    data[border * 512 + stride :] = data[border * 512 :]
    data[border * 512 : border * 512 + stride] = bytes(stride)
    assert len(data) == end + 512 + stride
    moved = [entry + stride // 512 if entry != 0xFFFFFFFF and entry >= border else entry for entry in entries]
    struct.pack_into(f">{count}I", data, border * 512 + (1 << 20), *moved)
    struct.pack_into(">Q", data, at + 16, border * 512 + (1 << 20))
    struct.pack_into(">I", data, at + 36, 0)
    struct.pack_into(">I", data, at + 36, ~sum(data[at : at + 1024]) & 0xFFFFFFFF)
    path.write_bytes(data)
    judge("vpc", tmp_path / "before", path.read_bytes(), image.model)
    with open_node(str(path), format="vpc", readonly=False) as node:
        compact(node)
    judge("vpc", tmp_path / "after", path.read_bytes(), image.model)
