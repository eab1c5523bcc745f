"""A running guest is stopped and interrupted from other threads, exactly between two instructions."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable

from unicorn_guest import CODE, STACK, FakeMachine, flat_state

#: out F4h, al; jmp $
END = "e6f4 ebfe"


def kicker(machine: FakeMachine, interval: float) -> Callable[[], int]:
    """Kick the vCPU every *interval* seconds until the program ends; returns what waits for that and counts kicks."""
    count = 0
    limit = time.monotonic() + 20

    def work() -> None:
        nonlocal count
        while not machine.exit.values and time.monotonic() < limit:
            machine.cpu.kick()
            count += 1
            time.sleep(interval)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def join() -> int:
        thread.join(5)
        return count

    return join


class TestExactness:
    def test_read_modify_write(self, machine: FakeMachine) -> None:
        """Increments in memory, locked and not, are done exactly once while kicks arrive by the thousand."""
        turns = 300_000 if machine.cpu.mode == "count" else 1_000_000
        # L: lock inc [2000h]…; inc; xadd [.., 1]; rol; dec ecx; jnz L
        code = (
            "f0ff0500050000"  # lock inc dword [500h]
            "ff0504050000"  # inc dword [504h]
            "b801000000 f00fc10508050000"  # mov eax, 1; lock xadd [508h], eax
            "01c3"  # add ebx, eax
            "8305 0c050000 03 8315 10050000 00"  # add dword [50Ch], 3; adc dword [510h], 0
            "49 75d3"  # dec ecx; jnz
        )
        join = kicker(machine, 0.0001)
        registers = machine.run32(code + END, regs={"ecx": turns}, seconds=30)
        kicks = join()
        assert [machine.word(a) for a in (0x500, 0x504, 0x508)] == [turns] * 3
        assert machine.word(0x50C) | machine.word(0x510) << 32 == 3 * turns
        assert registers["ebx"] == turns * (turns - 1) // 2 & 0xFFFFFFFF
        assert kicks > 5

    def test_string_instructions(self, machine: FakeMachine) -> None:
        """REP MOVS and REP STOS move every item once while kicks arrive."""
        size = 0x40000
        machine.put(0x100000, bytes(i * 7 & 0xFF for i in range(size)))
        # mov edx, 20; L: mov esi, 100000h; mov edi, 200000h; mov ecx, size/4; rep movsd; dec edx; jnz L
        code = f"ba14000000 be00001000 bf00002000 b9{struct.pack('<I', size // 4).hex()} f3a5 4a 75ec"
        join = kicker(machine, 0.0001)
        registers = machine.run32(code + END, seconds=30)
        join()
        assert registers["edi"] == 0x200000 + size
        assert machine.memory.read(0x200000, size) == machine.memory.read(0x100000, size)

    def test_interrupts_and_checksum(self, machine: FakeMachine) -> None:
        """Every interrupt raised is taken once, at instruction boundaries of a checksum loop whose result is exact."""
        data = bytes(i * 31 + (i >> 8) & 0xFF for i in range(0x10000))
        machine.put(0x100000, data)
        machine.gate(0x40, 0x9000)
        machine.put(0x9000, "ff0500050000 cf")  # inc dword [500h]; iret
        machine.put(0x508, struct.pack("<I", _checksum(data)))
        # sti; R: mov esi, 100000h; mov ecx, 10000h; xor eax, eax
        # L: movzx ebx, byte [esi]; add eax, ebx; rol eax, 3; xor eax, ecx; inc esi; dec ecx; jnz L
        # cmp eax, [508h]; jne bad; inc dword [504h]; cmp dword [500h], 50; jb R; bad: cli
        code = (
            "fb be00001000 b900000100 31c0 0fb61e 01d8 c1c003 31c8 46 49 75f2"
            "3b0508050000 750f ff0504050000 833d00050000 32 72cf fa"
        )
        raised = 0

        def during() -> None:
            nonlocal raised
            limit = time.monotonic() + 20
            while not machine.exit.values and time.monotonic() < limit:
                if not machine.interrupts.queue:
                    machine.interrupt(0x40)
                    raised += 1
                time.sleep(0.0002)

        registers = machine.run32(code + END, during=during, seconds=30)
        assert registers["eax"] == _checksum(data)
        assert machine.word(0x500) == raised - len(machine.interrupts.queue)
        assert machine.word(0x500) >= 50
        assert registers["esp"] == STACK


def _checksum(data: bytes) -> int:
    eax, ecx = 0, len(data)
    for byte in data:
        eax = (eax + byte) & 0xFFFFFFFF
        eax = (eax << 3 | eax >> 29) & 0xFFFFFFFF
        eax ^= ecx
        ecx -= 1
    return eax


class TestInterrupts:
    def test_waits_for_the_flag(self, machine: FakeMachine) -> None:
        """An interrupt that comes while IF is clear is taken after STI and the instruction behind it."""
        machine.gate(0x40, 0x9000)
        machine.put(0x9000, "8b0424 a300050000 b001 " + END)  # mov eax, [esp]; mov [500h], eax; mov al, 1; out
        machine.interrupts.queue.append(0x40)
        # mov ecx, 100000; L: dec ecx; jnz L; mov ebx, 77h; sti; inc ebx; nop; L2: jmp L2
        registers = machine.run32("b9a0860100 49 75fd bb77000000 fb 43 90 ebfe")
        assert registers["ecx"] == 0
        assert registers["ebx"] == 0x78
        assert machine.word(0x500) >= CODE + 15

    def test_shadow_of_sti(self, machine: FakeMachine) -> None:
        """STI; HLT sleeps: the interrupt that is pending at STI is delivered with HLT's successor as return address."""
        machine.gate(0x40, 0x9000)
        machine.put(0x9000, "8b0424 a300050000 b001 " + END)
        machine.interrupts.queue.append(0x40)
        machine.run32("fb f4 90 90 ebfe")
        # count's slices may take it behind HLT by a spurious wake; never before HLT.
        assert machine.word(0x500) == CODE + 2

    def test_halt_and_wake(self, machine: FakeMachine) -> None:
        """A halted vCPU uses no time, and wakes for an interrupt."""
        machine.gate(0x40, 0x9000)
        machine.put(0x9000, "b001 " + END)
        spent = []

        def during() -> None:
            time.sleep(0.05)
            before = time.process_time()
            time.sleep(0.15)
            spent.append(time.process_time() - before)
            assert machine.exit.values == []
            machine.interrupt(0x40)

        machine.run32("fb f4 ebfd", during=during)  # sti; L: hlt; jmp L
        assert machine.exit.values == [1]
        assert spent[0] < 0.05

    def test_halt_after_interrupt(self, machine: FakeMachine) -> None:
        """An idle loop of STI; HLT takes a hundred interrupts one by one."""
        machine.gate(0x40, 0x9000)
        machine.put(0x9000, "ff0500050000 cf")

        def during() -> None:
            for n in range(100):
                machine.interrupt(0x40)
                limit = time.monotonic() + 5
                while machine.word(0x500) <= n:
                    assert time.monotonic() < limit, n
                    time.sleep(0)

        # sti; L: hlt; cmp dword [500h], 100; jb L; out
        machine.run32("fb f4 833d00050000 64 72f6" + END, during=during)
        assert machine.word(0x500) == 100

    def test_real_mode(self, machine: FakeMachine) -> None:
        """In real mode an interrupt goes through the vector table."""
        machine.put(8 * 4, struct.pack("<HH", 0x9000, 0))
        machine.put(0x9000, "66ff060005 cf")
        machine.interrupts.queue.append(8)
        # sti; L: cmp dword [500h], 1; jne L; out
        machine.run16("fb 66833e000501 75f8" + END)
        assert machine.word(0x500) == 1

    def test_two_at_once(self, machine: FakeMachine) -> None:
        """Of two pending interrupts the second is taken when the first one's handler returns."""
        machine.gate(0x40, 0x9000)
        machine.gate(0x41, 0x9100)
        # mov eax, [504h]; mov [500h], eax; mov dword [504h], 40h; iret / the same storing 41h and ending
        machine.put(0x9000, "c7050405000040000000 cf")
        machine.put(0x9100, "a104050000 a300050000 b001" + END)
        machine.interrupts.queue.extend((0x40, 0x41))
        machine.run32("fb 90 ebfd")
        assert machine.word(0x500) == 0x40


