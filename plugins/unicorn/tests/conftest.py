"""Every behaviour is tested in every way of running that this host offers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from unicorn_guest import FakeMachine

from vm_core.errors import UsageError


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
