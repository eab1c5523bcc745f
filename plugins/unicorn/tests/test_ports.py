"""Port accesses, single and as string instructions."""

from __future__ import annotations

import struct

import pytest
from unicorn_guest import FakeMachine, flat_state, identity_paging

END = "e6f4 ebfe"
PAGING_ON = "b800001000 0f22d8 0f20c0 0d00000080 0f22c0"
DATA = bytes(i * 13 + (i >> 8) & 0xFF for i in range(65536))


class Plain:
    """Gives consecutive bytes of DATA, remembers what is written; one item at a time."""

    def __init__(self) -> None:
        self.at = 0
        self.calls = 0
        self.written = b""

    def read(self, offset: int, size: int) -> int:
        self.calls += 1
        self.at += size
        return int.from_bytes(DATA[self.at - size : self.at], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.calls += 1
        self.written += value.to_bytes(size, "little")


class Blocks(Plain):
    """The same, with blocks."""

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        self.calls += 1
        self.at += size * count
        return DATA[self.at - size * count : self.at]

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        self.calls += 1
        self.written += data


@pytest.fixture(params=[Plain, Blocks])
def device(request: pytest.FixtureRequest, machine: FakeMachine) -> Plain:
    """A device at port 170h."""
    made: Plain = request.param()
    machine.ports.add(0x170, 1, made)
    return made


class TestSingle:
    def test_sizes(self, machine: FakeMachine, device: Plain) -> None:
        """IN and OUT of 1, 2 and 4 bytes, by DX."""
        # mov dx, 170h; xor eax, eax; in al, dx; mov ebx, eax; in ax, dx; mov ecx, eax; in eax, dx; mov esi, eax;
        # out dx, al; out dx, ax; out dx, eax
        registers = machine.run32("66ba7001 31c0 ec 89c3 66ed 89c1 ed 89c6 ee 66ef ef" + END)
        assert registers["ebx"] == DATA[0]
        assert registers["ecx"] == int.from_bytes(DATA[1:3], "little")
        assert registers["esi"] == int.from_bytes(DATA[3:7], "little")
        assert device.written == DATA[3:4] + DATA[3:5] + DATA[3:7]

    def test_unclaimed(self, machine: FakeMachine) -> None:
        """A port that nobody has reads as ones and takes writes."""
        registers = machine.run32("31c0 e480 89c3 e580 ef" + END)
        assert registers["ebx"] == 0xFF
        assert registers["eax"] == 0xFFFFFFFF

    def test_bits_beyond_the_size(self, machine: FakeMachine) -> None:
        """Only the bits of the access's size reach the device and the guest."""
        seen = []

        class Wide:
            def read(self, offset: int, size: int) -> int:
                return 0x1FF

            def write(self, offset: int, size: int, value: int) -> None:
                seen.append(value)

        machine.ports.add(0x80, 1, Wide())
        registers = machine.run32("b878563412 e680 e480" + END)
        assert seen == [0x78]
        assert registers["eax"] == 0x123456FF


class TestStrings:
    @pytest.mark.parametrize(("opcode", "size"), [("6c", 1), ("666d", 2), ("6d", 4)])
    def test_rep_ins(self, machine: FakeMachine, device: Plain, opcode: str, size: int) -> None:
        """REP INS stores every item and leaves ECX, EDI and the rest as the loop does, across pages."""
        count = 3000
        # cld; mov dx, 170h; mov edi, 200F01h; mov ecx, count; rep ins
        code = f"fc 66ba7001 bf010f2000 b9{struct.pack('<I', count).hex()} f3{opcode}"
        registers = machine.run32(code + END)
        assert machine.memory.read(0x200F01, count * size) == DATA[: count * size]
        assert machine.memory.read(0x200F01 + count * size, 4) == bytes(4)
        assert registers["ecx"] == 0
        assert registers["edi"] == 0x200F01 + count * size
        if isinstance(device, Blocks):
            assert device.calls <= 2 * (count * size // 4096 + 2)

    @pytest.mark.parametrize(("opcode", "size"), [("6e", 1), ("666f", 2), ("6f", 4)])
    def test_rep_outs(self, machine: FakeMachine, device: Plain, opcode: str, size: int) -> None:
        """REP OUTS sends every item."""
        count = 3000
        machine.put(0x200F01, DATA[: count * size])
        code = f"fc 66ba7001 be010f2000 b9{struct.pack('<I', count).hex()} f3{opcode}"
        registers = machine.run32(code + END)
        assert device.written == DATA[: count * size]
        assert registers["ecx"] == 0
        assert registers["esi"] == 0x200F01 + count * size
        if isinstance(device, Blocks):
            assert device.calls <= 2 * (count * size // 4096 + 2)

    def test_backwards(self, machine: FakeMachine, device: Plain) -> None:
        """With the direction flag set items go downwards."""
        registers = machine.run32("fd 66ba7001 bf10002000 b908000000 f3666d fc".replace("f3666d", "f3 66 6d") + END)
        expected = b"".join(DATA[2 * i : 2 * i + 2] for i in reversed(range(8)))
        assert machine.memory.read(0x200002, 16) == expected
        assert registers["edi"] == 0x200000

    def test_without_rep(self, machine: FakeMachine, device: Plain) -> None:
        """INSW and OUTSW alone move one item and leave ECX."""
        registers = machine.run32("fc 66ba7001 bf00002000 be00002000 b905000000 666d 666f" + END)
        assert registers["ecx"] == 5
        assert machine.memory.read(0x200000, 4) == DATA[:2] + bytes(2)
        assert device.written == DATA[:2]

    def test_real_mode(self, machine: FakeMachine, device: Plain) -> None:
        """In real mode the segment's base counts, only CX and DI are used, and DI wraps at 64 KiB."""
        # cld; mov ax, 1234h; mov es, ax; mov dx, 170h; mov edi, 55550FF0h; mov ecx, 66660100h; rep insw
        code = "fc b83412 8ec0 ba7001 66bff00f5555 66b900016666 f36d"
        registers = machine.run16(code + END)
        assert machine.memory.read(0x12340 + 0xFF0, 512) == DATA[:512]
        assert registers["ecx"] == 0x66660000
        assert registers["edi"] == 0x55550FF0 + 512
        # mov di, FFFCh; mov cx, 4; rep insw
        device.at = 0
        registers = machine.run16("fc b83412 8ec0 ba7001 bffcff b90400 f36d" + END)
        assert machine.memory.read(0x12340 + 0xFFFC, 4) == DATA[:4]
        assert machine.memory.read(0x12340, 4) == DATA[4:8]
        assert registers["edi"] & 0xFFFF == 4

    def test_segment_and_address_size(self, machine: FakeMachine, device: Plain) -> None:
        """OUTS honours a segment prefix, and an address-size prefix in 16-bit code uses the 32-bit registers."""
        machine.put(0x20000, DATA[:64])
        # cld; mov ax, 1000h; mov fs, ax; mov esi, 10000h - 0 …: fs:[esi] with esi = 10000h is beyond 64 KiB; use F000h
        machine.put(0x1F000, DATA[64:128])
        code = "fc b80010 8ee0 ba7001 66be00f00000 66b910000000 64 67 f36f"
        registers = machine.run16(code + END)
        assert device.written == DATA[64:96]
        assert registers["esi"] == 0xF020

    def test_paging(self, machine: FakeMachine, device: Plain) -> None:
        """With paging on, each page of the destination is found in the guest's tables and marked dirty."""
        identity_paging(machine)
        machine.put(0x101000 + 4 * 0x300, struct.pack("<II", 0x250007, 0x240007))
        registers = machine.run32(PAGING_ON + "fc 66ba7001 bf800f3000 b980000000 f3666d" + END)
        assert machine.memory.read(0x250F80, 128) == DATA[:128]
        assert machine.memory.read(0x240000, 128) == DATA[128:256]
        assert registers["edi"] == 0x301080
        assert machine.word(0x101000 + 4 * 0x301) & 0x40

    def test_page_fault_in_the_middle(self, machine: FakeMachine, device: Plain) -> None:
        """REP INS into an absent page faults with the items before it done, and goes on after the handler maps it."""
        identity_paging(machine)
        machine.put(0x101000 + 4 * 0x301, bytes(4))
        machine.gate(14, 0x9000)
        # add esp, 4; mov [500h], ecx; mov [504h], edi; mov dword [101C04h], 301007h; iret
        machine.put(0x9000, "83c404 890d00050000 893d04050000 c705041c100007103000 cf")
        registers = machine.run32(PAGING_ON + "fc 66ba7001 bf000f3000 b900010000 f3666d" + END)
        assert machine.word(0x500) == 0x80
        assert machine.word(0x504) == 0x301000
        assert machine.memory.read(0x300F00, 512) == DATA[:512]
        assert registers["ecx"] == 0

    def test_code_arrives_by_port(self, machine: FakeMachine, device: Plain) -> None:
        """Code that REP INS stores over code that was executed is executed as it is now."""
        machine.put(0x200000, "b801000000 c3 90 90")
        image = bytearray(DATA)
        image[:8] = bytes.fromhex("b802000000 c3 90 90")
        device.read = lambda offset, size: 0  # type: ignore[method-assign]
        kind = type(device)

        class Loader(kind):  # type: ignore[misc, valid-type]
            def read(self, offset: int, size: int) -> int:
                self.at += size
                return int.from_bytes(image[self.at - size : self.at], "little")

        if kind is Blocks:
            Loader.read_block = lambda self, offset, size, count: bytes(image[: size * count])
        machine.ports.add(0x1F0, 1, Loader())
        # call 200000h; mov ebx, eax; mov dx, 1F0h; mov edi, 200000h; mov ecx, 4; rep insw; call 200000h
        code = "b800002000 ffd0 89c3 fc 66baf001 bf00002000 b904000000 f3666d b800002000 ffd0"
        registers = machine.run32(code + END)
        assert (registers["ebx"], registers["eax"]) == (1, 2)

    def test_destination_is_not_memory(self, machine: FakeMachine, device: Plain) -> None:
        """REP INS into a hole reads all items from the device."""
        registers = machine.run32("fc 66ba7001 bf00000010 b910000000 f3666d" + END)
        assert device.at == 32
        assert registers["ecx"] == 0
        machine.cpu.reset(flat_state())
