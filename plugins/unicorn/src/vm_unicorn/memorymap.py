"""The guest's address space in the engine: RAM and ROM by pointer, everything else by callback.

All addresses below 4 GiB that are neither RAM nor ROM are one kind of callback region, which asks the machine's map who
is there at each access; so regions of device registers come, move and go without the engine being told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unicorn import Uc, x86_const
from unicorn import unicorn_const as uc_const

from vm_core.machine.memory import PAGE, GuestMemory, RegionKind

from .state import CR0_WP

_END = 1 << 32
_CODE = uc_const.UC_PROT_READ | uc_const.UC_PROT_EXEC

#: (start, size, place in the buffer or -1 for callbacks, writable)
_Piece = tuple[int, int, int, bool]


class MemoryMap:
    """Keeps the engine's map like the machine's."""

    def __init__(
        self,
        uc: Uc,
        memory: GuestMemory,
        buffer: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        self._uc = uc
        self._view = memoryview(memory.buffer)
        self._buffer = buffer
        self._read = read
        self._write = write
        self._pieces: set[_Piece] = set()
        self._overwritten: list[tuple[int, bytes, int]] = []

    def follow(self, memory: GuestMemory) -> None:
        """Make the engine's map that of *memory*. Not while guest code runs."""
        wanted = set(_pieces(memory))
        if wanted == self._pieces:
            return
        for start, size, _, _ in self._pieces - wanted:
            self._uc.mem_unmap(start, size)
        for start, size, place, writable in wanted - self._pieces:
            if place < 0:
                self._map_callbacks(start, size)
            else:
                rights = uc_const.UC_PROT_ALL if writable else _CODE
                self._uc.mem_map_ptr(start, size, rights, self._buffer + place)
        self._pieces = wanted
        # Translations are kept by a page's place among all mapped pieces, which the next piece may inherit; and the TLB
        # is only flushed by a change of a paging bit.
        self._uc.ctl_flush_tb()
        cr0 = self._uc.reg_read(x86_const.UC_X86_REG_CR0)
        self._uc.reg_write(x86_const.UC_X86_REG_CR0, cr0 ^ CR0_WP)
        self._uc.reg_write(x86_const.UC_X86_REG_CR0, cr0)

    def _map_callbacks(self, start: int, size: int) -> None:
        def read(uc: Any, offset: int, width: int, data: Any) -> int:
            return self._read(start + offset, width)

        def write(uc: Any, offset: int, width: int, value: int, data: Any) -> None:
            self._write(start + offset, width, value)

        self._uc.mmio_map(start, size, read, None, write, None)

    def open_rom(self, address: int, size: int) -> None:
        """Let a write of *size* bytes at *address* happen in ROM, and remember what was there."""
        for start, length, place, writable in self._pieces:
            if start <= address < start + length and place >= 0 and not writable:
                at = place + address - start
                self._overwritten.append((at, bytes(self._view[at : at + size]), address))
                page = address & -PAGE
                self._uc.mem_protect(
                    page, PAGE if (address + size - 1) & -PAGE == page else 2 * PAGE, uc_const.UC_PROT_ALL
                )
                return

    def close_rom(self) -> None:
        """Put back what was written over, and protect it again."""
        for at, old, address in reversed(self._overwritten):
            self._view[at : at + len(old)] = old
            self._uc.mem_protect(
                address & -PAGE, PAGE if (address + len(old) - 1) & -PAGE == address & -PAGE else 2 * PAGE, _CODE
            )
        self._overwritten.clear()


def _pieces(memory: GuestMemory) -> list[_Piece]:
    """What the engine shall map: whole pages, gaps filled with callbacks."""
    pieces: list[_Piece] = []
    at = 0
    for found in memory.flat:
        if found.region.kind is RegionKind.MMIO or found.start >= _END:
            continue
        start, size = found.start, min(found.size, _END - found.start)
        if start % PAGE or size % PAGE:
            raise ValueError(f"{found.region.name}: RAM and ROM are mapped in pages of 4096 bytes")
        if start > at:
            pieces.append((at, start - at, -1, True))
        pieces.append((start, size, found.region.backing + found.offset, found.region.kind is RegionKind.RAM))
        at = start + size
    if at < _END:
        pieces.append((at, _END - at, -1, True))
    return pieces
