"""Compacting VDI images: blocks move into the places of blocks that are zeroes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vm_core.testing.compaction import judge, scattered, shrink, stop, survive

CASES: list[tuple[dict[str, Any], int]] = [({}, 1 << 20)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("options", "unit"), CASES, ids=str)
def test_shorter(tmp_path: Path, options: dict[str, Any], unit: int, seed: int) -> None:
    """The file gets shorter, and holds the same for the peer too, which finds nothing wrong."""
    image = scattered(tmp_path / "made", "vdi", options, unit, seed=seed)
    result, after = shrink(image)
    assert result.moved is not None
    assert result.length_before - result.length_after >= unit * 4
    judge("vdi", tmp_path / "image", after, image.model)


@pytest.mark.parametrize(("options", "unit"), CASES, ids=str)
def test_power_cuts(tmp_path: Path, options: dict[str, Any], unit: int) -> None:
    """At every write the image opens, is sound, and holds the same."""
    image = scattered(tmp_path / "made", "vdi", options, unit, units=14, seed=5)
    path = tmp_path / "cut"
    survive(
        image,
        portion=3 * unit,
        tolerated=("ERROR: allocated blocks mismatch",),
        judge=lambda data: judge("vdi", path, data, image.model, check=False),
    )


def test_stopping(tmp_path: Path) -> None:
    """Wherever it is stopped, the image is sound."""
    options, unit = CASES[0]
    image = scattered(tmp_path / "made", "vdi", options, unit, units=12, seed=3)
    stop(image, portion=2 * unit)
