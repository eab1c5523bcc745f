"""Fixtures of the engines' tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from aio_kit import Setup, skip_unless_supported


@pytest.fixture(params=["io_uring", "native"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine that this kernel lets us have."""
    name = str(request.param)
    skip_unless_supported(name)
    return name


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    """Makes images and backends, and closes what was left open."""
    made = Setup(tmp_path)
    yield made
    made.close()
