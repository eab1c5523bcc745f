"""Compact: space is given back and nothing changes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from vm_core.block.file import FileProtocol
from vm_core.block.jobs.compact import compact
from vm_core.block.raw import RawNode

from .kit import CLUSTER, K, contents, scribble, toy


def test_raw_files_get_holes(tmp_path: Path) -> None:
    """Zero blocks of a raw image become holes."""
    path = tmp_path / "image"
    data = os.urandom(256 * K) + bytes(1024 * K) + os.urandom(5000) + bytes(100 * K)
    path.write_bytes(data)
    with RawNode(FileProtocol(os.open(path, os.O_RDWR), str(path), readonly=False)) as node:
        result = compact(node)
    assert path.read_bytes() == data
    assert result.zeroes >= 1024 * K
    assert result.after < result.before - 900 * K


@pytest.mark.parametrize("seed", range(10))
def test_images_keep_what_they_show(seed: int) -> None:
    """With data, zeroes, holes and a backing image whose data must not show through."""
    chance = random.Random(seed)
    size = 300 * K + 512
    model = bytearray(size)
    below = toy(size)
    scribble(chance, below, model)
    node = toy(size, backing=below)
    scribble(chance, node, model)
    node.pwrite(0, bytes(8 * CLUSTER))
    model[: 8 * CLUSTER] = bytes(8 * CLUSTER)
    result = compact(node)
    assert contents(node) == model
    assert result.zeroes >= 8 * CLUSTER
