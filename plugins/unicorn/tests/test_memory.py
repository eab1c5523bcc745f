"""The guest sees the machine's memory map, and code that anything has overwritten is executed as it is now."""

from __future__ import annotations

import struct
import threading
import time

from unicorn_guest import CODE, RAM, ROM, FakeMachine, flat_state, identity_paging

from vm_core.machine.memory import Region, RegionKind

#: out F4h, al; jmp $
END = "e6f4 ebfe"
PAGING_ON = "b800001000 0f22d8 0f20c0 0d00000080 0f22c0"


class Registers:
    """A device with memory-mapped registers that remembers what is done to it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size, 0))
        return 0x11223344_55667788 >> 8 * (offset & 3)

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


class TestMap:
    def test_mmio(self, machine: FakeMachine) -> None:
        """Accesses of 1, 2 and 4 bytes reach a device with their offset, size and value."""
        device = Registers()
        machine.memory.add(Region("device", 0xFE000000, 0x1000, RegionKind.MMIO, handler=device))
        # mov eax, [FE000010h]; mov ebx, eax; mov byte [FE000021h], 5; mov word [FE000032h], 1234h;
        # mov [FE000040h], ebx; movzx ecx, byte [FE000001h]
        registers = machine.run32("a1100000fe 89c3 c605210000fe05 66c705320000fe3412 891d400000fe 0fb60d010000fe" + END)
        assert registers["ebx"] == 0x55667788
        assert registers["ecx"] == 0x77
        assert device.log == [
            ("read", 0x10, 4, 0),
            ("write", 0x21, 1, 5),
            ("write", 0x32, 2, 0x1234),
            ("write", 0x40, 4, 0x55667788),
            ("read", 1, 1, 0),
        ]

    def test_holes(self, machine: FakeMachine) -> None:
        """Nobody's addresses read as ones and take writes, beyond RAM and at the top of the space."""
        code = "c7050000000101000000 a100000001 89c3 0fb60d000000f0 8b15f8ffffff"
        registers = machine.run32(code + END)
        assert registers["ebx"] == 0xFFFFFFFF
        assert registers["ecx"] == 0xFF
        assert registers["edx"] == 0xFFFFFFFF

    def test_small_device_beside_nothing(self, machine: FakeMachine) -> None:
        """A device smaller than a page shares its page with a hole, and two such devices share one."""
        one, two = Registers(), Registers()
        machine.memory.add(Region("one", 0xFE000020, 0x10, RegionKind.MMIO, handler=one))
        machine.memory.add(Region("two", 0xFE000030, 0x10, RegionKind.MMIO, handler=two))
        registers = machine.run32("a1240000fe 8b1d000000fe c705380000fe 01000000" + END)
        assert registers["ebx"] == 0xFFFFFFFF
        assert one.log == [("read", 4, 4, 0)]
        assert two.log == [("write", 8, 4, 1)]

    def test_rom_takes_no_writes(self, machine: FakeMachine) -> None:
        """A write to ROM is dropped, also for the instruction right behind it, and all else it does is done."""
        machine.memory.buffer[machine.rom_place : machine.rom_place + 8] = b"ROMROMRO"
        # mov esi, F0000h; mov edi, esi; mov eax, 12345678h; cld; stosd; mov ebx, [esi]; mov dword [esi], 1;
        # mov ecx, [esi]
        registers = machine.run32("be00000f00 89f7 b878563412 fc ab 8b1e c70601000000 8b0e" + END)
        assert registers["ebx"] == int.from_bytes(b"ROMR", "little")
        assert registers["ecx"] == registers["ebx"]
        assert registers["edi"] == ROM + 4
        assert bytes(machine.memory.buffer[machine.rom_place : machine.rom_place + 8]) == b"ROMROMRO"

    def test_map_changes_in_a_handler(self, machine: FakeMachine) -> None:
        """A port write that turns ROM into RAM (as a host bridge's PAM registers do) is in force for the next block."""

        class Bridge:
            def read(self, offset: int, size: int) -> int:
                return 0

            def write(self, offset: int, size: int, value: int) -> None:
                machine.rom.enabled = not value
                machine.memory.update()

        machine.ports.add(0x80, 1, Bridge())
        machine.memory.buffer[machine.rom_place : machine.rom_place + 4] = b"\x11\x11\x11\x11"
        # mov al, 1; out 80h, al; jmp +0; mov dword [F0000h], 22222222h; mov ebx, [F0000h]; mov al, 0; out 80h, al;
        # jmp +0; mov ecx, [F0000h]
        code = "b001 e680 eb00 c70500000f0022222222 8b1d00000f00 b000 e680 eb00 8b0d00000f00"
        registers = machine.run32(code + END)
        assert registers["ebx"] == 0x22222222
        assert registers["ecx"] == 0x11111111
        assert machine.word(0xF0000) == 0x22222222

    def test_code_under_a_changed_map(self, machine: FakeMachine) -> None:
        """Code translated from ROM is not executed when RAM appears in its place, and the other way round."""

        class Bridge:
            def read(self, offset: int, size: int) -> int:
                return 0

            def write(self, offset: int, size: int, value: int) -> None:
                machine.rom.enabled = not value
                machine.memory.update()

        machine.ports.add(0x80, 1, Bridge())
        rom = bytes.fromhex("83c301 c3")  # add ebx, 1; ret
        machine.memory.buffer[machine.rom_place : machine.rom_place + 4] = rom
        machine.put(ROM, "83c310 c3")  # add ebx, 10h; ret
        # mov eax, F0000h; call eax; mov al, 1; out 80h, al; mov eax, F0000h; call eax; mov al, 0; out; …; call eax
        call = "b800000f00 ffd0"
        registers = machine.run32(f"31db {call} {call} b001 e680 {call} b000 e680 {call}" + END)
        assert registers["ebx"] == 1 + 1 + 0x10 + 1

    def test_device_moves_while_running(self, machine: FakeMachine) -> None:
        """A device that another thread moves is found at its new address, and no longer at the old one."""
        device = Registers()
        region = machine.memory.add(Region("device", 0xFE000000, 0x1000, RegionKind.MMIO, handler=device))

        def during() -> None:
            time.sleep(0.03)
            with machine.lock:
                region.start = 0xFD000000
                machine.memory.update()

        # L: mov eax, [FD000000h]; cmp eax, -1; je L; mov ebx, [FE000000h]
        registers = machine.run32("a1000000fd 83f8ff 74f6 8b1d000000fe" + END, during=during)
        assert registers["eax"] == 0x55667788
        assert registers["ebx"] == 0xFFFFFFFF


