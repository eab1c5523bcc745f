"""Fixtures of the QCOW2 tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from qcow2_peer import Qemu


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    """The peer; skipped (in CI: failed) where it is not installed."""
    return Qemu()
