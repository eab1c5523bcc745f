"""The I/O APIC: 24 inputs, each with an entry that says which message it becomes.

Source: Intel 82093AA I/O Advanced Programmable Interrupt Controller (May 1996); sections are named beside the code.
"""

from __future__ import annotations

from typing import Final

from .apicbus import ApicBus, ApicMessage

#: Where the registers appear, and how much of the address space is theirs.
IOAPIC_BASE: Final = 0xFEC00000
IOAPIC_SIZE: Final = 0x1000

INPUTS: Final = 24

#: 3.2.2: the highest entry's number from bit 16, and the version.
_VERSION: Final = (INPUTS - 1) << 16 | 0x11

# Redirection entry (3.2.4).
_LOGICAL: Final = 1 << 11
_REMOTE_IRR: Final = 1 << 14
_LEVEL: Final = 1 << 15
_MASKED: Final = 1 << 16
#: Delivery status (bit 12) and remote IRR are the chip's. Messages here are never under way for long: bit 12 reads 0.
_WRITABLE: Final = 0xFF00_0000_0001_AFFF
_RESET_ENTRY: Final = _MASKED


class IoApic:
    """An I/O APIC on *bus*. Called with the device lock held."""

    def __init__(self, bus: ApicBus, id: int = 0) -> None:
        self._bus = bus
        self._initial_id = id
        self._entries: list[int] = []
        self._levels = [False] * INPUTS
        bus.on_end.append(self._ended)
        self.reset()

    def reset(self) -> None:
        """All inputs masked (3.2.4). Lines keep their levels, for they are the devices'."""
        self._id = self._initial_id
        self._select = 0
        self._entries = [_RESET_ENTRY] * INPUTS

    # Inputs.

    def set_input(self, number: int, level: bool) -> None:
        """Drive input *number* (0–23). *level* means asserted, whatever the polarity bit of its entry says."""
        if level == self._levels[number]:
            return
        self._levels[number] = level
        # An edge at a masked input is lost (3.2.4, bit 16); a level stays and is seen when it is unmasked.
        if level:
            self._service(number)

    def _service(self, number: int) -> None:
        entry = self._entries[number]
        if entry & _MASKED:
            return
        if entry & _LEVEL:
            if entry & _REMOTE_IRR or not self._levels[number]:
                return
            self._entries[number] |= _REMOTE_IRR
        taken = self._bus.deliver(
            ApicMessage(
                vector=entry & 0xFF,
                destination=entry >> 56,
                mode=entry >> 8 & 7,
                logical=bool(entry & _LOGICAL),
                level=bool(entry & _LEVEL),
            )
        )
        if entry & _LEVEL and not taken:
            # Remote IRR means that a local APIC has accepted it: its EOI, which nobody will send now, would clear it.
            self._entries[number] &= ~_REMOTE_IRR

    def _ended(self, vector: int) -> None:
        """A local APIC has ended *vector*: level inputs that are still asserted interrupt again (3.2.4, bit 14)."""
        for number, entry in enumerate(self._entries):
            if entry & _REMOTE_IRR and entry & 0xFF == vector:
                self._entries[number] &= ~_REMOTE_IRR
                self._service(number)

    # Registers: an index and a window (3.1).

    def read(self, offset: int, size: int) -> int:
        """IOREGSEL at 0, IOWIN at 0x10."""
        value = 0
        if offset & ~3 == 0:
            value = self._select
        elif offset & ~3 == 0x10:
            value = self._read_indexed(self._select)
        return value >> 8 * (offset & 3) & (1 << 8 * size) - 1

    def _read_indexed(self, index: int) -> int:
        if index in (0, 2):  # 3.2.1 ID, 3.2.3 arbitration ID
            return self._id << 24
        if index == 1:
            return _VERSION
        number, high = divmod(index - 0x10, 2)
        if 0 <= number < INPUTS:
            return self._entries[number] >> 32 * high & 0xFFFFFFFF
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """IOREGSEL takes a byte; IOWIN is accessed with 32 bits (3.1.2), other sizes have no effect."""
        if offset == 0:
            self._select = value & 0xFF
        elif offset == 0x10 and size == 4:
            self._write_indexed(self._select, value)

    def _write_indexed(self, index: int, value: int) -> None:
        if index == 0:
            self._id = value >> 24 & 0xF
            return
        number, high = divmod(index - 0x10, 2)
        if not 0 <= number < INPUTS:
            return
        old = self._entries[number]
        mask = _WRITABLE & (0xFFFFFFFF << 32 * high)
        entry = old & ~mask | value << 32 * high & mask
        if not entry & _LEVEL:
            entry &= ~_REMOTE_IRR
        self._entries[number] = entry
        if entry & _LEVEL:
            self._service(number)
