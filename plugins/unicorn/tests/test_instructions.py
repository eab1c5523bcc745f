"""Guest code runs as on a processor: modes, exceptions, interrupts, paging, privilege."""

from __future__ import annotations

import struct

from unicorn_guest import (
    CODE,
    KERNEL_CODE,
    STACK,
    TASK,
    USER_CODE,
    USER_DATA,
    USER_STACK,
    FakeMachine,
    flat_state,
    identity_paging,
)

from vm_core.machine.accel import CpuState
from vm_core.machine.memory import Region, RegionKind

#: out F4h, al; jmp $
END = "e6f4 ebfe"
#: Loads CR3 with 100000h and sets CR0.PG: mov eax, 100000h; mov cr3, eax; mov eax, cr0; or eax, 80000000h; mov cr0, eax
PAGING_ON = "b800001000 0f22d8 0f20c0 0d00000080 0f22c0"
#: Ends a test from a handler whose frame has an error code: pop [500h]; pop [504h]; pop [508h]; mov eax, cr2;
#: mov [50Ch], eax; mov [510h], esp; out F4h, al; jmp $
REPORT = "8f0500050000 8f0504050000 8f0508050000 0f20d0 a30c050000 892510050000" + END
#: The same without an error code: pop [504h]; pop [508h]; …
REPORT_PLAIN = "8f0504050000 8f0508050000 892510050000" + END


def reported(machine: FakeMachine) -> tuple[int, int, int, int]:
    """(error code, EIP, CS, CR2) as REPORT stored them."""
    return machine.word(0x500), machine.word(0x504), machine.word(0x508), machine.word(0x50C)


def enter_ring3(code: str) -> str:
    """Ring-0 code that goes to *code* in ring 3, which is put right behind it."""
    # mov ax, 28h; ltr ax; push 23h; push USER_STACK; push 2; push 1Bh; push target; iret
    head = bytes.fromhex(f"66b8{TASK:02x}00 0f00d8 6a{USER_DATA:02x} 68{struct.pack('<I', USER_STACK).hex()} 6a02")
    head += bytes.fromhex(f"6a{USER_CODE:02x}")
    target = CODE + len(head) + 6
    return (head + b"\x68" + struct.pack("<I", target) + b"\xcf").hex() + code


class TestModes:
    def test_reset_vector(self, machine: FakeMachine) -> None:
        """After reset the first instruction is fetched at F000:FFF0, from the ROM that a PC has there."""
        rom = machine.memory.buffer
        at = machine.rom_place + 0xFFF0
        rom[at : at + 6] = bytes.fromhex("b042 e6f4 ebfe")  # mov al, 42h; out F4h, al
        machine.memory.add(_alias_at_top(machine))
        machine.run(CpuState())
        assert machine.exit.values == [0x42]

    def test_protected_mode_and_back(self, machine: FakeMachine) -> None:
        """Code enters protected mode through a far jump, loads segments from the GDT, and returns to real mode."""
        machine.put(0x600, struct.pack("<HI", 0x2F, 0x1000))
        # A 16-bit code segment for the way back, in place of the task segment.
        machine.put(0x1000 + TASK, struct.pack("<Q", 0x00009B000000FFFF))
        code16 = "0f011e0006"  # lgdt [600h]... is lidt; replaced below
        code16 = "0f01160006 0f20c0 0c01 0f22c0 66ea 20800000 0800"  # lgdt [600h]; PE; jmp dword 8:8020h
        machine.put(
            CODE + 0x20,
            # mov ax, 10h; mov ds, ax; mov dword [200000h], 12345678h; jmp 28h:8040h
            "66b81000 8ed8 c70500002000 78563412 ea 40800000 2800",
        )
        machine.put(
            CODE + 0x40,
            # mov eax, cr0; and al, FEh; mov cr0, eax; jmp 0:8050h
            "0f20c0 24fe 0f22c0 ea 5080 0000",
        )
        machine.put(CODE + 0x50, "31c0 8ed8 8cc8 a30005" + END)  # xor ax, ax; mov ds, ax; mov ax, cs; mov [500h], ax
        registers = machine.run16(code16)
        assert machine.word(0x200000) == 0x12345678
        assert machine.word(0x500) & 0xFFFF == 0
        assert registers["cr0"] & 1 == 0

    def test_unreal_mode(self, machine: FakeMachine) -> None:
        """A segment loaded in protected mode keeps its 4 GiB limit in real mode."""
        machine.put(0x600, struct.pack("<HI", 0x2F, 0x1000))
        # lgdt [600h]; cr0.PE = 1; mov bx, 10h; mov es, bx; cr0.PE = 0; es mov dword [dword 300000h], 11223344h
        code = "0f01160006 0f20c0 0c01 0f22c0 bb1000 8ec3 24fe 0f22c0 26 66 67c70500003000 44332211" + END
        machine.run16(code)
        assert machine.word(0x300000) == 0x11223344


