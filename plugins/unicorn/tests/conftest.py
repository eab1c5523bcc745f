"""Every behaviour is tested in every way of running that this host offers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm_core.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent))

from unicorn_guest import FakeMachine


@pytest.fixture(params=["native", "block", "count"])
def mode(request: pytest.FixtureRequest) -> str:
    """A mode of the accelerator."""
    return str(request.param)


@pytest.fixture
def machine(mode: str) -> Iterator[FakeMachine]:
    """A machine that works in *mode*; skips where the host does not offer it."""
    try:
        made = FakeMachine(mode)
    except UsageError as error:
        pytest.skip(str(error))
    assert made.cpu.mode == mode
    made.flat_tables()
    yield made
    made.cpu.close()
