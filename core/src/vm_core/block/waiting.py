"""A request is about to wait for something that may take long, as test drivers and throttles let them.

Whoever carries requests out one after the other sets :data:`listener` and starts another one when it is called, on the
thread of the request that waits.
"""

from __future__ import annotations

from collections.abc import Callable

listener: Callable[[], None] | None = None


def announce() -> None:
    """The request of this thread will wait."""
    if listener is not None:
        listener()