class TestExceptions:
    def test_real_mode_interrupt(self, machine: FakeMachine) -> None:
        """INT goes through the vector table, IRET returns behind it, FLAGS are kept."""
        machine.put(0x80 * 4, struct.pack("<HH", 0x9000, 0))
        machine.put(0x9000, "66ff060005 cf")  # inc dword [500h]; iret
        registers = machine.run16("f9 cd80 cd80 9c 58" + END)  # stc; int 80h; int 80h; pushf; pop ax
        assert machine.word(0x500) == 2
        assert registers["eax"] & 1
        assert registers["esp"] == STACK

    def test_software_interrupt(self, machine: FakeMachine) -> None:
        """INT in protected mode pushes the next instruction's address; a trap gate leaves IF, an interrupt gate not."""
        machine.gate(0x30, 0x9000, kind=0x8E)
        machine.gate(0x31, 0x9000, kind=0x8F)
        # pushf; pop eax; and eax, 200h; add [500h], eax; iret
        machine.put(0x9000, "9c 58 2500020000 010500050000 cf")
        registers = machine.run32("fb cd30 cd31" + END)
        assert machine.word(0x500) == 0x200
        assert registers["eip"] == CODE + 7
        assert registers["esp"] == STACK

    def test_divide_error(self, machine: FakeMachine) -> None:
        """#DE pushes the faulting instruction's address and no error code."""
        machine.gate(0, 0x9000)
        machine.put(0x9000, REPORT_PLAIN)
        machine.run32("90 31c9 f7f1" + END)  # nop; xor ecx, ecx; div ecx
        assert machine.word(0x504) == CODE + 3
        assert machine.word(0x508) == KERNEL_CODE

    def test_invalid_opcode(self, machine: FakeMachine) -> None:
        """UD2 raises #UD, whose handler may step over it."""
        machine.gate(6, 0x9000)
        machine.put(0x9000, "83042402 ff0500050000 cf")  # add dword [esp], 2; inc [500h]; iret
        machine.run32("0f0b 0f0b" + END)
        assert machine.word(0x500) == 2

    def test_breakpoint(self, machine: FakeMachine) -> None:
        """INT3 is a trap: the handler returns behind it."""
        machine.gate(3, 0x9000)
        machine.put(0x9000, "ff0500050000 cf")
        machine.run32("cc cc cc" + END)
        assert machine.word(0x500) == 3

    def test_general_protection(self, machine: FakeMachine) -> None:
        """Loading a selector beyond the GDT raises #GP with the selector as error code, as often as it is done."""
        machine.gate(13, 0x9000)
        # pop [500h]; add dword [esp], 2; inc [520h]; iret
        machine.put(0x9000, "8f0500050000 83042402 ff0520050000 cf")
        machine.run32("66b88800" + "8ed8" * 5 + END)  # mov ax, 88h; mov ds, ax …
        assert machine.word(0x500) == 0x88
        assert machine.word(0x520) == 5

    def test_page_not_present(self, machine: FakeMachine) -> None:
        """A write to an absent page raises #PF with W and CR2; many in a row stay page faults."""
        identity_paging(machine)
        machine.put(0x101000 + 4 * 0x300, bytes(64))
        machine.gate(14, 0x9000)
        machine.put(
            0x9000,
            # pop [500h]; push eax; mov eax, cr2; mov edx, eax; shr eax, 12; or edx, 7; and edx, FFFFF007h;
            # mov [101000h + eax*4], edx; pop eax; inc [520h]; iret
            "8f0500050000 50 0f20d0 89c2 c1e80c 83ca07 81e207f0ffff 89148500101000 58 ff0520050000 cf",
        )
        # mov ecx, 16; mov edi, 300004h; mov [edi], edi; add edi, 1000h; dec ecx; jnz
        registers = machine.run32(PAGING_ON + "b910000000 bf04003000 893f 81c700100000 49 75f5" + END)
        assert machine.word(0x520) == 16
        assert machine.word(0x500) == 2
        assert registers["cr2"] == 0x30F004
        assert machine.word(0x30F004) == 0x30F004

    def test_write_protection(self, machine: FakeMachine) -> None:
        """With CR0.WP ring 0 faults on a read-only page with error code 3; without it the write succeeds."""
        identity_paging(machine)
        machine.put(0x101000 + 4 * 0x300, struct.pack("<I", 0x300005))
        machine.gate(14, 0x9000)
        machine.put(0x9000, REPORT)
        # mov dword [300000h], 1 (no WP); or eax, 10000h; mov cr0, eax; mov dword [300000h], 2
        machine.run32(PAGING_ON + "c70500003000 01000000 0d00000100 0f22c0 c70500003000 02000000" + END)
        assert reported(machine)[0] == 3
        assert reported(machine)[3] == 0x300000
        assert machine.word(0x300000) == 1

    def test_double_fault(self, machine: FakeMachine) -> None:
        """A #GP whose gate is absent becomes #DF with error code 0."""
        machine.gate(8, 0x9000)
        machine.put(0x9000, REPORT)
        machine.run32("66b88800 8ed8" + END)
        assert reported(machine)[:2] == (0, CODE + 4)

    def test_triple_fault(self, machine: FakeMachine) -> None:
        """Without any handler the processor shuts down, and the machine is asked for a reset."""
        machine.run32("66b88800 8ed8" + END)
        assert machine.resets == ["triple fault"]
        assert machine.exit.values == []

    def test_triple_fault_then_reset(self, machine: FakeMachine) -> None:
        """The vCPU runs again after a triple fault and a reset."""
        machine.run32("66b88800 8ed8" + END)
        machine.run32("b007" + END)
        assert machine.exit.values == [7]

    def test_single_step(self, machine: FakeMachine) -> None:
        """EFLAGS.TF raises #DB after each instruction."""
        machine.gate(1, 0x9000)
        machine.put(0x9000, "ff0500050000 cf")
        # pushf; or dword [esp], 100h; popf; nop; nop; nop; pushf; and dword [esp], ~100h; popf
        machine.run32("9c 810c2400010000 9d 90 90 90 9c 812424fffeffff 9d" + END)
        # The three NOPs, PUSHF, AND, and the POPF that clears it.
        assert machine.word(0x500) in (5, 6)


