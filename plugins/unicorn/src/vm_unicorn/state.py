"""The CPU's state as memory: where each register lies in the engine's own record of it, and how to get at it.

Much of what delivering an exception needs has no place in the library's register interface: hidden parts of segment
registers, the shadow of STI, error codes. But a saved context holds the engine's whole record, so the places are looked
for by behaviour once, at start-up (:func:`find_layout`): set a register, see what changed. Where the record's address
itself is known it is used in place, else through a context that is saved before and restored after.
"""

from __future__ import annotations

import ctypes
import mmap
import struct

import attrs
import unicorn

from vm_core.machine.accel import Segment

from .engine import GENERAL, Context, Engine

# EFLAGS.
TF, IF, NT, RF, VM, AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18
DF = 1 << 10

# The engine's hidden flags: CPL, the shadow of STI and MOV SS, code and stack size, use of segment bases, CR0.PE.
HF_CPL, HF_SHADOW, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 3, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7

# In the record of a segment register or descriptor table: selector, base, limit, and the descriptor's high word.
BASE, LIMIT, FLAGS = 8, 16, 20
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")
TABLE_NAMES = ("ldtr", "tr", "gdtr", "idtr")

_segment = struct.Struct("<I4xQII")
_MAGIC = tuple(0x5EED0000 | i * 0x1111 for i in range(8))
MAGIC_GENERAL = struct.pack("<8Q", *_MAGIC)


@attrs.frozen
class StateLayout:
    """Byte offsets in the engine's record of the CPU, which starts with the eight general registers (u64 each)."""

    #: ESP is the fifth of them.
    esp = 32

    #: Where the record starts in a saved context.
    context: int
    eip: int
    eflags: int
    hflags: int
    #: Of segment registers and descriptor tables, by name.
    segments: dict[str, int]
    #: Of CR0; the others follow, 8 bytes each.
    cr0: int
    #: The exception being delivered, -1 for none. The engine clears it only when it delivers exceptions itself.
    old_exception: int
    error_code: int
    #: 1 if it was an INT instruction.
    is_software: int


def set_magic_registers(engine: Engine) -> None:
    """Give the general registers values that :data:`MAGIC_GENERAL` finds in memory."""
    for name, value in zip(GENERAL, _MAGIC, strict=True):
        engine.set(name, value)


def find_layout(engine: Engine) -> StateLayout | None:
    """Look for the layout; None if this build's record is too different.

    The engine has no memory mapped yet. Its registers are changed; the caller keeps a context from before.
    """
    context = Context(engine)
    try:
        return _find_layout(engine, context)
    finally:
        context.close()


