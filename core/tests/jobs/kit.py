"""Images of the toy format in memory, and a model of what they hold."""

from __future__ import annotations

import random

from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Node
from vm_core.block.open import OpenContext
from vm_core.testing.nodes import MemoryNode
from vm_core.testing.toy import Toy

K = 1024
CLUSTER = 4 * K


def toy(size: int, *, backing: Node | None = None, file: Node | None = None, cluster: int = CLUSTER) -> FormatNode:
    """A new image, with *backing* below it."""
    storage = file or MemoryNode()
    Toy.create(storage, size, {"cluster_size": cluster})
    return FormatNode(Toy.open(storage, {}, OpenContext(readonly=False)), driver="toy", backing=backing)


def scribble(chance: random.Random, node: Node, model: bytearray, count: int = 20) -> None:
    """Write, zero and discard here and there, in the image and in the model of what it holds."""
    size = node.size
    for _ in range(count):
        offset = chance.randrange(size)
        length = min(size - offset, chance.choice((1, 512, 3000, CLUSTER, 5 * CLUSTER, 100 * K)))
        action = chance.randrange(4)
        if action == 3:
            node.zero(offset, length, unmap=bool(chance.randrange(2)))
            model[offset : offset + length] = bytes(length)
        else:
            data = bytes([chance.randrange(1, 256)]) * length if action else bytes(length)
            node.pwrite(offset, data)
            model[offset : offset + length] = data


def contents(node: Node) -> bytes:
    """All that a guest sees."""
    return node.pread(0, node.size)