class TestPrivilege:
    def test_ring3_and_interrupt_back(self, machine: FakeMachine) -> None:
        """INT from ring 3 switches to the task segment's stack and pushes SS, ESP, EFLAGS, CS, EIP."""
        machine.gate(0x80, 0x9000, kind=0xEE)
        # mov [500h], esp; pop [504h]; pop [508h]; pop [50Ch]; pop [510h]; pop [514h]; mov ax, ss; mov [518h], eax
        frame = "892500050000 8f0504050000 8f0508050000 8f050c050000 8f0510050000 8f0514050000 8cd0 a318050000"
        machine.put(0x9000, frame + END)
        code = enter_ring3("cd80")
        machine.run32(code)
        end = CODE + len(bytes.fromhex(code))
        assert [machine.word(0x500 + 4 * i) for i in range(3)] == [STACK - 20, end, USER_CODE]
        assert machine.word(0x510) == USER_STACK
        assert machine.word(0x514) == USER_DATA
        assert machine.word(0x518) & 0xFFFF == 0x10

    def test_round_trips(self, machine: FakeMachine) -> None:
        """A thousand system calls return to ring 3, which goes on where it was."""
        machine.gate(0x80, 0x9000, kind=0xEE)
        machine.gate(0x81, 0x9100, kind=0xEE)
        machine.put(0x9000, "ff0500050000 cf")
        machine.put(0x9100, END)
        # mov ecx, 1000; L: int 80h; dec ecx; jnz L; int 81h
        machine.run32(enter_ring3("b9e8030000 cd80 49 75fb cd81"))
        assert machine.word(0x500) == 1000

    def test_privileged_instruction(self, machine: FakeMachine) -> None:
        """CLI in ring 3 raises #GP(0), and so does INT through a gate of ring 0."""
        machine.gate(13, 0x9000)
        machine.put(0x9000, REPORT)
        machine.run32(enter_ring3("90 fa"))
        assert reported(machine)[0] == 0
        machine.flat_tables()  # the task segment is not busy again
        machine.gate(0x33, 0x9000)
        machine.run32(enter_ring3("90 cd33"))
        assert reported(machine)[0] == 0x33 * 8 + 2
        assert reported(machine)[2] == USER_CODE

    def test_user_page_fault(self, machine: FakeMachine) -> None:
        """Ring 3 reading a supervisor page raises #PF with P and U set."""
        identity_paging(machine)
        machine.put(0x101000 + 4 * 0x300, struct.pack("<I", 0x300003))
        machine.gate(14, 0x9000)
        machine.put(0x9000, REPORT)
        on = bytes.fromhex(PAGING_ON)
        machine.put(CODE, on)
        # Ring 3's code is placed by its address: jump over from the paging code.
        code = enter_ring3("a100003000")
        machine.put(CODE + 0x200, on + bytes.fromhex(f"e9{struct.pack('<i', -0x200 - len(on) - 5).hex()}"))
        machine.put(CODE, code)
        state = flat_state()
        state.eip = CODE + 0x200
        machine.run(state)
        assert reported(machine)[0] == 5
        assert reported(machine)[3] == 0x300000


