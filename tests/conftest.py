"""Fixtures for the tests that cross packages."""

from __future__ import annotations

import pytest

from vmtest.linux import LinuxParts, linux_parts


@pytest.fixture(scope="session")
def linux() -> LinuxParts:
    """Debian's i386 kernel, its modules and busybox."""
    return linux_parts()
