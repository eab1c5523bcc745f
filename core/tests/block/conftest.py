"""What the block tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm_core.plugins import registry
from vm_core.testing import toy


@pytest.fixture
def toy_driver() -> Iterator[None]:
    """The toy format, installed for one test."""
    registry().register(toy, "vm-toy")
    yield
    registry().unregister(toy)
