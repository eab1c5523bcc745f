"""Stopping requests at events: what a test driver such as blkdebug offers to programs such as ``vm-io``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from .node import Node


class Breakpoints(Protocol):
    """The breakpoints of one node, each with a tag."""

    def set(self, event: str, tag: str) -> None:
        """Stop the next request that comes to *event* and call it *tag*. Raises UsageError for an unknown event."""

    def remove(self, tag: str) -> bool:
        """Forget the breakpoint and let what it stopped go on. False where there is none that waits."""

    def resume(self, tag: str) -> bool:
        """Let the request that was stopped as *tag* go on. False where there is none."""

    def suspended(self, tag: str) -> bool:
        """Whether a request is stopped as *tag*."""


def say(text: str) -> None:
    """Tell on standard output that a request has been stopped or goes on, as the peer's drivers do."""
    sys.stdout.write(text)


def find(node: Node) -> Breakpoints | None:
    """The breakpoints of *node* or of the nearest node below it that has some."""
    current: Node | None = node
    while current is not None:
        if current.breakpoints is not None:
            return current.breakpoints
        children = current.children()
        current = children.get("file") or children.get("image")
    return None
