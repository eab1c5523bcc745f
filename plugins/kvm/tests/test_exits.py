"""What leaves the guest: ports, strings, registers in memory, ROM, the ends of a run."""

from __future__ import annotations

import attrs
import pytest
from kvm_guest import DONE, ORIGIN, Guest, Recorder, guest, needs_kvm, until

from vm_core.machine.memory import Region, RegionKind

pytestmark = needs_kvm

#: mov al, 1; out DONE, al
FINISH = bytes((0xB0, 0x01, 0xE6, DONE))


def test_out_and_in_reach_the_port_handler_with_their_size() -> None:
    """OUT of 1, 2 and 4 bytes arrives with its size and value, and IN gives the guest what the handler says."""
    code = (
        b"\xba\x00\x03"  # mov dx, 0x300
        b"\xb0\x5a\xee"  # mov al, 0x5a; out dx, al
        b"\x83\xc2\x02"  # add dx, 2
        b"\xb8\x34\x12\xef"  # mov ax, 0x1234; out dx, ax
        b"\x83\xc2\x02"  # add dx, 2
        b"\x66\xb8\xef\xbe\xad\xde\x66\xef"  # mov eax, 0xdeadbeef; out dx, eax
        b"\xec\xa2\x00\x20"  # in al, dx; mov [0x2000], al
        b"\xed\xa3\x02\x20"  # in ax, dx; mov [0x2002], ax
        b"\x66\xed\x66\xa3\x04\x20"  # in eax, dx; mov [0x2004], eax
    ) + FINISH
    with guest(code) as g:
        ports = Recorder(answers=[0x1A5, 0xBEEF, 0x12345678])  # bits beyond the size are nobody's
        g.ports.add(0x300, 8, ports)
        g.run()
        assert ports.log == [
            ("w", 0, 1, 0x5A),
            ("w", 2, 2, 0x1234),
            ("w", 4, 4, 0xDEADBEEF),
            ("r", 4, 1),
            ("r", 4, 2),
            ("r", 4, 4),
        ]
        assert g.memory.read(0x2000, 8) == b"\xa5\x00\xef\xbe\x78\x56\x34\x12"


def test_unclaimed_ports_read_as_ones() -> None:
    """IN from a port that no device has gives ones."""
    code = b"\xba\x00\x05\xed\xa3\x00\x20" + FINISH  # mov dx, 0x500; in ax, dx; mov [0x2000], ax
    with guest(code) as g:
        g.run()
        assert g.memory.read(0x2000, 2) == b"\xff\xff"


