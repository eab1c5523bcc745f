"""Whether there is a disc in the drive: some storage of the host has a medium that comes and goes (``host_cdrom``).

A node says by :attr:`~vm_core.block.node.Node.present` whether its own medium is there; an image has what it needs if
everything below it has.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import BlockError

if TYPE_CHECKING:
    from .node import Node


def below(node: Node) -> Iterator[Node]:
    """*node* and everything below it, backing images too."""
    pending = [node]
    while pending:
        one = pending.pop()
        yield one
        pending.extend(one.children().values())


def removable(node: Node) -> bool:
    """Whether there is a drive in *node* or below it whose medium comes and goes."""
    return any(one.removable for one in below(node))


def present(node: Node) -> bool:
    """Whether *node* and all below it have their media."""
    return all(one.present for one in below(node))


def need(node: Node) -> None:
    """Raise BlockError (ENOMEDIUM) where a medium is missing."""
    if not present(node):
        raise BlockError.of(errno.ENOMEDIUM)
