"""Guest RAM as rings see it: lookups that cost one comparison for nearly every descriptor.

Theory of operation. :class:`GuestRam` holds the address space as ranges of host memory. The largest range is kept at
hand in three attributes, :attr:`~GuestRam.window`, ``start`` and ``size``, which hot loops test themselves; everything
else goes through :meth:`GuestRam.views`. On a PC the largest range is all RAM from 1 MiB to the PCI hole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from ...machine.memory import DmaError, GuestMemory, RegionKind


class RamRange(NamedTuple):
    """``len(view)`` bytes of host memory that appear at guest-physical *start*."""

    start: int
    view: memoryview
    writable: bool = True


class GuestRam:
    """The ranges of guest memory that a device may reach."""

    def __init__(self, ranges: list[RamRange] | None = None) -> None:
        self._forget: Callable[[], None] = lambda: None
        self.set_ranges(ranges or [])

    def set_ranges(self, ranges: list[RamRange]) -> None:
        """Replace the map. Views given out before stay valid."""
        self._ranges = sorted(ranges, key=lambda r: r.start)
        self._starts = [r.start for r in self._ranges]
        largest = max((r for r in ranges if r.writable), key=lambda r: len(r.view), default=None)
        self.window = largest.view if largest is not None else memoryview(b"")
        self.start = largest.start if largest is not None else 0
        self.size = len(self.window)

    @classmethod
    def of(cls, memory: GuestMemory) -> GuestRam:
        """The RAM of *memory*, now and after each change of its map (made, as this is used, under the device lock)."""
        ram = cls()
        whole = memoryview(memory.buffer)

        def follow(memory: GuestMemory) -> None:
            ranges = []
            for flat in memory.flat:
                if flat.region.kind is not RegionKind.MMIO:
                    at = flat.region.backing + flat.offset
                    ranges.append(RamRange(flat.start, whole[at : at + flat.size], flat.region.kind is RegionKind.RAM))
            ram.set_ranges(ranges)

        memory.listeners.append(follow)
        ram._forget = lambda: memory.listeners.remove(follow)
        follow(memory)
        return ram

    def close(self) -> None:
        """Follow the machine's memory no longer. Views given out stay valid."""
        self._forget()
        self._forget = lambda: None

    def views(self, address: int, length: int, *, write: bool = True) -> list[memoryview]:
        """The bytes as views, one for each range they touch. Raises DmaError where there is none (to *write*)."""
        views = []
        while length:
            i = bisect_right(self._starts, address) - 1
            found = self._ranges[i] if i >= 0 else None
            skip = address - found.start if found is not None else 0
            if found is None or skip >= len(found.view):
                raise DmaError(f"address {address:#x} is not RAM")
            if write and not found.writable:
                raise DmaError(f"address {address:#x} cannot be written")
            n = min(length, len(found.view) - skip)
            views.append(found.view[skip : skip + n])
            address += n
            length -= n
        return views

    def view(self, address: int, length: int) -> memoryview:
        """Writable bytes as one view. Raises DmaError where they are not one run of RAM."""
        views = self.views(address, length)
        if len(views) != 1:
            raise DmaError(f"{length} bytes at {address:#x} do not lie in one piece of RAM")
        return views[0]

    def copy(self, address: int, length: int) -> bytes:
        """A snapshot of the bytes."""
        return b"".join(self.views(address, length, write=False))
