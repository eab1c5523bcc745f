"""Translation of guest-linear addresses by walking the page tables (Intel SDM vol. 3, 4.3 and 4.4)."""

from __future__ import annotations

from typing import NamedTuple

from vm_core.machine.memory import DmaError, GuestMemory

CR0_PE, CR0_PG = 1, 1 << 31
CR4_PSE, CR4_PAE = 1 << 4, 1 << 5

# Entry bits.
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 0x20, 0x40, 0x80


class Translation(NamedTuple):
    """Where a linear address is. *writable* and *user* combine the entries of all levels."""

    physical: int
    writable: bool
    user: bool


class PageWalker:
    """Walks the tables that the control registers name."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def _entry(self, address: int, size: int, mark: int) -> int | None:
        """Read a table entry, setting the bits *mark* if it is present; None if it is not there or not present."""
        try:
            view = self._memory.view(address, size)
        except DmaError:
            return None
        entry = int.from_bytes(view, "little")
        if not entry & PRESENT:
            return None
        if mark & ~entry:
            entry |= mark
            view[:] = entry.to_bytes(size, "little")
        return entry

    def walk(
        self, linear: int, cr0: int, cr3: int, cr4: int, *, access: bool = False, write: bool = False
    ) -> Translation | None:
        """Translate *linear*; None if no page is present. *access* and *write* set the tables' A and D bits."""
        if not cr0 & CR0_PG:
            return Translation(linear & 0xFFFFFFFF, True, True)
        used = ACCESSED if access or write else 0
        dirty = used | (DIRTY if write else 0)
        if cr4 & CR4_PAE:
            return self._walk_pae(linear, cr3, used, dirty)
        directory = (cr3 & 0xFFFFF000) + (linear >> 22) * 4
        pde = self._entry(directory, 4, 0)
        if pde is None:
            return None
        if pde & LARGE and cr4 & CR4_PSE:
            self._entry(directory, 4, dirty)
            # PSE-36: bits 20–13 are bits 39–32 of the address.
            base = (pde & 0xFFC00000) | ((pde & 0x1FE000) << 19)
            return Translation(base | (linear & 0x3FFFFF), bool(pde & WRITABLE), bool(pde & USER))
        self._entry(directory, 4, used)
        pte = self._entry((pde & 0xFFFFF000) + ((linear >> 12) & 0x3FF) * 4, 4, dirty)
        if pte is None:
            return None
        both = pde & pte
        return Translation((pte & 0xFFFFF000) | (linear & 0xFFF), bool(both & WRITABLE), bool(both & USER))

    def _walk_pae(self, linear: int, cr3: int, used: int, dirty: int) -> Translation | None:
        top = self._entry((cr3 & 0xFFFFFFE0) + (linear >> 30) * 8, 8, 0)
        if top is None:
            return None
        mask = 0x000FFFFFFFFFF000
        directory = (top & mask) + ((linear >> 21) & 0x1FF) * 8
        pde = self._entry(directory, 8, 0)
        if pde is None:
            return None
        if pde & LARGE:
            self._entry(directory, 8, dirty)
            base = pde & mask & ~0x1FFFFF
            return Translation(base | (linear & 0x1FFFFF), bool(pde & WRITABLE), bool(pde & USER))
        self._entry(directory, 8, used)
        pte = self._entry((pde & mask) + ((linear >> 12) & 0x1FF) * 8, 8, dirty)
        if pte is None:
            return None
        both = pde & pte
        return Translation((pte & mask) | (linear & 0xFFF), bool(both & WRITABLE), bool(both & USER))
