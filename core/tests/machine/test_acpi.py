"""The ACPI tables: by Intel's own compiler, and where firmware and a direct boot put them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vm_core.machine import acpi

ADDRESS = 0xE0000


def tables(blob: bytes, rsdp: bytes, address: int) -> dict[str, bytes]:
    """Every table by signature, found as a system finds them: from the root pointer on."""
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp) & 0xFF == 0

    def at(pointer: int) -> bytes:
        start = pointer - address
        length = struct.unpack_from("<I", blob, start + 4)[0]
        return blob[start : start + length]

    rsdt = at(struct.unpack_from("<I", rsdp, 16)[0])
    found = {"RSDT": rsdt}
    for (pointer,) in struct.iter_unpack("<I", rsdt[36:]):
        table = at(pointer)
        found[table[:4].decode()] = table
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    found["FACS"], found["DSDT"] = at(facs), at(dsdt)
    return found


def built() -> acpi.AcpiTables:
    return acpi.build(ram=256 << 20, cpus=2, serial_ports=[(0x3F8, 4), (0x2F8, 3)])


def test_all_tables_are_found_with_right_checksums() -> None:
    """RSDP → RSDT → FADT and MADT, FADT → FACS and DSDT; every table but the FACS adds up to zero."""
    found = tables(*built().placed(ADDRESS), ADDRESS)
    assert set(found) == {"RSDT", "FACP", "APIC", "FACS", "DSDT"}
    for name, table in found.items():
        assert name == "FACS" or sum(table) & 0xFF == 0, name


def test_the_loader_script_does_the_same_as_placing() -> None:
    """Interpreting the commands as firmware does gives the tables that are placed directly."""
    made = built()
    rsdp_at = 0xF0000
    files = {acpi.TABLES_FILE: bytearray(made.blob), acpi.RSDP_FILE: bytearray(made.rsdp())}
    places = {acpi.TABLES_FILE: ADDRESS, acpi.RSDP_FILE: rsdp_at}
    script = made.loader_script()
    assert len(script) % 128 == 0

    def text(raw: bytes) -> str:
        return raw.rstrip(b"\0").decode()

    for n in range(0, len(script), 128):
        command = struct.unpack_from("<I", script, n)[0]
        if command == 1:
            name, align, zone = struct.unpack_from("<56sIB", script, n + 4)
            assert places[text(name)] % align == 0
            assert zone in (1, 2)
        elif command == 2:
            source, target, at, size = struct.unpack_from("<56s56sIB", script, n + 4)
            file = files[text(source)]
            value = int.from_bytes(file[at : at + size], "little") + places[text(target)]
            file[at : at + size] = value.to_bytes(size, "little")
        else:
            assert command == 3
            name, at, start, length = struct.unpack_from("<56sIII", script, n + 4)
            file = files[text(name)]
            file[at] = -sum(file[start : start + length]) & 0xFF
    assert (bytes(files[acpi.TABLES_FILE]), bytes(files[acpi.RSDP_FILE])) == made.placed(ADDRESS)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl is not installed: apt install acpica-tools")
def test_intels_compiler_reads_them(tmp_path: Path) -> None:
    """iasl disassembles every table without complaint, and compiles the DSDT's source again without errors."""
    for name, table in tables(*built().placed(ADDRESS), ADDRESS).items():
        file = tmp_path / f"{name}.aml"
        file.write_bytes(table)
        done = subprocess.run(["iasl", "-d", file], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert "rror" not in done.stderr.replace("0 Errors", ""), done.stderr
    done = subprocess.run(["iasl", "-tc", "DSDT.dsl"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "0 Errors, 0 Warnings" in done.stdout + done.stderr
    source = (tmp_path / "DSDT.dsl").read_text()
    assert "Name (\\_S5" in source
    assert source.count("PNP0501") == 2
    fadt = (tmp_path / "FACP.dsl").read_text()
    for line in ("SCI Interrupt : 0009", "Value to cause reset : 06", "Address : 0000000000000CF9"):
        assert line in fadt


def test_routing_is_what_the_interrupt_router_does() -> None:
    """The line that the tables name for a pin is the one that SeaBIOS' routing of PIRQA–PIRQD gives it."""
    # Slot 1 INTA is PIRQA; slots and pins rotate.
    assert [acpi.pci_line(1, pin) for pin in range(4)] == [10, 10, 11, 11]
    assert [acpi.pci_line(slot, 0) for slot in range(1, 6)] == [10, 10, 11, 11, 10]
