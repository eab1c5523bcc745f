"""The ACPI tables of the board.

Theory of operation. The tables are made once, as one blob in which pointers hold offsets and checksums are missing,
together with the lists of both. Firmware gets the blob with a script of what to do (the fw_cfg table loader); a kernel
that is booted without firmware gets it finished at a fixed place.

What is described: the PCI root bus with its windows and interrupt routing, the keyboard controller, clock and serial
ports, soft-off, the power button (a fixed feature), the reset register, and the APICs.

Sources: ACPI Specification 6.4, chapter 5; QEMU's docs on the table loader as SeaBIOS implements it
(src/fw/romfile_loader.h).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs

from . import aml
from .chipset import acpi_pm
from .chipset.i440fx import PCI_HOLE

OEM_ID = b"VMCORE"
OEM_TABLE_ID = b"PC      "
CREATOR = b"VMCR"

#: ISA lines that firmware gives to PIRQA–PIRQD on this board (SeaBIOS' choice for a PIIX3).
PIRQ_LINES = (10, 10, 11, 11)
#: ISA lines that are level-triggered at the I/O APIC.
LEVEL_LINES = (5, 9, 10, 11)

LOCAL_APIC, IO_APIC = 0xFEE00000, 0xFEC00000
#: The last byte before the I/O APIC.
PCI_MEMORY_END = 0xFEBFFFFF

TABLES_FILE, RSDP_FILE, LOADER_FILE = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"

#: 5.2.6: signature, length, revision, checksum, OEM id, OEM table id, OEM revision, creator id, creator revision.
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_AT = 9


def pci_memory_start(ram: int) -> int:
    """Where PCI's memory window begins on a board with *ram* bytes: where SeaBIOS begins to give out addresses."""
    return 0x80000000 if ram <= 0x80000000 else PCI_HOLE


def pci_line(slot: int, pin: int) -> int:
    """The ISA line that *pin* (0: INTA) of *slot* arrives at."""
    return PIRQ_LINES[(slot - 1 + pin) & 3]


@attrs.define
class AcpiTables:
    """The blob. *pointers* are positions of 32-bit offsets into the blob, *checksums* are (start, length) of tables."""

    blob: bytearray
    rsdt: int
    pointers: list[int]
    checksums: list[tuple[int, int]]

    def rsdp(self, address: int = 0) -> bytes:
        """5.2.5.3, revision 0: signature, checksum, OEM id, revision, RSDT (its offset plus *address*)."""
        return struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 0, address + self.rsdt)

    def placed(self, address: int) -> tuple[bytes, bytes]:
        """Finished tables for *address*, and an RSDP for anywhere."""
        blob = bytearray(self.blob)
        for at in self.pointers:
            target = int.from_bytes(blob[at : at + 4], "little") + address
            blob[at : at + 4] = target.to_bytes(4, "little")
        for start, length in self.checksums:
            blob[start + _CHECKSUM_AT] = -sum(blob[start : start + length]) & 0xFF
        rsdp = bytearray(self.rsdp(address))
        rsdp[8] = -sum(rsdp) & 0xFF
        return bytes(blob), bytes(rsdp)

    def loader_script(self) -> bytes:
        """The same as commands for firmware, 128 bytes each."""
        commands = [
            # 1, allocate: file, alignment, zone (1: anywhere below 4 GiB, 2: the F segment).
            _command(1, struct.pack("<56sIB", TABLES_FILE.encode(), 64, 1)),
            _command(1, struct.pack("<56sIB", RSDP_FILE.encode(), 16, 2)),
        ]
        tables = TABLES_FILE.encode()
        # 2, add pointer: file to change, file pointed to, position, width; 3, add checksum: file, position, range.
        commands += [_command(2, struct.pack("<56s56sIB", tables, tables, at, 4)) for at in self.pointers]
        commands += [
            _command(3, struct.pack("<56sIII", tables, start + _CHECKSUM_AT, start, length))
            for start, length in self.checksums
        ]
        rsdp = RSDP_FILE.encode()
        commands.append(_command(2, struct.pack("<56s56sIB", rsdp, tables, 16, 4)))
        commands.append(_command(3, struct.pack("<56sIII", rsdp, 8, 0, 20)))
        return b"".join(commands)


def _command(number: int, arguments: bytes) -> bytes:
    return (number.to_bytes(4, "little") + arguments).ljust(128, b"\0")


def build(*, ram: int, cpus: int, serial_ports: Sequence[tuple[int, int]] = ()) -> AcpiTables:
    """Tables for a machine of *ram* bytes and *cpus* processors; *serial_ports* are pairs of port and line."""
    tables = AcpiTables(bytearray(), 0, [], [])
    blob = tables.blob

    def add(signature: bytes, revision: int, body: bytes, pointers: Sequence[int] = ()) -> int:
        start = len(blob)
        length = _HEADER.size + len(body)
        blob.extend(_HEADER.pack(signature, length, revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR, 1))
        blob.extend(body)
        tables.checksums.append((start, length))
        tables.pointers.extend(start + at for at in pointers)
        blob.extend(bytes(-len(blob) % 16))
        return start

    # 5.2.10: the firmware control structure has no checksum and lies on a 64-byte boundary.
    facs = len(blob)
    blob.extend(struct.pack("<4sIIIIIQB", b"FACS", 64, 0, 0, 0, 0, 0, 1).ljust(64, b"\0"))
    dsdt = add(b"DSDT", 1, _dsdt(ram, serial_ports))
    fadt = add(b"FACP", 3, _fadt(facs, dsdt), (36, 40))
    madt = add(b"APIC", 1, _madt(cpus))
    tables.rsdt = add(b"RSDT", 1, struct.pack("<II", fadt, madt), (36, 40))
    return tables


