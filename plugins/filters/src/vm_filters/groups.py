"""Throttle groups: objects with limits that any number of ``throttle`` filters share.

``--object throttle-group,id=NAME,x-iops-total=N,…`` makes one; the limits are those of the QAPI type *ThrottleLimits*.
"""

from __future__ import annotations

import weakref
from threading import Condition
from time import monotonic
from typing import Any

from vm_core.block import waiting
from vm_core.errors import ImageError, UsageError

from .buckets import Bucket

#: The largest rate.
MOST = 1_000_000_000_000_000
READ, WRITE = "read", "write"

_RATES = tuple(f"{unit}-{what}" for unit in ("iops", "bps") for what in ("total", READ, WRITE))
_LIMITS = (*(f"{rate}{more}" for rate in _RATES for more in ("", "-max", "-max-length")), "iops-size")

_groups: dict[str, Group] = {}


class Group:
    """Limits, and the requests that wait because of them.

    Of the filters that share a group each gets its turn; the requests of one go in order.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        """Raises UsageError for limits that contradict each other."""
        _check(limits)
        self._buckets = {
            rate: Bucket(limits.get(rate, 0), limits.get(f"{rate}-max", 0), limits.get(f"{rate}-max-length", 1))
            for rate in _RATES
        }
        self._unit = limits.get("iops-size", 0)
        self._changed = Condition()
        self._time = monotonic()
        #: Of each direction: (member, ticket) of requests that wait, in order, and the member that went last.
        self._waiting: dict[str, list[tuple[int, int]]] = {READ: [], WRITE: []}
        self._last: dict[str, int] = {READ: 0, WRITE: 0}
        self._tickets = 0

    def pass_through(self, member: int, direction: str, length: int) -> None:
        """Return when a request of *member* may go."""
        buckets = [self._buckets[f"{unit}-{what}"] for unit in ("bps", "iops") for what in ("total", direction)]
        with self._changed:
            self._tickets += 1
            mine = member, self._tickets
            queue = self._waiting[direction]
            queue.append(mine)
            announced = False
            try:
                while True:
                    delay = None
                    if self._next(direction) == mine:
                        self._leak()
                        delay = max(bucket.delay() for bucket in buckets)
                        if delay <= 0:
                            break
                    if not announced:
                        announced = True
                        waiting.announce()
                    self._changed.wait(delay)
            finally:
                queue.remove(mine)
                self._changed.notify_all()
            self._last[direction] = member
            operations = max(1.0, length / self._unit) if self._unit else 1.0
            for what in ("total", direction):
                self._buckets[f"bps-{what}"].fill(length)
                self._buckets[f"iops-{what}"].fill(operations)

    def _next(self, direction: str) -> tuple[int, int]:
        """The request that goes next: the first one of the member after the one that went last."""
        queue = self._waiting[direction]
        members = sorted({member for member, _ in queue})
        last = self._last[direction]
        turn = next((member for member in members if member > last), members[0])
        return next(entry for entry in queue if entry[0] == turn)

    def _leak(self) -> None:
        now = monotonic()
        passed, self._time = now - self._time, now
        for bucket in self._buckets.values():
            bucket.leak(passed)


def _check(limits: dict[str, int]) -> None:
    for unit in ("iops", "bps"):
        for more in ("", "-max"):
            total = limits.get(f"{unit}-total{more}", 0)
            if total and (limits.get(f"{unit}-{READ}{more}", 0) or limits.get(f"{unit}-{WRITE}{more}", 0)):
                raise UsageError("bps/iops/max total values and read/write values cannot be used at the same time")
    if limits.get("iops-size") and not any(limits.get(rate) for rate in _RATES if rate.startswith("iops")):
        raise UsageError("iops size requires an iops value to be set")
    for rate in _RATES:
        average, burst = limits.get(rate, 0), limits.get(f"{rate}-max", 0)
        length = limits.get(f"{rate}-max-length", 1)
        if average > MOST or burst > MOST:
            raise UsageError(f"bps/iops/max values must be within [0, {MOST}]")
        if not length:
            raise UsageError("the burst length cannot be 0")
        if length > 1 and not burst:
            raise UsageError("burst length set without burst rate")
        if burst and length > MOST // burst:
            raise UsageError("burst length too high for this burst rate")
        if burst and not average:
            raise UsageError("bps_max/iops_max require corresponding bps/iops values")
        if burst and burst < average:
            raise UsageError("bps_max/iops_max cannot be lower than bps/iops")


def add(properties: dict[str, Any]) -> None:
    """Make the group that *properties* describe, ``id`` among them. Raises UsageError."""
    given = dict(properties)
    name = given.pop("id")
    limits: dict[str, int] = {}
    nested = given.pop("limits", None)
    if nested is not None and not isinstance(nested, dict):
        raise UsageError("Invalid parameter type for 'limits', expected: object")
    for key, value in (nested or {}).items():
        _take(limits, key, f"limits.{key}", value)
    for key, value in given.items():
        if key.startswith("limits."):
            _take(limits, key.removeprefix("limits."), key, value)
        elif key.startswith("x-"):
            _take(limits, key.removeprefix("x-"), key, value)
        else:
            raise UsageError(f"Parameter '{key}' is unexpected")
    if name in _groups:
        raise UsageError(f"attempt to add duplicate property '{name}' to object (type 'container')")
    _groups[name] = Group(limits)


def _take(limits: dict[str, int], name: str, shown: str, value: Any) -> None:
    if name not in _LIMITS:
        raise UsageError(f"Parameter '{shown}' is unexpected")
    try:
        number = value if type(value) is int else int(str(value), 0)
    except ValueError:
        raise UsageError(f"Parameter '{shown}' expects integer") from None
    if number < 0:
        raise UsageError("Property values cannot be negative")
    limits[name] = number


def find(name: str) -> Group:
    """The group called *name*. Raises ImageError."""
    group = _groups.get(name)
    if group is None:
        raise ImageError("", f"Throttle group '{name}' does not exist")
    return group


def forget() -> None:
    """Forget all groups, for tests."""
    _groups.clear()


_members = 0
_known: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def member(node: object) -> int:
    """The number of *node* among the members of groups."""
    global _members
    number = _known.get(node)
    if number is None:
        _members += 1
        number = _known[node] = _members
    return number
