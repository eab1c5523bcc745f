"""What a machine tells about itself: events by name with a dict of data, as QMP has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Subscriber = Callable[[str, dict[str, Any]], object]


class EventHub:
    """Events and those who listen. Subscribers are called on the thread where the event happens and must not block."""

    def __init__(self) -> None:
        self._subscribers: tuple[Subscriber, ...] = ()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call *subscriber* with each event's name and data; the result ends that."""
        self._subscribers = (*self._subscribers, subscriber)

        def unsubscribe() -> None:
            # Bound methods are equal without being identical, so compare.
            self._subscribers = tuple(s for s in self._subscribers if s != subscriber)

        return unsubscribe

    def emit(self, name: str, data: dict[str, Any] | None = None, /, **more: Any) -> None:
        """Tell everybody; *more* is added to *data*."""
        told = {**(data or {}), **more}
        for subscriber in self._subscribers:
            subscriber(name, told)