def _find_layout(engine: Engine, context: Context) -> StateLayout | None:
    set_magic_registers(engine)
    context.save()
    start = context.bytes().find(MAGIC_GENERAL)
    if start < 0:
        return None

    def state() -> bytes:
        context.save()
        return context.bytes()[start:]

    def words() -> list[int]:
        data = state()
        return [word for (word,) in struct.iter_unpack("<I", data[: len(data) & ~3])]

    def changed(mask: int) -> list[int]:
        """Offsets of words in which, from *before* to *after*, the bits *mask* were cleared."""
        return [4 * i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a & mask == mask and not b & mask]

    engine.set("eip", 0x51A7C0DE)
    eip = state().find(struct.pack("<Q", 0x51A7C0DE))
    engine.set("eflags", 0x202)
    before = words()
    engine.set("eflags", 0x002)
    after = words()
    eflags = changed(0x200)
    # CR0.PE: bit 0 of CR0 itself, bit 7 of the hidden flags.
    engine.set("cr0", 0x11)
    before = words()
    engine.set("cr0", 0x10)
    after = words()
    hflags, cr0 = changed(HF_PE), [i for i in changed(1) if before[i // 4] == 0x11]

    segments = {}
    for i, name in enumerate(SEGMENT_NAMES):
        selector = 0x1234 + 0x101 * i
        engine.set(name, selector)
        segments[name] = state().find(struct.pack("<I4xQ", selector, selector << 4))
    for i, name in enumerate(TABLE_NAMES):
        base = 0x5EED1000 + 0x100 * i
        engine.set_table(name, base, 0x7F)
        segments[name] = state().find(struct.pack("<QI", base, 0x7F)) - BASE

    # An exception with an error code that nobody takes: MOV DS, 28h with an empty descriptor table, in 16-bit code.
    for name in SEGMENT_NAMES:
        engine.set(name, 0)
    engine.set("cr0", 0x11)
    engine.set_table("gdtr", 0, 0)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[:7] = bytes.fromhex("b82800 8ed8 cd20")  # mov ax, 28h; mov ds, ax; int 20h
    place = ctypes.addressof(ctypes.c_char.from_buffer(page))
    engine.check(engine.lib.uc_mem_map_ptr(engine.handle, 0, 4096, unicorn.UC_PROT_ALL, place), "map a page")
    before = words()
    error = engine.start(0)
    after = words()
    engine.start(5)
    later = words()
    engine.check(engine.lib.uc_mem_unmap(engine.handle, 0, 4096), "unmap a page")
    pairs = [(4 * i, a, b) for i, (a, b) in enumerate(zip(before, after, strict=True))]
    old = [i for i, a, b in pairs if (a, b) == (0xFFFFFFFF, 13)]
    code = [i for i, a, b in pairs if a != b == 0x28 and i > eip]
    # The engine keeps "this was an INT" beside the error code.
    software = [i for i in (code[0] - 4, code[0] + 4) if (after[i // 4], later[i // 4]) == (0, 1)] if code else []
    found = (eflags, hflags, cr0, old, code, software)
    if error != unicorn.UC_ERR_EXCEPTION or any(len(f) != 1 for f in found) or min(eip, *segments.values()) < 0:
        return None
    return StateLayout(start, eip, eflags[0], hflags[0], segments, cr0[0], old[0], code[0], software[0])


class CpuRecord:
    """The engine's record of the CPU. :meth:`load` before reading, :meth:`store` after changing it."""

    def __init__(self, engine: Engine, layout: StateLayout, env: int = 0) -> None:
        """*env* is the record's address in the engine, 0 if it is not known."""
        self.layout = layout
        self._engine = engine
        self._context = None if env else Context(engine)
        self._address = env if self._context is None else self._context.address + layout.context

    def load(self) -> None:
        """Make the record current."""
        if self._context is not None:
            self._context.save()

    def store(self) -> None:
        """Make what was changed the CPU's state."""
        if self._context is not None:
            self._context.restore()

    def get(self, offset: int) -> int:
        """The 32-bit word at *offset*."""
        return ctypes.c_uint32.from_address(self._address + offset).value

    def put(self, offset: int, value: int) -> None:
        """Change the 32-bit word at *offset*."""
        ctypes.c_uint32.from_address(self._address + offset).value = value

    def general(self) -> dict[str, int]:
        """EAX to EDI."""
        return {name: self.get(8 * i) for i, name in enumerate(GENERAL)}

    def control(self, number: int) -> int:
        """Control register *number*."""
        return self.get(self.layout.cr0 + 8 * number)

    @property
    def eip(self) -> int:
        """The instruction pointer."""
        return self.get(self.layout.eip)

    @property
    def hidden(self) -> int:
        """The hidden flags."""
        return self.get(self.layout.hflags)

    @property
    def eflags(self) -> int:
        """EFLAGS, with the arithmetic flags that the engine computes only when they are asked for."""
        return self._engine.get("eflags")

    def clear_eflags(self, bits: int) -> None:
        """Clear control bits (not arithmetic flags)."""
        at = self.layout.eflags
        self.put(at, self.get(at) & ~bits)

    def accepts_interrupts(self) -> bool:
        """EFLAGS.IF is set, and the last instruction was not STI or MOV SS."""
        return bool(self.get(self.layout.eflags) & IF) and not self.hidden & HF_SHADOW

    def selector(self, name: str) -> int:
        """The visible part of a segment register, LDTR or TR."""
        return self.get(self.layout.segments[name]) & 0xFFFF

    def base(self, name: str) -> int:
        """The base of a segment or descriptor table."""
        return self.get(self.layout.segments[name] + BASE)

    def limit(self, name: str) -> int:
        """The limit of a segment or descriptor table."""
        return self.get(self.layout.segments[name] + LIMIT)

    def flags(self, name: str) -> int:
        """The attributes of a segment, as in the high word of its descriptor."""
        return self.get(self.layout.segments[name] + FLAGS)

    def set_segment(self, name: str, selector: int, base: int, limit: int, flags: int) -> None:
        """Load a segment register or descriptor table with its hidden part; the hidden flags are not adjusted."""
        data = _segment.pack(selector, base, limit, flags)
        ctypes.memmove(self._address + self.layout.segments[name], data, len(data))

    def load_segment(self, name: str, segment: Segment) -> None:
        """The same from the contract's form."""
        access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
        flags = access << 8 | segment.l << 21 | segment.db << 22 | segment.g << 23
        self.set_segment(name, segment.selector, segment.base, segment.limit, flags)

    def set_hidden_sizes(self, cpl: int) -> None:
        """Bring the hidden flags into agreement with the segment registers and *cpl*."""
        hidden = self.hidden & ~(HF_CPL | HF_SHADOW | HF_CS32 | HF_SS32 | HF_ADDSEG) | cpl
        wide = 1 << 22
        if self.flags("cs") & wide:
            hidden |= HF_CS32
        if self.flags("ss") & wide:
            hidden |= HF_SS32
        # Bases may be left out of address computations only in 32-bit protected mode with all of them zero.
        flat = not any(self.base(name) for name in ("ds", "es", "ss"))
        if not (hidden & HF_PE and hidden & HF_CS32 and flat) or self.get(self.layout.eflags) & VM:
            hidden |= HF_ADDSEG
        self.put(self.layout.hflags, hidden)

    def nested_exception(self) -> int:
        """The exception that the engine believes is being delivered, -1 for none."""
        value = self.get(self.layout.old_exception)
        return value - (1 << 32) if value >> 31 else value

    def forget_exception(self) -> None:
        """Tell the engine that the exception was delivered, or the next one would become a double fault."""
        self.put(self.layout.old_exception, 0xFFFFFFFF)

    @property
    def error_code(self) -> int:
        """The last exception's error code."""
        return self.get(self.layout.error_code)

    @property
    def is_software(self) -> bool:
        """The last exception was an INT instruction."""
        return bool(self.get(self.layout.is_software))

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