class TestPaging:
    def test_large_page(self, machine: FakeMachine) -> None:
        """A 4 MiB page maps high addresses onto low memory."""
        machine.put(0x100000, struct.pack("<I", 0x87))
        machine.put(0x100000 + 4 * 0x300, struct.pack("<I", 0x87))  # C0000000h
        # mov eax, cr4; or al, 10h; mov cr4, eax
        machine.run32("0f20e0 0c10 0f22e0" + PAGING_ON + "c7050005 00c0 efbeadde" + END)
        assert machine.word(0x500) == 0xDEADBEEF

    def test_physical_address_extension(self, machine: FakeMachine) -> None:
        """With CR4.PAE entries are 8 bytes wide, and a fault's handler is found through them."""
        machine.put(0x100000, struct.pack("<4Q", 0x101001, 0, 0, 0x101001))
        machine.put(0x101000, struct.pack("<2Q", 0x83, 0x200083))
        machine.gate(14, 0x9000)
        machine.put(0x9000, REPORT)
        # cr4.PAE; paging; mov dword [C0000600h], 1234h; mov eax, [40000000h]
        machine.run32("0f20e0 0c20 0f22e0" + PAGING_ON + "c7050006 00c0 34120000 a100000040" + END)
        assert machine.word(0x600) == 0x1234
        assert reported(machine)[0] == 0
        assert reported(machine)[3] == 0x40000000

    def test_invlpg_and_cr3(self, machine: FakeMachine) -> None:
        """A changed entry is seen after INVLPG, and after writing CR3."""
        identity_paging(machine)
        machine.put(0x300000, struct.pack("<I", 1))
        machine.put(0x301000, struct.pack("<I", 2))
        machine.put(0x302000, struct.pack("<I", 3))
        pte = "c705001c1000"  # mov dword [101C00h], …: the entry of 300000h is there
        code = (
            PAGING_ON
            + "8b1d00003000"  # mov ebx, [300000h]
            + f"{pte} 07103000"  # entry = 301007h
            + "0f013d00003000"  # invlpg [300000h]
            + "8b0d00003000"  # mov ecx, [300000h]
            + f"{pte} 07203000"  # entry = 302007h
            + "0f20d8 0f22d8"  # mov eax, cr3; mov cr3, eax
            + "8b1500003000"  # mov edx, [300000h]
        )
        registers = machine.run32(code + END)
        assert (registers["ebx"], registers["ecx"], registers["edx"]) == (1, 2, 3)

    def test_accessed_and_dirty(self, machine: FakeMachine) -> None:
        """A read sets the entry's A bit, a write its D bit."""
        identity_paging(machine)
        machine.run32(PAGING_ON + "a100003000 c70500103000 01000000" + END)
        assert machine.word(0x101000 + 4 * 0x300) & 0x60 == 0x20
        assert machine.word(0x101000 + 4 * 0x301) & 0x60 == 0x60


class TestFloatingPoint:
    def test_lazy_switch(self, machine: FakeMachine) -> None:
        """With CR0.TS an FPU or SSE instruction raises #NM; CLTS ends it and the instruction is done again."""
        machine.gate(7, 0x9000)
        machine.put(0x9000, "0f06 ff0500050000 cf")  # clts; inc [500h]; iret
        # cr4.OSFXSR; mov eax, cr0; or al, 8 (TS); mov cr0, eax; fld1; fistp [504h]; movd xmm0, esp; movd [508h], xmm0
        sse = "0f20e0 80cc02 0f22e0 0f20c0 0c08 0f22c0 d9e8 db1d04050000 660f6ec4 660f7e0508050000"
        machine.run32(sse + END)
        assert machine.word(0x500) == 1
        assert machine.word(0x504) == 1
        assert machine.word(0x508) == STACK


