"""Guest memory: RAM, and the flat map of the guest-physical address space that accelerators are given.

Theory of operation. RAM is one anonymous shared mapping; devices and the host's system calls use it through
memoryviews, without copies. The address space is a list of :class:`Region`, later ones covering earlier ones where they
overlap; flattening it yields adjoining, non-overlapping :class:`FlatRange`, and every change of the list is told to
the listeners (the accelerator), which map the ranges into the CPU.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import pairwise
from typing import NamedTuple, Protocol

PAGE = 4096


class DmaError(Exception):
    """A device was told to touch guest-physical memory that is not RAM."""


class MmioHandler(Protocol):
    """Registers behind a memory or port range. *offset* counts from the region's start; *size* is 1, 2, 4 or 8."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


class RegionKind(Enum):
    """How the CPU sees a range."""

    #: Reads and writes go to :attr:`GuestMemory.buffer`.
    RAM = "ram"
    #: Reads and execution come from the buffer, writes are dropped.
    ROM = "rom"
    #: Every access is a call of the handler.
    MMIO = "mmio"


class Region:
    """A range of the guest-physical address space. *backing* is where its bytes are in the buffer (RAM and ROM)."""

    __slots__ = ("backing", "enabled", "handler", "kind", "name", "priority", "size", "start")

    def __init__(
        self,
        name: str,
        start: int,
        size: int,
        kind: RegionKind,
        *,
        backing: int = 0,
        handler: MmioHandler | None = None,
        priority: int = 0,
    ) -> None:
        self.name = name
        self.start = start
        self.size = size
        self.kind = kind
        self.backing = backing
        self.handler = handler
        self.priority = priority
        self.enabled = True

    def __repr__(self) -> str:
        return f"<Region {self.name} {self.start:#x}+{self.size:#x} {self.kind.value}>"


class FlatRange(NamedTuple):
    """A run of the flattened map: *size* bytes from guest-physical *start*, at *offset* of *region*."""

    start: int
    size: int
    region: Region
    offset: int


class GuestMemory:
    """RAM of *size* bytes plus *rom_size* bytes of backing for ROM images, and the address space they appear in."""

    def __init__(self, size: int, *, rom_size: int = 0) -> None:
        if size % PAGE or rom_size % PAGE:
            raise ValueError("sizes are multiples of 4096 bytes")
        self.size = size
        self.buffer = mmap.mmap(-1, size + rom_size)
        self._view = memoryview(self.buffer)
        self._next_rom = size
        self._regions: list[Region] = []
        self._flat: list[FlatRange] = []
        self._starts: list[int] = []
        self._depth = 0
        #: Called with this object after every change of the map.
        self.listeners: list[Callable[[GuestMemory], None]] = []

    # The map.

    def rom_space(self, size: int) -> int:
        """Set aside *size* bytes of ROM backing (a multiple of 4096) and return their place in the buffer."""
        place = self._next_rom
        if place + size > len(self.buffer):
            raise ValueError("no room left for ROM images")
        self._next_rom += size
        return place

    def add(self, region: Region) -> Region:
        """Put *region* into the address space; among equal priorities the later one covers the earlier."""
        self._regions.append(region)
        self.update()
        return region

    def remove(self, region: Region) -> None:
        """Take *region* out of the address space."""
        self._regions.remove(region)
        self.update()

    def update(self) -> None:
        """Flatten again after regions were moved, resized, enabled or disabled, and tell the listeners."""
        flat = _flatten(self._regions)
        if flat == self._flat:
            return
        self._flat = flat
        self._starts = [r.start for r in flat]
        for listener in self.listeners:
            listener(self)

    @property
    def flat(self) -> list[FlatRange]:
        """The flattened map, ordered by address."""
        return self._flat

    def find(self, address: int) -> FlatRange | None:
        """The range that holds *address*, None for a hole."""
        i = bisect_right(self._starts, address) - 1
        if i >= 0:
            found = self._flat[i]
            if address < found.start + found.size:
                return found
        return None

    # Access by devices (DMA). Addresses are guest-physical.

    def view(self, address: int, length: int) -> memoryview:
        """RAM bytes as one writable view. Raises DmaError unless all of it is one run of RAM."""
        found = self.find(address)
        if found is None or found.region.kind is not RegionKind.RAM:
            raise DmaError(f"address {address:#x} is not RAM")
        skip = address - found.start
        if skip + length > found.size:
            raise DmaError(f"{length} bytes at {address:#x} do not end in the same RAM")
        at = found.region.backing + found.offset + skip
        return self._view[at : at + length]

    def views(self, address: int, length: int) -> list[memoryview]:
        """RAM bytes as views, one for each run of RAM they touch."""
        found = self.find(address)
        if found is not None and found.region.kind is RegionKind.RAM and address + length <= found.start + found.size:
            at = found.region.backing + found.offset + address - found.start
            return [self._view[at : at + length]]
        views = []
        while length:
            found = self.find(address)
            if found is None:
                raise DmaError(f"address {address:#x} is not RAM")
            n = min(length, found.start + found.size - address)
            views.append(self.view(address, n))
            address += n
            length -= n
        return views

    def read(self, address: int, length: int) -> bytes:
        """Copy RAM bytes out."""
        return b"".join(bytes(v) for v in self.views(address, length))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into RAM (the caller tells the accelerator if they may be code)."""
        source = memoryview(data).cast("B")
        at = 0
        for v in self.views(address, len(source)):
            v[:] = source[at : at + len(v)]
            at += len(v)


def _flatten(regions: Iterable[Region]) -> list[FlatRange]:
    """Cut *regions* into the runs that are visible, adjoining runs of one region joined."""
    live = [(r.priority, i, r) for i, r in enumerate(regions) if r.enabled and r.size]
    cuts = sorted({p for _, _, r in live for p in (r.start, r.start + r.size)})
    flat: list[FlatRange] = []
    for low, high in pairwise(cuts):
        covering = [t for t in live if t[2].start <= low and high <= t[2].start + t[2].size]
        if not covering:
            continue
        region = max(covering, key=lambda t: t[:2])[2]
        last = flat[-1] if flat else None
        if last is not None and last.region is region and last.start + last.size == low:
            flat[-1] = last._replace(size=high - last.start)
        else:
            flat.append(FlatRange(low, high - low, region, low - region.start))
    return flat