def _dsdt(ram: int, serial_ports: Sequence[tuple[int, int]]) -> bytes:
    """The namespace: ``\\_S5`` and the devices below the PCI root."""
    routing = [
        # 6.2.13: address (slot, any function), pin, no link device, global system interrupt.
        aml.package(
            aml.integer(slot << 16 | 0xFFFF), aml.integer(pin), aml.integer(0), aml.integer(pci_line(slot, pin))
        )
        for slot in range(1, 32)
        for pin in range(4)
    ]
    windows = aml.resources(
        aml.bus_numbers(0, 0),
        aml.ports(0xCF8, 8),
        aml.port_window(0x0000, 0x0CF7),
        aml.port_window(0x0D00, 0xFFFF),
        aml.memory_window(0xA0000, 0xBFFFF),
        aml.memory_window(pci_memory_start(ram), PCI_MEMORY_END),
    )
    isa = [
        _isa_device("KBD", "PNP0303", aml.ports(0x60, 1), aml.ports(0x64, 1), aml.irq(1)),
        _isa_device("MOU", "PNP0F13", aml.irq(12)),
        _isa_device("RTC", "PNP0B00", aml.ports(0x70, 2), aml.irq(8)),
        *(
            _isa_device(f"COM{n}", "PNP0501", aml.ports(port, 8), aml.irq(line), number=n)
            for n, (port, line) in enumerate(serial_ports, 1)
        ),
        # Ports of the board that belong to no device: the power management block.
        _isa_device("PMIO", "PNP0C02", aml.ports(acpi_pm.DEFAULT_BASE, 0x40), aml.ports(0xB2, 2)),
    ]
    root = aml.device(
        "PCI0",
        aml.define("_HID", aml.eisa_id("PNP0A03")),
        aml.define("_UID", aml.integer(0)),
        aml.define("_CRS", windows),
        aml.define("_PRT", aml.package(*routing)),
        aml.device("ISA", aml.define("_ADR", aml.integer(1 << 16)), *isa),
    )
    # 7.4.2: SLP_TYP for PM1a and PM1b, two reserved values.
    soft_off = aml.package(*(aml.integer(acpi_pm.SLP_S5) for _ in range(4)))
    return aml.scope("\\_SB", root) + aml.define("\\_S5", soft_off)


def _isa_device(path: str, hid: str, *descriptors: bytes, number: int | None = None) -> bytes:
    content = [aml.define("_HID", aml.eisa_id(hid))]
    if number is not None:
        content.append(aml.define("_UID", aml.integer(number)))
    return aml.device(path, *content, aml.define("_CRS", aml.resources(*descriptors)))


def _generic_address(port: int, width: int) -> bytes:
    """5.2.3.2: system I/O, width in bits, offset, access size by its width in bytes."""
    return struct.pack("<BBBBQ", 1, width, 0, {8: 1, 16: 2, 32: 3}[width], port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """5.2.9, revision 3 (244 bytes with the header)."""
    base = acpi_pm.DEFAULT_BASE
    # Flags: WBINVD works; C1; no sleep button; RTC wake is no fixed feature; 32-bit timer clear; reset register.
    flags = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10
    # Boot architecture: legacy devices, an 8042; no VGA.
    boot_flags = 1 << 0 | 1 << 1 | 1 << 2
    fixed = struct.pack(
        "<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHBI",
        facs,
        dsdt,
        0,  # reserved
        0,  # preferred profile: unspecified
        acpi_pm.SCI,
        acpi_pm.APM_CONTROL_PORT,
        acpi_pm.ACPI_ENABLE,
        acpi_pm.ACPI_DISABLE,
        0,  # S4BIOS_REQ
        0,  # PSTATE_CNT
        base,  # PM1a event block
        0,
        base + 4,  # PM1a control block
        0,
        0,  # PM2 control
        base + 8,  # timer
        0,  # GPE0
        0,  # GPE1
        4,  # lengths: PM1 events, PM1 control, PM2, timer, GPE0, GPE1
        2,
        0,
        4,
        0,
        0,
        0,  # GPE1 base
        0,  # CST_CNT
        0xFFF,  # C2 latency: none
        0xFFF,  # C3 latency: none
        0,  # flush size and stride
        0,
        0,  # duty offset, width
        0,
        0,  # day alarm, month alarm, century: CMOS indices
        0,
        0x32,
        boot_flags,
        0,  # reserved
        flags,
    )
    none = bytes(12)
    extended = (
        _generic_address(0xCF9, 8)
        + bytes([0x06])  # the value that resets
        + bytes(3)
        + bytes(16)  # 64-bit FACS and DSDT: the 32-bit ones hold
        + _generic_address(base, 32)
        + none
        + _generic_address(base + 4, 16)
        + none
        + none
        + _generic_address(base + 8, 32)
        + none
        + none
    )
    return fixed + extended


def _madt(cpus: int) -> bytes:
    """5.2.12: local APICs, one I/O APIC, and where ISA lines differ from its inputs."""
    body = struct.pack("<II", LOCAL_APIC, 1)  # flags: there is a pair of 8259As too
    for number in range(cpus):
        body += struct.pack("<BBBBI", 0, 8, number, number, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IO_APIC, 0)
    # The timer is input 2. Flags: 1 active high, 3 << 2 level-triggered; 0 as on the bus.
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    for line in LEVEL_LINES:
        body += struct.pack("<BBBBIH", 2, 10, 0, line, line, 1 | 3 << 2)
    # LINT1 of every processor is NMI.
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    return body
