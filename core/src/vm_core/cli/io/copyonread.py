"""``-C``: what is read from backing images becomes the image's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...block.formatnode import FormatNode
from ...block.vectors import is_zero
from .look import allocated

if TYPE_CHECKING:
    from ...block.node import Node

#: Bytes that are copied at once.
STEP = 1 << 20


def copy_up(node: Node, offset: int, length: int) -> None:
    """Give the image in *node* the clusters of a range that it lacks. Raises BlockError."""
    if isinstance(node, FormatNode):
        node.copy_up(offset, length)
        return
    # Through filters above the image, so that they see it.
    image: Node | None = node
    while image is not None and not isinstance(image, FormatNode):
        children = image.children()
        image = children.get("file") or children.get("image")
    if image is None:
        return
    unit = image.cluster_size
    start, end = offset - offset % unit, min(-(-(offset + length) // unit) * unit, node.size)
    for begin, size, said in list(allocated(node, start, end - start)):
        for at in range(begin, begin + size, STEP) if not said else ():
            step = min(STEP, begin + size - at)
            data = [memoryview(bytearray(step))]
            node.read(at, data)
            node.event("cor_write")
            if is_zero(data):
                node.zero(at, step)
            else:
                node.write(at, data)
