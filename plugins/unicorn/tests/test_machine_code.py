"""The machine code of every host, executed instruction by instruction in an emulator of that host."""

from __future__ import annotations

import struct

import attrs
import pytest
import unicorn
from unicorn import arm64_const, x86_const

from vm_unicorn import native

CODE, CONTROL, FLAGS, STUBS, STACK = 0x10000, 0x20000, 0x30000, 0x40000, 0x58000
EFLAGS, HFLAGS = FLAGS, FLAGS + 8
ENV, CPU, ENGINE = 0x1111_0000, 0x2222_0000, 0x3333_0000
#: Where the entry points return to.
RETURN = STUBS + 0x100
FUNCTIONS = {
    name: STUBS + 16 * i for i, name in enumerate(("stop", "interrupt", "loop_exit", "exception", "fill", "reset"))
}


@attrs.define
class Call:
    """A call of one of the engine's functions: its name and first arguments."""

    name: str
    arguments: tuple[int, int, int]


class Host:
    """An emulated host with the three entry points and a control page."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.code = native._HOSTS[name]
        u = unicorn.unicorn_const
        arm = name == "aarch64"
        self.emulator = unicorn.Uc(u.UC_ARCH_ARM64, u.UC_MODE_ARM) if arm else unicorn.Uc(u.UC_ARCH_X86, u.UC_MODE_64)
        registers = (
            [getattr(arm64_const, f"UC_ARM64_REG_X{i}") for i in range(4)]
            if arm
            else [getattr(x86_const, f"UC_X86_REG_{r}") for r in ("RDI", "RSI", "RDX", "RCX")]
        )
        self.arguments = registers
        self.kept = (
            [getattr(arm64_const, f"UC_ARM64_REG_X{i}") for i in (*range(19, 30),)] + [arm64_const.UC_ARM64_REG_SP]
            if arm
            else [getattr(x86_const, f"UC_X86_REG_{r}") for r in ("RBX", "RBP", "R12", "R13", "R14", "R15", "RSP")]
        )
        self.result = arm64_const.UC_ARM64_REG_X0 if arm else x86_const.UC_X86_REG_RAX
        self.stack = arm64_const.UC_ARM64_REG_SP if arm else x86_const.UC_X86_REG_RSP
        self.arm = arm
        for base in (CODE, CONTROL, FLAGS, STUBS, STACK & ~0xFFFF):
            self.emulator.mem_map(base, 0x10000)
        # Each function of the engine returns at once.
        ret = bytes.fromhex("c0035fd6" if arm else "c3")
        for address in (*FUNCTIONS.values(), RETURN):
            self.emulator.mem_write(address, ret)
        self.put(native.VECTOR, "<i", -1)
        pointers = {
            native.EFLAGS_PLACE: EFLAGS,
            native.HFLAGS_PLACE: HFLAGS,
            native.ENV: ENV,
            native.CPU: CPU,
            native.DO_STOP: FUNCTIONS["stop"],
            native.DO_INTERRUPT: FUNCTIONS["interrupt"],
            native.DO_LOOP_EXIT: FUNCTIONS["loop_exit"],
            native.DO_EXCEPTION: FUNCTIONS["exception"],
        }
        for offset, value in pointers.items():
            self.put(offset, "<Q", value)

    def put(self, offset: int, form: str, value: int) -> None:
        """Set a word of the control page."""
        self.emulator.mem_write(CONTROL + offset, struct.pack(form, value))

    def get(self, offset: int) -> int:
        """A signed 32-bit word of the control page."""
        return int(struct.unpack("<i", self.emulator.mem_read(CONTROL + offset, 4))[0])

    def flags(self, eflags: int, hflags: int = 0) -> None:
        """What the engine's state says."""
        self.emulator.mem_write(FLAGS, struct.pack("<QQ", eflags, hflags))

    def call(self, part: bytes, *arguments: int) -> tuple[list[Call], int]:
        """Call *part*; the calls that it makes, and its result. Registers that a function keeps must be kept."""
        emulator = self.emulator
        emulator.mem_write(CODE, part)
        emulator.ctl_remove_cache(CODE, CODE + 0x1000)
        emulator.reg_write(self.stack, STACK)
        if self.arm:
            emulator.reg_write(arm64_const.UC_ARM64_REG_LR, RETURN)
        else:
            emulator.mem_write(STACK - 8, struct.pack("<Q", RETURN))
            emulator.reg_write(self.stack, STACK - 8)
        for register, value in zip(self.arguments, arguments, strict=False):
            emulator.reg_write(register, value)
        for i, register in enumerate(self.kept[:-1]):
            emulator.reg_write(register, 0x5EED0000 + i)
        calls: list[Call] = []
        names = {address: name for name, address in FUNCTIONS.items()}

        def look(_uc: object, address: int, _size: int, _user: object) -> None:
            if address in names:
                first = tuple(emulator.reg_read(r) for r in self.arguments[:3])
                calls.append(Call(names[address], first))
                # Both conventions want the stack at a multiple of 16 (x86-64: before the return address).
                assert (emulator.reg_read(self.stack) + (0 if self.arm else 8)) % 16 == 0
                if names[address] == "loop_exit":  # it does not return
                    emulator.emu_stop()

        hook = emulator.hook_add(unicorn.UC_HOOK_CODE, look, begin=STUBS, end=STUBS + 0xFFF)
        emulator.emu_start(CODE, RETURN)
        emulator.hook_del(hook)
        kept = [emulator.reg_read(r) for r in self.kept[:-1]]
        if not any(c.name == "loop_exit" for c in calls):
            assert kept == [0x5EED0000 + i for i in range(len(kept))]
            assert emulator.reg_read(self.stack) == STACK
        return calls, emulator.reg_read(self.result)

    def block(self) -> list[str]:
        """Call the block hook; the names of what it calls."""
        calls, _ = self.call(self.code.block, ENGINE, 0x1234, 8, CONTROL)
        self.calls = calls
        return [c.name for c in calls]


