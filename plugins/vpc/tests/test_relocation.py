"""Compacting dynamic VHD images: blocks move into the places of blocks that are zeroes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.jobs.compact import compact
from vm_core.block.open import open_node
from vm_core.testing.compaction import judge, scattered, shrink, stop, survive

CASES: list[tuple[dict[str, Any], int]] = [({}, 1 << 21)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("options", "unit"), CASES, ids=str)
def test_shorter(tmp_path: Path, options: dict[str, Any], unit: int, seed: int) -> None:
    """The file gets shorter, and holds the same for the peer too, which finds nothing wrong."""
    image = scattered(tmp_path / "made", "vpc", options, unit, seed=seed)
    result, after = shrink(image)
    assert result.moved is not None
    assert result.length_before - result.length_after >= unit * 4
    judge("vpc", tmp_path / "image", after, image.model)


@pytest.mark.parametrize(("options", "unit"), CASES, ids=str)
def test_power_cuts(tmp_path: Path, options: dict[str, Any], unit: int) -> None:
    """At every write the image opens, is sound, and holds the same."""
    image = scattered(tmp_path / "made", "vpc", options, unit, units=14, seed=5)
    path = tmp_path / "cut"
    survive(image, portion=3 * unit, judge=lambda data: judge("vpc", path, data, image.model, check=False))


def test_stopping(tmp_path: Path) -> None:
    """Wherever it is stopped, the image is sound."""
    options, unit = CASES[0]
    image = scattered(tmp_path / "made", "vpc", options, unit, units=12, seed=3)
    stop(image, portion=2 * unit)


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