@attrs.define
class DataPort:
    """A port with the block transfer of a disk's data register."""

    data: bytes = b""
    calls: list[tuple[str, int]] = attrs.field(factory=list)
    written: bytearray = attrs.field(factory=bytearray)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.read_block(offset, size, 1), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.write_block(offset, size, value.to_bytes(size, "little"))

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        self.calls.append(("r", count))
        taken, self.data = self.data[: size * count], self.data[size * count :]
        return taken

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        self.calls.append(("w", len(data) // size))
        self.written += data


def test_string_io_moves_a_sector_in_few_handler_calls() -> None:
    """REP INSW and REP OUTSW of 256 words arrive whole, in far fewer handler calls than there are words."""
    code = (
        b"\xfc\xba\xf0\x01"  # cld; mov dx, 0x1f0
        b"\xbf\x00\x20\xb9\x00\x01\xf3\x6d"  # mov di, 0x2000; mov cx, 256; rep insw
        b"\xbe\x00\x20\xb9\x00\x01\xf3\x6f"  # mov si, 0x2000; mov cx, 256; rep outsw
    ) + FINISH
    sector = bytes(i * 7 & 0xFF for i in range(512))
    with guest(code) as g:
        port = DataPort(sector)
        g.ports.add(0x1F0, 1, port)
        g.run()
        assert g.memory.read(0x2000, 512) == sector
        assert port.written == sector
        reads = sum(1 for kind, _ in port.calls if kind == "r")
        assert reads <= 8


def test_mmio_reaches_the_region_handler_with_its_offset() -> None:
    """Accesses to a register range of 1, 2 and 4 bytes reach its handler, counted from the range's start."""
    code = (
        b"\xb8\x00\xb0\x8e\xd8"  # mov ax, 0xb000; mov ds, ax
        b"\xc6\x06\x04\x00\x11"  # mov byte [4], 0x11
        b"\xc7\x06\x08\x00\x22\x33"  # mov word [8], 0x3322
        b"\x66\xc7\x06\x0c\x00\x44\x55\x66\x77"  # mov dword [12], 0x77665544
        b"\x66\xa1\x10\x00"  # mov eax, [16]
        b"\x31\xdb\x8e\xdb\x66\xa3\x00\x20"  # xor bx, bx; mov ds, bx; mov [0x2000], eax
    ) + FINISH
    with guest(code) as g:
        registers = Recorder(answers=[0xCAFEF00D])
        g.memory.add(Region("dev", 0xB0000, 0x1000, RegionKind.MMIO, handler=registers, priority=1))
        g.run()
        assert registers.log == [
            ("w", 4, 1, 0x11),
            ("w", 8, 2, 0x3322),
            ("w", 12, 4, 0x77665544),
            ("r", 16, 4),
        ]
        assert g.memory.read(0x2000, 4) == b"\x0d\xf0\xfe\xca"


def test_writes_to_rom_are_dropped_and_reads_see_it() -> None:
    """ROM reads as its image, before and after the guest tried to write it."""
    code = (
        b"\xb8\x00\xf0\x8e\xd8"  # mov ax, 0xf000; mov ds, ax
        b"\xa0\x34\x02"  # mov al, [0x234]
        b"\xc6\x06\x34\x02\x99"  # mov byte [0x234], 0x99
        b"\x8a\x26\x34\x02"  # mov ah, [0x234]
        b"\x31\xdb\x8e\xdb\xa3\x00\x20"  # xor bx, bx; mov ds, bx; mov [0x2000], ax
    ) + FINISH
    with guest(code, rom=0x10000) as g:
        place = g.memory.rom_space(0x10000)
        g.memory.buffer[place + 0x234] = 0x42
        g.memory.add(Region("bios", 0xF0000, 0x10000, RegionKind.ROM, backing=place, priority=1))
        g.run()
        assert g.memory.read(0x2000, 2) == b"\x42\x42"
        assert g.memory.buffer[place + 0x234] == 0x42


def test_code_runs_from_rom() -> None:
    """The processor executes a program that lies in ROM."""
    code = b"\xea\x00\x00\x00\xf0"  # jmp 0xf000:0
    with guest(code, rom=0x1000) as g:
        place = g.memory.rom_space(0x1000)
        g.memory.buffer[place : place + len(FINISH)] = FINISH
        g.memory.add(Region("bios", 0xF0000, 0x1000, RegionKind.ROM, backing=place, priority=1))
        g.run()
        assert g.done.log == [("w", 0, 1, 1)]


def test_the_map_may_change_inside_a_handler() -> None:
    """A port write that switches F0000 from ROM to RAM (PAM) is seen by the very next instruction, and back again."""
    code = (
        b"\xb8\x00\xf0\x8e\xd8"  # mov ax, 0xf000; mov ds, ax
        b"\xa0\x00\x00\xe6\x81"  # mov al, [0]; out 0x81, al       ROM: 0x42
        b"\xb0\x01\xe6\x80"  # mov al, 1; out 0x80, al            RAM from here
        b"\xc6\x06\x00\x00\x77"  # mov byte [0], 0x77
        b"\xa0\x00\x00\xe6\x81"  # mov al, [0]; out 0x81, al       RAM: 0x77
        b"\xb0\x00\xe6\x80"  # mov al, 0; out 0x80, al            ROM again
        b"\xa0\x00\x00\xe6\x81"  # mov al, [0]; out 0x81, al       ROM: 0x42
    ) + FINISH
    with guest(code, rom=0x10000) as g:
        place = g.memory.rom_space(0x10000)
        g.memory.buffer[place] = 0x42
        bios = g.memory.add(Region("bios", 0xF0000, 0x10000, RegionKind.ROM, backing=place, priority=1))
        seen = Recorder()
        g.ports.add(0x81, 1, seen)

        @attrs.define
        class Pam:
            def read(self, offset: int, size: int) -> int:
                raise AssertionError("never read")

            def write(self, offset: int, size: int, value: int) -> None:
                bios.enabled = not value
                g.memory.update()

        g.ports.add(0x80, 1, Pam())
        slots = len(g.accel._slots)
        g.run()
        assert [entry[3] for entry in seen.log] == [0x42, 0x77, 0x42]
        assert g.memory.buffer[0xF0000] == 0x77
        assert len(g.accel._slots) == slots


def test_an_access_across_the_end_of_a_range_is_cut_there() -> None:
    """A dword that straddles two ranges reaches both in fitting sizes; a hole reads as ones and takes writes."""
    code = (
        b"\xb8\x00\xb0\x8e\xd8"  # mov ax, 0xb000; mov ds, ax
        b"\x66\xc7\x06\x0e\x00\x11\x22\x33\x44"  # mov dword [0x0e], 0x44332211   two ranges
        b"\x66\xc7\x06\x1e\x00\x55\x66\x77\x88"  # mov dword [0x1e], 0x88776655   range and hole
        b"\x66\xa1\x1e\x00"  # mov eax, [0x1e]
        b"\x31\xdb\x8e\xdb\x66\xa3\x00\x20"  # xor bx, bx; mov ds, bx; mov [0x2000], eax
    ) + FINISH
    with guest(code, ram=0xA0000) as g:
        low, high = Recorder(), Recorder(answers=[0x1234])
        g.memory.add(Region("low", 0xB0000, 0x10, RegionKind.MMIO, handler=low))
        g.memory.add(Region("high", 0xB0010, 0x10, RegionKind.MMIO, handler=high))
        g.run()
        assert low.log == [("w", 14, 2, 0x2211)]
        assert high.log == [("w", 0, 2, 0x4433), ("w", 14, 2, 0x6655), ("r", 14, 2)]
        assert g.memory.read(0x2000, 4) == b"\x34\x12\xff\xff"


def test_ram_that_is_no_whole_page_still_works() -> None:
    """A kilobyte of RAM in a page with registers is read and written like any other."""
    code = (
        b"\xb8\x00\xb0\x8e\xd8"  # mov ax, 0xb000; mov ds, ax
        b"\x80\x06\x05\x00\x01"  # add byte [5], 1
    ) + FINISH
    with guest(code, ram=0xA0000, rom=0x1000) as g:
        place = g.memory.rom_space(0x1000)
        g.memory.buffer[place + 5] = 0x41
        g.memory.add(Region("scrap", 0xB0000, 0x400, RegionKind.RAM, backing=place))
        g.run()
        assert g.memory.read(0xB0005, 1) == b"\x42"


def test_a_triple_fault_asks_for_a_reset() -> None:
    """A guest without a usable interrupt table that faults asks the machine for a reset."""
    code = (
        b"\x0f\x01\x1e\x00\x20"  # lidt [0x2000] (all zeroes)
        b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # mov eax, cr0; or al, 1 (PE); mov cr0, eax
        b"\x0f\x0b"  # ud2
    )
    with guest(code) as g:
        g.run()
        assert g.resets == ["triple fault"]


def test_an_instruction_that_kvm_cannot_run_stops_the_machine_with_its_bytes() -> None:
    """A jump into a hole is an internal error that names the cause and shows the registers, not a hang."""
    code = b"\xea\x00\x00\x00\xc0"  # jmp 0xc000:0, a hole
    with guest(code, ram=0xA0000) as g:
        with g.running(fails=True):
            until(lambda: g.errors)
        assert "internal error" in g.errors[0]
        assert "rip=0" in g.errors[0]


def test_a_reset_starts_the_program_again_with_fresh_registers() -> None:
    """After a reset the program runs again from its start, and sees no register or mode of its first run."""
    code = (
        b"\x66\xa3\x00\x20"  # mov [0x2000], eax
        b"\x0f\x20\xc0\x66\xa3\x04\x20"  # mov eax, cr0; mov [0x2004], eax
        b"\x66\x0d\x20\x00\x00\x00\x0f\x22\xc0"  # or eax, 0x20 (NE); mov cr0, eax
        b"\x66\xb8\x78\x56\x34\x12"  # mov eax, 0x12345678
    ) + FINISH
    with guest(code) as g:
        for _ in range(2):
            g.run()
            assert g.memory.read(0x2000, 8) == b"\x00\x00\x00\x00\x10\x00\x00\x60"
            g.memory.write(0x2000, bytes(8))
            g.reset()
        assert g.cpus[0].registers()["rip"] == ORIGIN


def test_a_reset_inside_an_in_does_not_leak_its_value() -> None:
    """A vCPU stopped in the handler of an IN completes it first: after a reset no late value arrives in EAX."""
    code = b"\xe5\x90\x66\xa3\x00\x20" + FINISH  # in ax, 0x90; mov [0x2000], eax
    with guest(b"\x90" + code) as g:

        class Stopper:
            def read(self, offset: int, size: int) -> int:
                g.halt()
                return 0xBEEF

            def write(self, offset: int, size: int, value: int) -> None:
                raise AssertionError("never written")

        claimed = g.ports.add(0x90, 2, Stopper())
        g.run()
        assert g.cpus[0].registers()["rax"] & 0xFFFF == 0xBEEF
        g.ports.remove(claimed)
        g.memory.write(ORIGIN, b"\x66\xa3\x00\x20" + FINISH)  # mov [0x2000], eax
        g.reset()
        g.run()
        assert g.memory.read(0x2000, 4) == bytes(4)


@pytest.mark.parametrize("cpus", [1, 2])
def test_cpuid_describes_the_machines_processors(cpus: int) -> None:
    """CPUID leaf 1 shows the APIC, the hypervisor bit, APIC ID 0 and the number of logical processors."""
    code = (
        b"\x66\xb8\x01\x00\x00\x00\x0f\xa2"  # mov eax, 1; cpuid
        b"\x66\x89\x1e\x00\x20\x66\x89\x0e\x04\x20\x66\x89\x16\x08\x20"  # mov [0x2000..], ebx, ecx, edx
    ) + FINISH
    with guest(code, cpus=cpus) as g:
        g.run()
        ebx, ecx, edx = (int.from_bytes(g.memory.read(0x2000 + 4 * i, 4), "little") for i in range(3))
        assert ebx >> 24 == 0
        assert ebx >> 16 & 0xFF == cpus
        assert ecx >> 31 == 1
        assert edx >> 9 & 1 == 1


def test_closing_twice_is_harmless() -> None:
    """A closed accelerator and its vCPUs can be closed again, and kicked."""
    g = Guest(FINISH)
    g.run()
    g.close()
    g.close()
    g.cpus[0].kick()
