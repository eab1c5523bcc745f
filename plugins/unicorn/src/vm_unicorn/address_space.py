"""The machine's flat memory map, laid out in the engine's terms.

The engine maps whole pages: RAM and ROM by pointers into the guest's memory, everything else through callbacks. What
nothing claims is mapped too, up to 4 GiB, so that a read finds ones and a write is dropped, as on a bus with nobody at
the address. A page that is shared by several ranges (a small BAR, say) goes through callbacks that look each access up.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import unicorn

from vm_core.machine.memory import PAGE, GuestMemory, MmioHandler, RegionKind

from .engine import PROT_EXEC, PROT_READ, PROT_WRITE, Engine
from .fills import FastStores

#: Physical addresses that 32-bit paging without extensions reaches.
TOP = 1 << 32
#: RAM is always cut here: firmware changes the map below a hundred times, and never above.
ONE_MIB = 1 << 20
HOLE = 64 << 20


class Run(NamedTuple):
    """Pages that are mapped together. *place* is in the guest memory's buffer (RAM, ROM), *handler* for the rest."""

    start: int
    size: int
    kind: RegionKind
    place: int
    handler: MmioHandler | None
    #: What is added to the run's offset for the handler.
    offset: int


class Nobody:
    """A hole in the address space."""

    def read(self, offset: int, size: int) -> int:
        """The undriven bus reads as ones."""
        return (1 << (8 * size)) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Nobody takes it."""


class MixedPage:
    """A page of several ranges: each access is looked up, byte for byte where it crosses from one to another."""

    def __init__(self, memory: GuestMemory, start: int) -> None:
        self._memory = memory
        self._start = start

    def read(self, offset: int, size: int) -> int:
        """Read from whatever the access falls into."""
        address = self._start + offset
        found = self._memory.find(address)
        if size > 1 and (found is None or address + size > found.start + found.size):
            return sum(self.read(offset + i, 1) << (8 * i) for i in range(size))
        if found is None:
            return (1 << (8 * size)) - 1
        at = found.offset + address - found.start
        if found.region.kind is RegionKind.MMIO:
            assert found.region.handler is not None
            return found.region.handler.read(at, size)
        at += found.region.backing
        return int.from_bytes(self._memory.buffer[at : at + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write to whatever the access falls into."""
        address = self._start + offset
        found = self._memory.find(address)
        if size > 1 and (found is None or address + size > found.start + found.size):
            for i in range(size):
                self.write(offset + i, 1, (value >> (8 * i)) & 0xFF)
            return
        if found is None or found.region.kind is RegionKind.ROM:
            return
        at = found.offset + address - found.start
        if found.region.kind is RegionKind.MMIO:
            assert found.region.handler is not None
            found.region.handler.write(at, size, value)
            return
        at += found.region.backing
        self._memory.buffer[at : at + size] = value.to_bytes(size, "little")


_NOBODY = Nobody()


