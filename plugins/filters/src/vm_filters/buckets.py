"""Leaky buckets: how long a request has to wait.

The algorithm, and what *average*, *burst* and *length* mean, is described in QEMU's *docs/throttle.txt* ("The Leaky
Bucket algorithm"): what has been done is water in a bucket from which *average* units leak a second; while it is too
full, requests wait. A limit without burst still lets a tenth of a second's worth through at once. A burst that lasts
longer than a second has a second bucket for its own rate, which leaks *burst* units a second.
"""

from __future__ import annotations

#: The part of a second whose units may come at once where nothing else is allowed.
SLACK = 10


class Bucket:
    """Units are operations or bytes; times are seconds."""

    __slots__ = ("_burst_level", "_level", "average", "burst", "length")

    def __init__(self, average: int = 0, burst: int = 0, length: int = 1) -> None:
        self.average = average
        self.burst = burst
        #: How long a burst may last.
        self.length = length
        self._level = 0.0
        self._burst_level = 0.0

    def leak(self, seconds: float) -> None:
        """*seconds* have passed."""
        self._level = max(0.0, self._level - self.average * seconds)
        if self.length > 1:
            self._burst_level = max(0.0, self._burst_level - self.burst * seconds)

    def delay(self) -> float:
        """Seconds that the next request has to wait."""
        if not self.average:
            return 0.0
        room = self.burst * self.length if self.burst else self.average / SLACK
        over = self._level - room
        if over > 0:
            return over / self.average
        if self.length > 1:
            over = self._burst_level - self.burst / SLACK
            if over > 0:
                return over / self.burst
        return 0.0

    def fill(self, units: float) -> None:
        """A request of so many units goes through."""
        self._level += units
        if self.length > 1:
            self._burst_level += units
