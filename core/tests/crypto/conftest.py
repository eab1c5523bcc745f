"""What the tests of encryption share."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(scope="session")
def qemu_img() -> str | None:
    """The peer's program, where it is installed."""
    return shutil.which("qemu-img")
