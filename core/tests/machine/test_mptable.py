"""The MP configuration table, read back by the rules of the specification."""

from __future__ import annotations

import struct

import pytest

from vm_core.machine.mptable import MP_ADDRESS, MP_SPACE, PciInterrupt, mp_table

#: Bytes of an entry by its type (4.3).
SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def entries(table: bytes) -> list[bytes]:
    """Check pointer, header and checksums as an operating system does, and cut the entries."""
    assert table[:4] == b"_MP_"
    assert table[8] == 1
    assert sum(table[:16]) & 0xFF == 0
    assert struct.unpack_from("<I", table, 4)[0] == MP_ADDRESS + 16
    body = table[16:]
    signature, length, revision, _ = struct.unpack_from("<4sHBB", body)
    assert (signature, length, revision) == (b"PCMP", len(body), 4)
    assert sum(body) & 0xFF == 0
    count, lapic = struct.unpack_from("<HI", body, 34)
    assert lapic == 0xFEE00000
    found, at = [], 44
    while at < length:
        found.append(body[at : at + SIZES[body[at]]])
        at += SIZES[body[at]]
    assert len(found) == count
    assert sorted(entry[0] for entry in found) == [entry[0] for entry in found]
    return found


def test_the_table_describes_processors_and_wiring() -> None:
    """One bootstrap processor, one I/O APIC, the timer at input 2, PCI lines level-triggered and no longer ISA's."""
    found = entries(mp_table(2, [PciInterrupt(3, 0, 11), PciInterrupt(3, 1, 10), PciInterrupt(4, 0, 10)]))
    processors = [(entry[1], entry[3]) for entry in found if entry[0] == 0]
    assert processors == [(0, 3), (1, 1)]
    assert [entry[2:8] for entry in found if entry[0] == 1] == [b"PCI   ", b"ISA   "]
    assert [struct.unpack("<BBBBI", entry) for entry in found if entry[0] == 2] == [(2, 0, 0x11, 1, 0xFEC00000)]
    wires = [struct.unpack("<BBHBBBB", entry)[1:] for entry in found if entry[0] == 3]
    isa = {source: pin for kind, flags, bus, source, _, pin in wires if bus == 1}
    assert isa == {irq: irq or 2 for irq in range(16) if irq not in (2, 10, 11)}
    pci = [(source >> 2, source & 3, pin, flags) for kind, flags, bus, source, _, pin in wires if bus == 0]
    assert pci == [(3, 0, 11, 0xD), (3, 1, 10, 0xD), (4, 0, 10, 0xD)]
    local = [struct.unpack("<BBHBBBB", entry)[1:] for entry in found if entry[0] == 4]
    assert [(kind, target, pin) for kind, _, _, _, target, pin in local] == [(3, 0, 0), (1, 0xFF, 1)]


def test_a_full_bus_of_pci_slots_still_fits() -> None:
    """Four pins of 14 slots and 8 processors fit into the space; more than fits is an error, not a longer table."""
    wires = [PciInterrupt(slot, pin, 10) for slot in range(1, 15) for pin in range(4)]
    assert len(mp_table(8, wires)) <= MP_SPACE
    with pytest.raises(ValueError, match="no room"):
        mp_table(8, wires * 4)