class TestInformation:
    def test_cpuid(self, machine: FakeMachine) -> None:
        """A processor with TSC, PSE, CMOV, FXSR and SSE2; no SYSENTER, APIC, MONITOR or long mode."""
        # mov eax, 1; cpuid; mov [500h], edx; mov [504h], ecx; mov eax, 80000001h; cpuid
        registers = machine.run32("b801000000 0fa2 891500050000 890d04050000 b801000080 0fa2" + END)
        edx, ecx = machine.word(0x500), machine.word(0x504)
        for bit in (0, 3, 4, 5, 6, 8, 13, 15, 23, 24, 25, 26):
            assert edx >> bit & 1, bit
        assert not edx >> 9 & 1
        assert not edx >> 11 & 1
        assert not ecx >> 3 & 1
        assert not registers["edx"] >> 29 & 1

    def test_time_stamp_counter(self, machine: FakeMachine) -> None:
        """RDTSC rises from read to read."""
        # mov ecx, 10000; rdtsc; mov esi, eax; mov edi, edx; L: rdtsc; mov ebx, eax; sub eax, esi; mov ebp, edx;
        # sbb ebp, edi; jc bad; mov esi, ebx; mov edi, edx; dec ecx; jnz L; mov al, 1; out; bad: mov al, 0; out
        code = "b910270000 0f31 89c6 89d7 0f31 89c3 29f0 89d5 19fd 720d 89de 89d7 49 75ed b001" + END + "b000" + END
        machine.run32(code)
        assert machine.exit.values == [1]

    def test_debug_registers(self, machine: FakeMachine) -> None:
        """DR0 to DR3 keep what is written; DR7 begins at 400h."""
        # mov eax, 12345678h; mov dr0, eax; xor eax, eax; mov ebx, dr0; mov ecx, dr7
        registers = machine.run32("b878563412 0f23c0 31c0 0f21c3 0f21f9" + END)
        assert registers["ebx"] == 0x12345678
        assert registers["ecx"] == 0x400

    def test_model_specific_registers(self, machine: FakeMachine) -> None:
        """SYSENTER's registers keep what is written; an unknown one reads as zero and takes writes."""
        # mov ecx, 175h; mov eax, 1234h; xor edx, edx; wrmsr; xor eax, eax; rdmsr; mov esi, eax
        # mov ecx, 8Bh+…: an unknown number; wrmsr; rdmsr
        code = "b975010000 b834120000 31d2 0f30 31c0 0f32 89c6 b9ff0f0000 0f30 0f32 89c7"
        registers = machine.run32(code + END)
        assert registers["esi"] == 0x1234
        assert registers["edi"] == 0

    def test_registers(self, machine: FakeMachine) -> None:
        """registers() shows what a person asks for: all general, segment and control registers, EIP and EFLAGS."""
        registers = machine.run32("b911000000 ba22000000 bb33000000 be44000000 bf55000000 f9" + END)
        shown = {name: registers[name] for name in ("ecx", "edx", "ebx", "esi", "edi", "esp", "cs", "ds", "ss")}
        assert shown == {
            "ecx": 0x11,
            "edx": 0x22,
            "ebx": 0x33,
            "esi": 0x44,
            "edi": 0x55,
            "esp": STACK,
            "cs": 8,
            "ds": 0x10,
            "ss": 0x10,
        }
        assert registers["eflags"] & 1
        assert {"eip", "cr0", "cr2", "cr3", "cr4", "es", "fs", "gs"} <= set(registers)


class TestFailures:
    def test_execution_of_nothing(self, machine: FakeMachine) -> None:
        """Running into a hole stops the machine with one message that tells where."""
        machine.put(CODE, "b800000080 ffe0")  # mov eax, 80000000h; jmp eax
        machine.run(flat_state())
        assert len(machine.errors) == 1
        assert "eip=80000000" in machine.errors[0]
        assert "\n" not in machine.errors[0]

    def test_handler_failure(self, machine: FakeMachine) -> None:
        """What a device's handler raises becomes the machine's error, once, with the place."""

        class Broken:
            def read(self, offset: int, size: int) -> int:
                raise RuntimeError("broken device")

            write = None

        machine.ports.add(0x80, 1, Broken())  # type: ignore[arg-type]
        machine.put(CODE, "e480" + END)
        machine.run(flat_state())
        assert len(machine.errors) == 1
        assert "broken device" in machine.errors[0]
        assert f"{CODE:08x}"[:5] in machine.errors[0]


def _alias_at_top(machine: FakeMachine) -> Region:
    return Region("rom-top", 0xFFFF0000, 0x10000, RegionKind.ROM, backing=machine.rom_place)
