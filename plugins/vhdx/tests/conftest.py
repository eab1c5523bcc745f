"""Fixtures of the VHDX tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vm_core.testing.qemu import Qemu


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    """The peer; skipped (in CI: failed) where it is not installed."""
    return Qemu("vhdx")
