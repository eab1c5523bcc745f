"""Fixtures of the QCOW2 tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vm_core.testing.qemu import Qemu

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def qemu() -> Qemu:
    """The peer; skipped (in CI: failed) where it is not installed."""
    return Qemu("qcow2")
