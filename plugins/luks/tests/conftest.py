"""Fixtures of the LUKS tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from luks_peer import Peers, add_secret

from vm_core.crypto import secrets


@pytest.fixture(scope="session")
def peers() -> Peers:
    """The peers; skipped (in CI: failed) where they are not installed."""
    return Peers()


@pytest.fixture(autouse=True)
def _secret() -> Iterator[None]:
    add_secret()
    yield
    secrets.clear()
