"""When errors are told."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vm_core.block.notices import report
from vm_core.cli.img.common import Exit, Failure, Tool
from vm_core.errors import BlockError


@contextmanager
def image() -> Iterator[None]:
    """Something that has more to say when it is closed."""
    try:
        yield
    finally:
        report("Failed to flush the L2 table cache: No space left on device")


@pytest.mark.parametrize(
    "error", [BlockError.of(errno.ENOSPC, "Failed to grow the L1 table: No space"), Failure("x", 3)]
)
def test_failure_is_told_before_images_are_closed(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence of what failed comes first, then what closing adds; the exit code is the failure's."""
    tool = Tool("qemu-img")
    with pytest.raises(Exit) as end, image(), tool.telling():
        raise error
    assert end.value.code == (3 if isinstance(error, Failure) else 1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"qemu-img: {error.args[-1] if isinstance(error, BlockError) else error}".replace(": 3", ": x")
    assert "Failed to flush" in second
