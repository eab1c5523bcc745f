"""Growing an image with host space for what is gained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from .node import Node


def grow_allocated(node: Node, size: int, mode: str) -> None:
    """Make *node* *size* bytes long and set host space aside; *mode* is ``metadata``, ``falloc`` or ``full``.

    Raises UsageError where the format cannot.
    """
    from .formatnode import FormatNode

    if isinstance(node, FormatNode):
        node.truncate_preallocated(size, mode)
        return
    if mode == "metadata":
        raise UsageError(f"Unsupported preallocation mode: {mode}")
    former = node.size
    node.truncate(size)
    if size > former:
        node.reserve(former, size - former, full=mode == "full")
