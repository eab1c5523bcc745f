"""The contract of host-I/O engines: what carries a backend's requests out, off the thread that submits them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from .node import Node
from .passage import Passage
from .request import Request


class EngineHost(Protocol):
    """What an engine sees of its backend."""

    @property
    def node(self) -> Node | None:
        """Where requests go."""

    def passage(self, request: Request) -> Passage | None:
        """For an engine with I/O of its own: where on the host it moves the bytes of a READ or WRITE, if it can.

        None: leave the request to :meth:`execute`. Neither blocks nor raises.
        """

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

    def attend(self) -> bool:
        """For programs that have nothing else to do: the thread that calls this hands requests back itself, by polling.

        From now on it alone submits, and it calls :meth:`poll` as long as anything is in flight; no other thread of the
        engine completes requests. Call it before anything is submitted. False: the engine does not do that, and
        completes requests on its own threads as ever.

        The thread may call nodes directly meanwhile, also what has to wait for its requests. It must not wait for
        another thread that does.
        """
        return False

    def poll(self) -> None:
        """Wait until a request is complete, and hand back all that are. Only with something in flight, see above."""
        raise NotImplementedError

    @abstractmethod
    def close(self) -> None:
        """End threads and give resources back. Nothing is in flight."""
