"""The machine's state that an image keeps past its last guest byte (``-b``)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import BlockError

if TYPE_CHECKING:
    from ...block.formatnode import FormatNode
    from ...block.node import Node


def _keeper(node: Node) -> FormatNode | None:
    """The image below filters that keeps a machine's state."""
    from ...block.formatnode import FormatNode

    current: Node | None = node
    while current is not None:
        if isinstance(current, FormatNode):
            return current if current.format.state_offset is not None else None
        current = current.children().get("file")
    return None


def state_offset(node: Node) -> int:
    """Where the state begins in guest bytes; 0 where there is none."""
    keeper = _keeper(node)
    return 0 if keeper is None else keeper.format.state_offset or 0


def read_state(node: Node, offset: int, buffer: memoryview) -> None:
    """Read the state from *offset* on. Raises BlockError."""
    keeper = _keeper(node)
    if keeper is None:
        raise BlockError.of(errno.ENOTSUP)
    keeper.read_state(offset, [buffer])


def write_state(node: Node, offset: int, buffers: Sequence[memoryview], length: int) -> None:
    """Write the state from *offset* on. Raises BlockError."""
    keeper = _keeper(node)
    if keeper is None:
        raise BlockError.of(errno.ENOTSUP)
    keeper.write_state(offset, buffers)