class TestCode:
    def test_self_modification(self, machine: FakeMachine) -> None:
        """A loop that changes the immediate of an instruction behind it executes what it wrote, every time."""
        # mov ecx, 1000; xor ebx, ebx; L: mov [imm], ecx; jmp +0; add ebx, imm32; dec ecx; jnz L
        code = bytes.fromhex("b9e8030000 31db 890d 00000000 eb00 81c3 00000000 49 75ef")
        at = code.index(bytes.fromhex("81c3")) + 2
        code = code[:9] + struct.pack("<I", CODE + at) + code[13:]
        registers = machine.run32(code.hex() + END)
        assert registers["ebx"] == 1000 * 1001 // 2

    def test_code_written_through_an_alias(self, machine: FakeMachine) -> None:
        """With paging on, code that is written at another linear address of its page is executed as written."""
        identity_paging(machine)
        machine.put(0x101000 + 4 * 0x300, struct.pack("<I", 0x200007))  # 300000h is another name of 200000h
        machine.put(0x200000, "83c301 c3")
        # mov dword [300100h], 0 (an entry for data first); call 200000h; mov byte [300002h], 10h; call; the same, 20h
        call = "b800002000 ffd0"
        code = f"{PAGING_ON} 31db c7050001300000000000 {call} c6050200300010 {call} c6050200300020 {call}"
        registers = machine.run32(code + END)
        assert registers["ebx"] == 0x31

    def test_data_page_becomes_code(self, machine: FakeMachine) -> None:
        """A page that was only written so far is executed, written, executed: as a program loader does."""
        # mov edi, 200000h; mov ecx, 100; L: mov dword [edi], C301C383h (add ebx, 1; ret); call edi;
        # mov byte [edi+2], 2; call edi; add edi, 40h; dec ecx; jnz L
        code = "31db bf00002000 b964000000 c70783c301c3 ffd7 c6470202 ffd7 83c740 49 75ec"
        registers = machine.run32(code + END)
        assert registers["ebx"] == 300

    def test_device_writes_code(self, machine: FakeMachine) -> None:
        """Code that a device overwrites is executed as it is now, without and with paging."""
        for paging in ("", PAGING_ON):
            identity_paging(machine)
            machine.put(0x200000, "b801000000 c3")  # mov eax, 1; ret
            machine.put(0x500, bytes(8))
            # L: mov edx, 200000h; call edx; mov [500h], eax; cmp eax, 2; jne L
            code = f"{paging} ba00002000 ffd2 a300050000 83f802 75ef"

            def during() -> None:
                limit = time.monotonic() + 5
                while machine.word(0x500) != 1:
                    assert time.monotonic() < limit
                    time.sleep(0.001)
                time.sleep(0.02)
                machine.put(0x200001, b"\x02")
                machine.cpu.dma_written([(0x200000, 4096)])

            registers = machine.run32(code + END, during=during)
            assert registers["eax"] == 2

    def test_device_writes_many_times(self, machine: FakeMachine) -> None:
        """The guest executes each of many versions of a page, told of each by memory only after dma_written()."""
        versions = 200 if machine.cpu.mode != "count" else 20
        machine.put(0x200000, "b800000000 c3")
        # L: mov ecx, [504h] (version); mov edx, 200000h; call edx; cmp eax, ecx; jb bad; mov [500h], eax;
        # cmp eax, versions; jne L; out; bad: mov al, FFh; out
        code = f"8b0d04050000 ba00002000 ffd2 39c8 720e a300050000 3d{struct.pack('<I', versions).hex()} 75e4"
        code += END + "b0ff" + END

        def during() -> None:
            for version in range(1, versions + 1):
                machine.put(0x200001, struct.pack("<I", version))
                machine.cpu.dma_written([(0x200000, 512), (0x3000, 64)])
                machine.put(0x504, struct.pack("<I", version))
                limit = time.monotonic() + 5
                while machine.word(0x500) != version and not machine.exit.values:
                    assert time.monotonic() < limit, version
                    time.sleep(0)

        registers = machine.run32(code + END, during=during, seconds=20)
        assert machine.exit.values != [0xFF]
        assert registers["eax"] == versions

    def test_dma_while_not_running(self, machine: FakeMachine) -> None:
        """dma_written() returns at once for a vCPU that is paused or halted, and is heeded when it runs again."""
        machine.put(0x200000, "b801000000 c3")
        call = "ba00002000 ffd2"
        assert machine.run32(call + END)["eax"] == 1
        machine.put(0x200001, b"\x05")
        machine.cpu.dma_written([(0x200000, 4096)])
        assert machine.run32(call + END)["eax"] == 5

        machine.gate(0x40, 0x9000)
        machine.put(0x9000, call + END)
        took: list[float] = []

        def during() -> None:
            time.sleep(0.05)
            machine.put(0x200001, b"\x06")
            began = time.perf_counter()
            machine.cpu.dma_written([(0x200000, 4096)])
            took.append(time.perf_counter() - began)
            machine.interrupt(0x40)

        registers = machine.run32(call + "fb f4 ebfd", during=during)
        assert registers["eax"] == 6
        assert took[0] < 0.5

    def test_dma_from_many_threads(self, machine: FakeMachine) -> None:
        """Many threads reporting writes to a running guest neither deadlock nor disturb it."""
        machine.put(CODE, "ff0500050000 ebf8")  # L: inc [500h]; jmp L

        def report() -> None:
            for _ in range(100):
                machine.cpu.dma_written([(0x200000, 65536)])

        def during() -> None:
            threads = [threading.Thread(target=report) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            assert not any(thread.is_alive() for thread in threads)
            # While it is asked without a pause the guest may get nowhere; afterwards it must.
            deadline = time.monotonic() + 10
            while not machine.word(0x500) and time.monotonic() < deadline:
                time.sleep(0.001)
            machine.stop()

        machine.run(flat_state(), during=during)
        assert machine.word(0x500) > 0

    def test_end_of_memory(self, machine: FakeMachine) -> None:
        """The last bytes of RAM belong to it, the first beyond do not."""
        at = struct.pack("<I", RAM - 4).hex()
        beyond = struct.pack("<I", RAM).hex()
        registers = machine.run32(f"c705{at}78563412 8b1d{at} 8b0d{beyond}" + END)
        assert registers["ebx"] == 0x12345678
        assert registers["ecx"] == 0xFFFFFFFF
