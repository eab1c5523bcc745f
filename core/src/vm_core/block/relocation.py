"""The contract for moving what lies at the end of an image's file into free places before it (``compact``).

Theory of operation. A file gets shorter only where its end is free. Which bytes of the file something is, and what has
to be changed when it lies elsewhere, only the format knows; that bytes are copied, how many at a time and when to stop,
is the core's business (``jobs/compact.py``). So a driver's :class:`Relocation` says in portions what to copy where
(:meth:`Relocation.prepare`); the core copies it; then the driver makes the copies stable and lets the image use them
(:meth:`Relocation.complete`). Nothing else uses the image meanwhile.

What a driver promises: the place that it names as a target is free on the disk, too, before it is named; what points at
the source is changed only when the copy is stable, and the source is free only when nothing on the disk points at it
any more. So the worst that a power cut at any write leaves is space which nobody uses. Between two portions the image
is sound, and its file is cut off where that is possible.

:class:`Units` is that for the formats whose data lies in units of one size, each with one entry of a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .node import Node


class Move(NamedTuple):
    """*length* bytes of *storage* that are to be copied from *source* to *target*; the two do not overlap."""

    storage: Node
    source: int
    target: int
    length: int


class Relocation(ABC):
    """The moving of one image's units. Every call is made while nobody else uses the image."""

    @abstractmethod
    def plan(self) -> tuple[int, int]:
        """About how many bytes there are to move as things are now, and how much shorter the files get."""

    def unwanted(self, offset: int, length: int) -> bool:
        """These whole units of guest data (or what reaches the image's end) are zeroes: let them not take space.

        Only noted here. Returns False where the driver's ``discard`` and ``zero`` do that. Called from several threads.
        """
        return False

    @abstractmethod
    def prepare(self, limit: int) -> Sequence[Move]:
        """What to copy next, about *limit* bytes at most; empty when nothing is left to do."""

    @abstractmethod
    def complete(self) -> None:
        """The moves of the last :meth:`prepare` have been written (not flushed): make the image use them."""

    @abstractmethod
    def abandon(self) -> None:
        """They could not be written: their targets are free again. Nothing else will be called."""


#: Owners of places: nobody, and somebody who stays there.
FREE = 0xFFFF_FFFF
FIXED = 0xFFFF_FFFE


class Units(Relocation):
    """Units of *unit* bytes in places *unit* apart, each with one owner, a number.

    A portion at a time, the highest units go to the lowest free places. Units known to be zeroes lose their place just
    before it is taken, or cut off: so at the end of each portion no place below the end of the file is free that was
    not at its beginning.
    """

    def __init__(self, storage: Node, origin: int, unit: int, places: array[int], owners: int) -> None:
        """*places* (type ``I``) has the owner of each place, the first of which lies at *origin*.

        Owners are numbers below *owners*.
        """
        self.storage = storage
        self.origin = origin
        self.unit = unit
        self.places = places
        #: Which owners' units are zeroes.
        self._zeroes = bytearray(owners)
        self._low, self._high = 0, len(places)
        self._moves: list[tuple[int, int]] = []

    # What a format does

    @abstractmethod
    def owners(self, offset: int, length: int) -> range:
        """The owners of the units that are the guest bytes of the range."""

    @abstractmethod
    def leave(self, owners: Sequence[int]) -> None:
        """Let these owners have no place, and read as zeroes; stable on return."""

    @abstractmethod
    def enter(self, moves: Sequence[tuple[int, int]]) -> None:
        """Make what was written stable, then let each owner's place be another: (owner, place); stable on return."""

    @abstractmethod
    def cut(self, count: int) -> None:
        """Nothing lies in place number *count* or behind it: end the file there; *places* tells what is free before."""

    # The same for all

    def plan(self) -> tuple[int, int]:
        places = self.places
        after = len(places) - sum(self._empty(place) for place in range(len(places)))
        moved = sum(not self._empty(place) and places[place] != FIXED for place in range(after, len(places)))
        return moved * self.unit, max(0, self.storage.size - self.origin - after * self.unit)

    def unwanted(self, offset: int, length: int) -> bool:
        found = self.owners(offset, length)
        self._zeroes[found.start : found.stop] = b"\1" * len(found)
        return True

    def _empty(self, place: int) -> bool:
        owner = self.places[place]
        return owner == FREE or (owner != FIXED and bool(self._zeroes[owner]))

    def prepare(self, limit: int) -> Sequence[Move]:
        places, count = self.places, max(1, limit // self.unit)
        targets: list[int] = []
        sources: list[int] = []
        while len(sources) < count:
            while self._low < self._high and not self._empty(self._low):
                self._low += 1
            while self._high > self._low and (self._empty(self._high - 1) or places[self._high - 1] == FIXED):
                self._high -= 1
            if self._low >= self._high - 1:
                break
            self._high -= 1
            targets.append(self._low)
            sources.append(self._high)
            self._low += 1
        if not sources:
            self._trim()
            return ()
        self._drop([target for target in targets if places[target] != FREE])
        sources.reverse()
        self._moves = list(zip(sources, targets, strict=True))
        found: list[Move] = []
        for source, target in self._moves:
            start, stop = self.origin + source * self.unit, self.origin + target * self.unit
            last = found[-1] if found else None
            if last is not None and last.source + last.length == start and last.target + last.length == stop:
                found[-1] = last._replace(length=last.length + self.unit)
            else:
                found.append(Move(self.storage, start, stop, self.unit))
        return found

    def complete(self) -> None:
        places = self.places
        self.enter([(places[source], target) for source, target in self._moves])
        for source, target in self._moves:
            places[target], places[source] = places[source], FREE
        self._moves = []
        self._trim()

    def abandon(self) -> None:
        self._moves = []

    def _drop(self, dropped: list[int]) -> None:
        """Take the units in these places away."""
        if dropped:
            self.leave([self.places[place] for place in dropped])
            for place in dropped:
                self._zeroes[self.places[place]] = 0
                self.places[place] = FREE

    def _trim(self) -> None:
        """Cut off what is free at the end."""
        end = len(self.places)
        dropped = []
        while end and self._empty(end - 1):
            end -= 1
            if self.places[end] != FREE:
                dropped.append(end)
        if end < len(self.places):
            self._drop(dropped)
            del self.places[end:]
            self._high = min(self._high, end)
            self.cut(end)


def arrange(
    origin: int, unit: int, runs: Sequence[tuple[int, int, int]], fixed: Sequence[tuple[int, int]] = ()
) -> array[int]:
    """The places *unit* apart from *origin* on, for :class:`Units`.

    *runs* are (where, how many, owner) of units one behind the other with ascending owners; *fixed* are ranges (start,
    end) of something else. Units that are no whole number of places away from *origin* stay where they are.
    """
    ends = [where + count * unit for where, count, _ in runs]
    # What is fixed behind the last unit keeps the file from ending before.
    last = max([*ends, *(end for _, end in fixed)], default=origin)
    places = array("I", (FREE,)) * max(0, -(-(last - origin) // unit))
    stay = list(fixed)
    for where, count, owner in runs:
        if where < origin or (where - origin) % unit:
            stay.append((where, where + count * unit))
            continue
        first = (where - origin) // unit
        places[first : first + count] = array("I", range(owner, owner + count))
    for start, end in stay:
        first, stop = max(0, (start - origin) // unit), max(0, -(-(end - origin) // unit))
        places[first:stop] = array("I", (FIXED,)) * (stop - first)
    return places
