"""The MP configuration table: what firmware tells an operating system of processors, APICs and interrupt wiring.

For a kernel that is booted without firmware; SeaBIOS makes one of its own. Source: Intel MultiProcessor Specification
1.4, chapter 4; sections are named beside the code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

#: The floating pointer goes where systems look for it (4): the last KiB of 640 KiB base memory.
MP_ADDRESS: Final = 0x9FC00
#: Room for the pointer and the table.
MP_SPACE: Final = 1024

_LOCAL_APIC: Final = 0xFEE00000
_IO_APIC: Final = 0xFEC00000
_IO_APIC_ID: Final = 0

#: 4.1: "_MP_", address, length in paragraphs, revision 1.4, checksum, feature bytes (a table is present; virtual wire).
_POINTER: Final = struct.Struct("<4sIBBB5s")
#: 4.2: "PCMP", length, revision, checksum, OEM, product, OEM table (none), entries, local APIC, extensions (none).
_HEADER: Final = struct.Struct("<4sHBB8s12sIHHIHBB")
#: 4.3.1: type 0, APIC ID and version, flags (enabled, bootstrap), CPU signature, feature flags, reserved.
_PROCESSOR: Final = struct.Struct("<BBBBII8s")
#: 4.3.2: type 1, bus ID, name.
_BUS: Final = struct.Struct("<BB6s")
#: 4.3.3: type 2, ID, version, flags (enabled), address.
_IO_APIC_ENTRY: Final = struct.Struct("<BBBBI")
#: 4.3.4 and 4.3.5: type 3 or 4, interrupt type, flags, source bus and interrupt, destination APIC and input.
_INTERRUPT: Final = struct.Struct("<BBHBBBB")

_IO_INTERRUPT: Final = 3
_LOCAL_INTERRUPT: Final = 4
_INT: Final = 0
_NMI: Final = 1
_EXTINT: Final = 3
_ALL_APICS: Final = 0xFF

_PCI_BUS: Final = 0
_ISA_BUS: Final = 1
#: 4.3.4, flags: polarity (bits 0–1) and trigger mode (bits 2–3). 0: as the bus has it.
_AS_THE_BUS: Final = 0
_ACTIVE_HIGH_LEVEL: Final = 1 | 3 << 2

#: Processor signature and features (FPU, APIC) where the real ones are not known: systems ask CPUID.
_SIGNATURE: Final = 0x600
_FEATURES: Final = 0x201


@attrs.frozen
class PciInterrupt:
    """Pin *pin* (0: INTA# … 3: INTD#) of *slot* on PCI bus 0 arrives at ISA line *irq*, and that I/O APIC input."""

    slot: int
    pin: int
    irq: int


def mp_table(processors: int, pci: Sequence[PciInterrupt], *, address: int = MP_ADDRESS) -> bytes:
    """Floating pointer and table for *processors* with APIC IDs from 0, to be put at *address*.

    Every ISA line is the I/O APIC input of its number, but for the timer, which is input 2. Lines that PCI uses are
    level-triggered.
    """
    shared = {interrupt.irq for interrupt in pci}
    entries = [
        *(
            _PROCESSOR.pack(0, number, 0x14, 1 | (number == 0) << 1, _SIGNATURE, _FEATURES, b"")
            for number in range(processors)
        ),
        _BUS.pack(1, _PCI_BUS, b"PCI   "),
        _BUS.pack(1, _ISA_BUS, b"ISA   "),
        _IO_APIC_ENTRY.pack(2, _IO_APIC_ID, 0x11, 1, _IO_APIC),
        *(
            _INTERRUPT.pack(
                *(_IO_INTERRUPT, _INT, _ACTIVE_HIGH_LEVEL, _PCI_BUS),
                *(interrupt.slot << 2 | interrupt.pin, _IO_APIC_ID, interrupt.irq),
            )
            for interrupt in pci
        ),
        *(
            _INTERRUPT.pack(_IO_INTERRUPT, _INT, _AS_THE_BUS, _ISA_BUS, irq, _IO_APIC_ID, irq or 2)
            for irq in range(16)
            if irq != 2 and irq not in shared
        ),
        _INTERRUPT.pack(_LOCAL_INTERRUPT, _EXTINT, _AS_THE_BUS, _ISA_BUS, 0, 0, 0),
        _INTERRUPT.pack(_LOCAL_INTERRUPT, _NMI, _AS_THE_BUS, _ISA_BUS, 0, _ALL_APICS, 1),
    ]
    length = _HEADER.size + sum(map(len, entries))
    header = _HEADER.pack(
        *(b"PCMP", length, 4, 0, b"VM      ", b"PC          ", 0, 0, len(entries), _LOCAL_APIC, 0, 0, 0)
    )
    table = _with_checksum(b"".join((header, *entries)), 7)
    pointer = _with_checksum(_POINTER.pack(b"_MP_", address + _POINTER.size, 1, 4, 0, bytes(5)), 10)
    if len(pointer) + len(table) > MP_SPACE:
        raise ValueError(f"an MP table of {len(table)} bytes has no room")
    return pointer + table


def _with_checksum(data: Iterable[int], at: int) -> bytes:
    """*data* with the byte at *at* chosen so that all bytes add up to 0 modulo 256."""
    made = bytearray(data)
    made[at] = -sum(made) & 0xFF
    return bytes(made)
