"""The machine's state that an image keeps past its last guest byte (``-b``)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ...errors import BlockError, VmError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...block.node import Buffer, Node


def state_offset(node: Node) -> int:
    """Where the state begins in guest bytes; 0 where there is none."""
    from ...block.formatnode import FormatNode

    current: Node | None = node
    while current is not None and not isinstance(current, FormatNode):
        children = current.children()
        current = children.get("file") or children.get("image")
    return 0 if current is None else current.format.vmstate_offset() or 0


def read_state(node: Node, offset: int, buffer: memoryview) -> None:
    """Read the state from *offset* on. Raises BlockError."""
    _supported(lambda: node.read_vmstate(offset, [buffer]))


def write_state(node: Node, offset: int, buffers: Sequence[Buffer]) -> None:
    """Write the state from *offset* on. Raises BlockError."""
    _supported(lambda: node.write_vmstate(offset, buffers))


def _supported(work: Callable[[], None]) -> None:
    try:
        work()
    except VmError:
        raise BlockError.of(errno.ENOTSUP) from None