class TestRun:
    def test_returns_and_goes_on(self, machine: FakeMachine) -> None:
        """run() returns when the machine wants it, and the next run() goes on at the same place: counts are exact."""
        machine.put(CODE, "ff0500050000 49 75f7" + END)  # L: inc [500h]; dec ecx; jnz L
        turns = 200_000 if machine.cpu.mode == "count" else 2_000_000
        machine.cpu.reset(flat_state(regs={"ecx": turns}))
        pauses = 0
        while not machine.exit.values and pauses < 10_000:
            pauses += 1
            machine.run(during=lambda: (time.sleep(0.002), machine.stop()))
        assert machine.word(0x500) == turns
        assert pauses > 1

    def test_self_loop(self, machine: FakeMachine) -> None:
        """A block that jumps to itself is left as well."""
        machine.put(CODE, "ebfe")
        machine.run(flat_state(), during=lambda: (time.sleep(0.02), machine.stop()))
        assert machine.cpu.registers()["eip"] == CODE

    def test_kick_is_cheap_and_never_blocks(self, machine: FakeMachine) -> None:
        """A thousand kicks return at once, running or not, with the device lock held by another thread."""
        with machine.lock:
            began = time.perf_counter()
            for _ in range(1000):
                machine.cpu.kick()
            assert time.perf_counter() - began < 0.2

    def test_reset(self, machine: FakeMachine) -> None:
        """reset() clears registers, paging and flags of the run before."""
        machine.run32("b8ffffffff 89c3 f9" + END)
        registers = machine.run32("" + END)
        assert registers["eax"] == 0
        assert registers["ebx"] == 0
        assert not registers["eflags"] & 1
