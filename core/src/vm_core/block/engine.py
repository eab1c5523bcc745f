"""The contract of host-I/O engines: what carries a backend's requests out, off the thread that submits them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from .node import Node
from .request import Request


class EngineHost(Protocol):
    """What an engine sees of its backend."""

    @property
    def node(self) -> Node | None:
        """Where requests go. An engine with I/O of its own maps them itself and leaves the rest to :meth:`execute`."""

    def execute(self, request: Request) -> None:
        """Carry one request out, on this thread, and set its ``status``. Never raises."""

    def complete(self, requests: list[Request]) -> None:
        """Hand back requests whose ``status`` is set, in batches as large as come naturally."""


class Engine(ABC):
    """One engine of one backend. The constructor takes (host, options) and pops the options that it knows."""

    @abstractmethod
    def __init__(self, host: EngineHost, options: dict[str, Any]) -> None: ...

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Take a batch over, from any thread, without blocking on I/O. Each request is completed exactly once."""

    @abstractmethod
    def close(self) -> None:
        """End threads and give resources back. Nothing is in flight."""