@pytest.fixture(params=["x86_64", "aarch64"])
def host(request: pytest.FixtureRequest) -> Host:
    """An emulated host."""
    return Host(request.param)


class TestBlock:
    def test_nothing_wanted(self, host: Host) -> None:
        """Without attention nothing else is looked at."""
        host.put(native.STOP, "<I", 1)
        assert host.block() == []
        assert host.get(native.LEFT) == 0

    def test_stop(self, host: Host) -> None:
        """A wanted stop stops the engine, whatever the guest's flags are, and says so."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.STOP, "<I", 1)
        host.flags(0)
        assert host.block() == ["stop"]
        assert host.calls[0].arguments[0] == ENGINE
        assert host.get(native.LEFT) == 1

    def test_stop_after_blocks(self, host: Host) -> None:
        """A stop may be wanted a number of blocks later."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.STOP, "<I", 3)
        assert host.block() == []
        assert host.block() == []
        assert host.get(native.LEFT) == 0
        assert host.block() == ["stop"]

    @pytest.mark.parametrize(
        ("eflags", "hflags", "leaves"), [(0x202, 0, True), (0x002, 0, False), (0x202, 8, False), (0xFFFFFDFF, 0, False)]
    )
    def test_window(self, host: Host, eflags: int, hflags: int, leaves: bool) -> None:
        """A wanted window stops the engine when IF is set and no shadow is in force, and not before."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.WINDOW, "<I", 1)
        host.flags(eflags, hflags)
        assert host.block() == (["stop"] if leaves else [])
        assert host.get(native.LEFT) == leaves

    def test_vector_is_delivered(self, host: Host) -> None:
        """An acknowledged interrupt is delivered once, and attention goes with it."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.VECTOR, "<i", 0x31)
        host.flags(0x202)
        assert host.block() == ["interrupt", "loop_exit"]
        assert host.calls[0].arguments == (ENV, 0x31, 1)
        assert host.calls[1].arguments[0] == CPU
        assert host.get(native.VECTOR) == -1
        assert host.get(native.ATTENTION) == 0

    def test_vector_zero(self, host: Host) -> None:
        """Zero is a vector."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.VECTOR, "<i", 0)
        host.flags(0x202)
        assert host.block() == ["interrupt", "loop_exit"]
        assert host.calls[0].arguments == (ENV, 0, 1)

    def test_vector_waits(self, host: Host) -> None:
        """While interrupts are off the vector stays."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.VECTOR, "<i", 0x31)
        host.flags(0x002)
        assert host.block() == []
        assert host.get(native.VECTOR) == 0x31
        assert host.get(native.ATTENTION) == 1

    @pytest.mark.parametrize("word", [native.WINDOW])
    def test_attention_stays_for_the_rest(self, host: Host, word: int) -> None:
        """After a delivery attention stays if a window is wanted as well."""
        host.put(native.ATTENTION, "<I", 1)
        host.put(native.VECTOR, "<i", 0x31)
        host.put(word, "<I", 1)
        host.flags(0x202)
        assert host.block() == ["interrupt", "loop_exit"]
        assert host.get(native.ATTENTION) == 1

    def test_nothing_behind_attention(self, host: Host) -> None:
        """Attention alone changes nothing."""
        host.put(native.ATTENTION, "<I", 1)
        host.flags(0x202)
        assert host.block() == []


class TestExceptions:
    def test_exception(self, host: Host) -> None:
        """The exception hook hands the CPU to the engine's delivery."""
        calls, _ = host.call(host.code.exception, ENGINE, 14, CONTROL)
        assert [c.name for c in calls] == ["exception"]
        assert calls[0].arguments[0] == CPU

    def test_invalid_instruction(self, host: Host) -> None:
        """So does the hook for invalid instructions, and it answers that it was handled."""
        calls, result = host.call(host.code.invalid, ENGINE, CONTROL)
        assert [c.name for c in calls] == ["exception"]
        assert calls[0].arguments[0] == CPU
        assert result & 0xFF == 1
