"""Threads that finish requests by themselves (:meth:`.Engine.attend`): while one waits for a lock, it lets them.

Such a thread's requests hold locks until it fetches their results. Where it calls a node directly – to discard, resize,
take a snapshot – and has to wait for one of those locks, nobody else would ever fetch them.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import local


class _Thread(local):
    """What the calling thread attends to."""

    def __init__(self) -> None:
        #: One an engine: waits until one of the engine's transfers has finished and gives its locks back, without
        #: calling anybody. False, at once, where nothing is on its way.
        self.settlers: list[Callable[[], bool]] = []


current = _Thread()


def settle() -> bool:
    """Let one engine of this thread finish something. False: none has anything on its way."""
    return any(settler() for settler in current.settlers)
