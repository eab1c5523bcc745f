"""Nodes by name: what ``node-name=``, ``-blockdev`` and references between nodes stand on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from threading import Lock
from weakref import WeakValueDictionary

from ..errors import UsageError
from .node import Node

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,30}")


class Graph:
    """A name space of nodes. It does not own them: a closed and forgotten node disappears from it."""

    def __init__(self) -> None:
        self._nodes: WeakValueDictionary[str, Node] = WeakValueDictionary()
        self._numbers = count(1)
        self._lock = Lock()

    def add(self, node: Node, name: str = "") -> None:
        """Give *node* its name: *name*, or ``#block`` and a number. Raises UsageError for a bad or taken one."""
        with self._lock:
            if name:
                self.check(name)
            else:
                name = f"#block{next(self._numbers):03d}"
            node.node_name = name
            self._nodes[name] = node

    def check(self, name: str) -> None:
        """Raise UsageError where *name* cannot be given to a new node."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"node-name={name}: a letter, then letters, digits, '-', '.', '_', 31 at most").put(
                f"Invalid node-name: '{name}'"
            )
        if name in self._nodes:
            raise UsageError(f"node-name={name}: there is a node of this name already")

    def get(self, name: str) -> Node | None:
        """The node called *name*."""
        return self._nodes.get(name)

    def find(self, name: str) -> Node:
        """The node called *name*. Raises UsageError that explains references."""
        node = self._nodes.get(name)
        if node is None:
            raise UsageError(f"there is no node {name!r}; a file is written as file.filename={name}").put(
                f"Cannot find device='{name}' nor node-name='{name}'"
            )
        return node

    def remove(self, node: Node) -> None:
        """Forget *node*."""
        with self._lock:
            if self._nodes.get(node.node_name) is node:
                del self._nodes[node.node_name]

    def __iter__(self) -> Iterator[Node]:
        return iter(list(self._nodes.values()))


#: The name space of programs that need only one.
DEFAULT = Graph()
