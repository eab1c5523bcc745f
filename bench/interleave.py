"""Run contestants in turns, so that whatever else the machine does hits all of them alike, and compare medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import attrs


@attrs.frozen
class Result:
    """Median seconds of one contestant, all of its runs beside it."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that ratios are made of."""
        return statistics.median(self.seconds)


def interleave(contestants: dict[str, Callable[[], float]], rounds: int) -> list[Result]:
    """Call each contestant once a round; each returns the seconds it took."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        turns = list(contestants.items())
        # What a run leaves behind it in the system's memory meets another one each time.
        for name, work in turns[::-1] if number % 2 else turns:
            seconds[name].append(work())
    return [Result(name, tuple(values)) for name, values in seconds.items()]