def plan(memory: GuestMemory) -> list[Run]:
    """The runs that the flat map comes to, ordered by address, without gaps below 4 GiB."""
    pages: list[Run] = []
    mixed: set[int] = set()
    for found in memory.flat:
        end = found.start + found.size
        low, high = -(-found.start // PAGE) * PAGE, end // PAGE * PAGE
        if found.start % PAGE:
            mixed.add(found.start // PAGE * PAGE)
        if end % PAGE:
            mixed.add(high)
        cuts = [low, high]
        if found.region.kind is RegionKind.RAM and low < ONE_MIB < high:
            cuts.insert(1, ONE_MIB)
        for a, b in itertools.pairwise(cuts):
            if a < b:
                at = found.offset + a - found.start
                if found.region.kind is RegionKind.MMIO:
                    pages.append(Run(a, b - a, found.region.kind, 0, found.region.handler, at))
                else:
                    pages.append(Run(a, b - a, found.region.kind, found.region.backing + at, None, 0))
    pages.extend(Run(page, PAGE, RegionKind.MMIO, 0, MixedPage(memory, page), 0) for page in mixed)
    pages.sort()
    runs: list[Run] = []
    at = 0
    for run in pages:
        runs.extend(_hole(at, min(run.start, TOP)))
        runs.append(run)
        at = run.start + run.size
    runs.extend(_hole(at, TOP))
    return runs


def _hole(start: int, end: int) -> Iterator[Run]:
    """Runs for what nobody claims, cut at multiples of HOLE: unmapping takes time for every page."""
    while start < end:
        high = min(end, start // HOLE * HOLE + HOLE)
        yield Run(start, high - start, RegionKind.MMIO, 0, _NOBODY, 0)
        start = high


def _identity(run: Run) -> tuple[object, ...]:
    """What makes two runs the same mapping; a mixed page looks things up and so stays right."""
    handler = type(run.handler) if isinstance(run.handler, MixedPage) else id(run.handler)
    return (run.start, run.size, run.kind, run.place, handler, run.offset)


class AddressSpace:
    """What is mapped in the engine, brought up to date with the machine's map by :meth:`apply`."""

    def __init__(
        self, engine: Engine, memory: GuestMemory, read: object, write: object, stores: FastStores | None
    ) -> None:
        """*read* and *write* are the ctypes callbacks for MMIO; their user word is the address of the run."""
        self._engine = engine
        self._stores = stores
        self._memory = memory
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory.buffer))
        self._read = ctypes.cast(read, ctypes.c_void_p)  # type: ignore[arg-type]
        self._write = ctypes.cast(write, ctypes.c_void_p)  # type: ignore[arg-type]
        self._runs: dict[tuple[object, ...], Run] = {}
        #: By the address of a run: the handler and what to add to the offset.
        self.handlers: dict[int, tuple[MmioHandler, int]] = {}

    def host_address(self, place: int) -> int:
        """The address in this process of a place in the guest memory's buffer."""
        return self._base + place

    def apply(self) -> None:
        """Map what is new and unmap what is gone. Not while the engine runs."""
        wanted = {_identity(run): run for run in plan(self._memory)}
        gone = [run for key, run in self._runs.items() if key not in wanted]
        new = [run for key, run in wanted.items() if key not in self._runs]
        for run in gone:
            self._unmap(run)
        for run in new:
            self._map(run)
        self._runs = wanted
        if any(run.kind is not RegionKind.MMIO for run in (*gone, *new)):
            self.drop_translations()

    def drop_translations(self) -> None:
        """Forget all translated code and all cached page-table entries."""
        if self._stores is not None:
            self._stores.forget()
            for run in self.roms():
                self._stores.keep_slow(run.start, run.size)
        for control in (unicorn.UC_CTL_TB_FLUSH, unicorn.UC_CTL_TLB_FLUSH):
            self._engine.uc.ctl(control, unicorn.UC_CTL_IO_WRITE)

    def roms(self) -> list[Run]:
        """The read-only runs."""
        return [run for run in self._runs.values() if run.kind is RegionKind.ROM]

    def make_writable_copies(self, roms: list[Run]) -> list[object]:
        """Replace *roms* by copies that may be written; returns what must be kept until :meth:`restore`."""
        keep: list[object] = []
        for run in roms:
            copy = ctypes.create_string_buffer(run.size + PAGE)
            at = -(-ctypes.addressof(copy) // PAGE) * PAGE
            ctypes.memmove(at, self.host_address(run.place), run.size)
            keep.append(copy)
            self._unmap(run)
            self._map_pointer(run, PROT_READ | PROT_WRITE | PROT_EXEC, at)
        self.drop_translations()
        return keep

    def restore(self, roms: list[Run]) -> None:
        """Put the ROMs back in place of their copies."""
        for run in roms:
            self._unmap(run)
            self._map(run)
        self.drop_translations()

    def _map_pointer(self, run: Run, protection: int, address: int) -> None:
        engine = self._engine
        engine.check(
            engine.lib.uc_mem_map_ptr(engine.handle, run.start, run.size, protection, address),
            f"map {run.size:#x} bytes at {run.start:#x}",
        )

    def _map(self, run: Run) -> None:
        engine = self._engine
        if run.kind is RegionKind.MMIO:
            assert run.handler is not None
            self.handlers[run.start] = (run.handler, run.offset)
            engine.check(
                engine.lib.uc_mmio_map(
                    engine.handle, run.start, run.size, self._read, run.start, self._write, run.start
                ),
                f"map {run.size:#x} bytes at {run.start:#x}",
            )
        elif run.kind is RegionKind.ROM:
            self._map_pointer(run, PROT_READ | PROT_EXEC, self.host_address(run.place))
        else:
            self._map_pointer(run, PROT_READ | PROT_WRITE | PROT_EXEC, self.host_address(run.place))

    def _unmap(self, run: Run) -> None:
        engine = self._engine
        engine.check(
            engine.lib.uc_mem_unmap(engine.handle, run.start, run.size),
            f"unmap {run.size:#x} bytes at {run.start:#x}",
        )
        self.handlers.pop(run.start, None)
