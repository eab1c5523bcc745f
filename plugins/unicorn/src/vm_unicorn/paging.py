"""Linear to physical addresses, by the guest's own page tables (Intel SDM vol. 3, 4.3 and 4.4).

Only what delivers exceptions and moves string I/O needs: the library has a TLB of its own for guest instructions.
"""

from __future__ import annotations

import struct

from vm_core.machine.memory import GuestMemory, RegionKind

CR0_PG = 1 << 31
CR4_PSE, CR4_PAE = 1 << 4, 1 << 5

_u32 = struct.Struct("<I")
_u64 = struct.Struct("<Q")


class NotMapped(Exception):  # noqa: N818 - a state of the guest, not a failure here
    """The guest's tables do not allow the access."""


class LinearMemory:
    """Guest memory by linear address, with supervisor rights. *memory* is told anew after each change of the map."""

    def __init__(self, memory: GuestMemory) -> None:
        self._view = memoryview(memory.buffer)
        self._ram: list[tuple[int, int, int]] = []
        self.cr0 = 0
        self.cr3 = 0
        self.cr4 = 0
        self.refresh(memory)

    def refresh(self, memory: GuestMemory) -> None:
        """Take in where RAM is now."""
        self._ram = [
            (r.start, r.start + r.size, r.region.backing + r.offset - r.start)
            for r in memory.flat
            if r.region.kind is not RegionKind.MMIO
        ]

    def place(self, physical: int) -> int:
        """Where a physical address is in the buffer."""
        for start, end, shift in self._ram:
            if start <= physical < end:
                return physical + shift
        raise NotMapped(f"physical address {physical:#x} is not memory")

    def physical(self, linear: int, *, write: bool = False) -> int:
        """The physical address of *linear*. Raises NotMapped."""
        linear &= 0xFFFFFFFF
        if not self.cr0 & CR0_PG:
            return linear
        if self.cr4 & CR4_PAE:
            return self._physical_pae(linear, write)
        at = self.place((self.cr3 & 0xFFFFF000) + (linear >> 20 & 0xFFC))
        entry = _u32.unpack_from(self._view, at)[0]
        if not entry & 1:
            raise NotMapped(f"linear address {linear:#x}")
        if entry & 0x80 and self.cr4 & CR4_PSE:
            self._mark(at, entry, write)
            return int((entry & 0xFFC00000) | (linear & 0x3FFFFF))
        at = self.place((entry & 0xFFFFF000) + (linear >> 10 & 0xFFC))
        entry = _u32.unpack_from(self._view, at)[0]
        if not entry & 1 or (write and not entry & 2):
            raise NotMapped(f"linear address {linear:#x}")
        self._mark(at, entry, write)
        return int((entry & 0xFFFFF000) | (linear & 0xFFF))

    def _physical_pae(self, linear: int, write: bool) -> int:
        entry = _u64.unpack_from(self._view, self.place((self.cr3 & 0xFFFFFFE0) + (linear >> 30) * 8))[0]
        if not entry & 1:
            raise NotMapped(f"linear address {linear:#x}")
        at = self.place((entry & 0xFFFFFF000) + (linear >> 21 & 0x1FF) * 8)
        entry = _u64.unpack_from(self._view, at)[0]
        if not entry & 1:
            raise NotMapped(f"linear address {linear:#x}")
        if entry & 0x80:
            self._mark(at, entry, write)
            return int((entry & 0xFFFE00000) | (linear & 0x1FFFFF))
        at = self.place((entry & 0xFFFFFF000) + (linear >> 12 & 0x1FF) * 8)
        entry = _u64.unpack_from(self._view, at)[0]
        if not entry & 1 or (write and not entry & 2):
            raise NotMapped(f"linear address {linear:#x}")
        self._mark(at, entry, write)
        return int((entry & 0xFFFFFF000) | (linear & 0xFFF))

    def _mark(self, at: int, entry: int, write: bool) -> None:
        """Set accessed (and dirty) bits, as the processor's own walk does."""
        wanted = 0x60 if write else 0x20
        if entry & wanted != wanted:
            self._view[at] = (entry | wanted) & 0xFF

    def read(self, linear: int, length: int) -> bytes:
        """Bytes at a linear address."""
        data = b""
        while length:
            n = min(length, 4096 - (linear & 0xFFF))
            at = self.place(self.physical(linear))
            data += bytes(self._view[at : at + n])
            linear += n
            length -= n
        return data

    def write(self, linear: int, data: bytes) -> None:
        """Store bytes at a linear address: all of them or, if a page is not there, none."""
        n = 4096 - (linear & 0xFFF)
        if len(data) <= n:
            at = self.place(self.physical(linear, write=True))
            self._view[at : at + len(data)] = data
            return
        places = [(linear, data[:n])] + [(linear + i, data[i : i + 4096]) for i in range(n, len(data), 4096)]
        for address, part in [(self.place(self.physical(a, write=True)), p) for a, p in places]:
            self._view[address : address + len(part)] = part
