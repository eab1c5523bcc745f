"""Fixtures of the tests that run the tools beside the peer's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from both import Both


@pytest.fixture
def both(tmp_path: Path) -> Both:
    """Two folders, for the peer's tool and for ours."""
    return Both(tmp_path)
