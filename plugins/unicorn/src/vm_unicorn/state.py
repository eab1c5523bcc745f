"""The CPU's registers, hidden parts included, as the library saves them.

Theory of operation. ``uc_context_save`` and ``uc_context_restore`` copy the CPU's state to and from a block of memory in
0.4 µs each, which is what one register costs through the ordinary calls; and they carry what those calls do not give:
the error code of an exception, whether it was a software interrupt, the hidden parts of segment registers, and the
"previous exception" that is never cleared and would turn a second page fault into a double fault. The block's layout
is the library's own affair. :func:`find_layout` therefore looks for recognisable values at start and refuses a library
in which they are anywhere else than where the fields below put them.
"""

from __future__ import annotations

import ctypes
import struct

from unicorn import Uc, UcError, x86_const
from unicorn import unicorn_const as uc_const

from . import library

EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)

CR0_PE, CR0_WP, CR0_PG = 1, 1 << 16, 1 << 31
CR4_PSE, CR4_PAE = 1 << 4, 1 << 5
TF, IF, DF, NT, RF, VM, AC = 1 << 8, 1 << 9, 1 << 10, 1 << 14, 1 << 16, 1 << 17, 1 << 18

#: Summary flags kept beside EFLAGS: privilege level, interrupt shadow, code and stack width, bases in use, protection.
HF_CPL, HF_SHADOW, HF_CS32, HF_SS32, HF_ADDSEG, HF_PE = 3, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7

#: Offsets in bytes from the first register (EAX).
EIP, EFLAGS, HFLAGS = 128, 136, 176
SEGMENTS, LDT, TR, GDT, IDT = 184, 328, 352, 376, 400
CR0, CR2, CR3, CR4 = 424, 440, 448, 456
#: Offsets inside a segment register's 24 bytes.
SELECTOR, BASE, LIMIT, FLAGS = 0, 8, 16, 20


class LayoutError(Exception):
    """This version of the library keeps its registers elsewhere."""


class Context:
    """One saved state. ``load`` fills it from the engine, ``store`` puts it back; fields are read and written in place."""

    def __init__(self, engine: int) -> None:
        self._engine = engine
        library.lib.uc_context_size.restype = ctypes.c_size_t
        self.size = int(library.lib.uc_context_size(ctypes.c_void_p(engine)))
        handle = ctypes.c_void_p()
        if library.lib.uc_context_alloc(ctypes.c_void_p(engine), ctypes.byref(handle)) != library.ERR_OK:
            raise MemoryError("unicorn: no memory for a context")
        self.handle = handle.value or 0
        self.bytes = memoryview((ctypes.c_ubyte * self.size).from_address(self.handle)).cast("B")

    def load(self) -> None:
        """Copy the CPU's state in."""
        library.context_save(self._engine, self.handle)

    def store(self) -> None:
        """Make this the CPU's state."""
        library.context_restore(self._engine, self.handle)

    def close(self) -> None:
        """Free the memory."""
        if self.handle:
            library.lib.uc_context_free(ctypes.c_void_p(self.handle))
            self.handle = 0


class Layout:
    """Where things are in a context: *base* is EAX; *error_code* and *previous* were found by provoking exceptions."""

    def __init__(self, base: int, error_code: int, previous: int) -> None:
        self.base = base
        self.error_code = error_code
        #: 1 where the exception was an INT instruction.
        self.is_software = error_code + 4
        self.previous = previous


_found: Layout | None = None


def find_layout() -> Layout:
    """The layout of this library, found once. Raises LayoutError."""
    global _found
    if _found is None:
        _found = _search()
    return _found


def _search() -> Layout:
    uc = Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_32)
    engine = uc._uch.value
    context = Context(engine)
    try:
        uc.mem_map(0, 0x10000)
        # mov ax, 0x1230; mov ds, ax: a selector past the GDT's limit: #GP(0x1230)
        uc.mem_write(0x1000, bytes.fromhex("66b830128ed8"))
        # mov eax, [0x400000] with paging on and an empty page directory: #PF, code 0
        uc.mem_write(0x1100, bytes.fromhex("a100004000"))
        uc.mem_write(0x2000, struct.pack("<I", 0x3003) + bytes(4092))
        uc.mem_write(0x3000, b"".join(struct.pack("<I", (n << 12) | 3) for n in range(16)))
        values = {offset: 0x5A5A0000 + offset * 0x101 for offset in range(0, 64, 8)}
        names = ("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI")
        for name, value in zip(names, values.values(), strict=True):
            uc.reg_write(getattr(x86_const, f"UC_X86_REG_{name}"), value)
        uc.reg_write(x86_const.UC_X86_REG_CR0, 0x11)
        uc.reg_write(x86_const.UC_X86_REG_GDTR, (0, 0x7777000, 0x17, 0))
        uc.reg_write(x86_const.UC_X86_REG_IDTR, (0, 0x6666000, 0x4321, 0))
        uc.reg_write(x86_const.UC_X86_REG_TR, (0x28, 0x5555000, 0x3333, 0x8B00))
        uc.reg_write(x86_const.UC_X86_REG_CR3, 0x2000)
        uc.ctl_exits_enabled(True)
        uc.hook_add(uc_const.UC_HOOK_INTR, lambda u, number, data: u.emu_stop())
        context.load()
        base = bytes(context.bytes).find(struct.pack("<Q", values[0]))
        checks = {o: ("<Q", v) for o, v in values.items()} | {
            GDT + BASE: ("<Q", 0x7777000), GDT + LIMIT: ("<I", 0x17),
            IDT + BASE: ("<Q", 0x6666000), IDT + LIMIT: ("<I", 0x4321),
            TR + SELECTOR: ("<I", 0x28), TR + BASE: ("<Q", 0x5555000), TR + LIMIT: ("<I", 0x3333),
            CR0: ("<Q", 0x11), CR3: ("<Q", 0x2000),
        }  # fmt: skip
        if base < 0:
            raise LayoutError
        for offset, (form, value) in checks.items():
            if struct.unpack_from(form, context.bytes, base + offset)[0] != value:
                raise LayoutError
        before = bytes(context.bytes)
        uc.emu_start(0x1000, 0xFFFFFFFF)
        context.load()
        after = bytes(context.bytes)
        gp = [o for o in range(base, len(after) - 3, 4) if after[o : o + 4] == struct.pack("<I", 0x1230)]
        gp = [o for o in gp if before[o : o + 4] != after[o : o + 4] and o > base + CR4]
        thirteen = [o for o in range(base + CR4, len(after) - 3, 4)
                    if after[o : o + 4] == b"\x0d\0\0\0" and before[o : o + 4] == b"\xff\xff\xff\xff"]  # fmt: skip
        if len(gp) != 1 or len(thirteen) != 1:
            raise LayoutError
        layout = Layout(base, gp[0], thirteen[0])
        struct.pack_into("<i", context.bytes, layout.previous, -1)
        context.store()
        uc.reg_write(x86_const.UC_X86_REG_CR0, 0x11 | CR0_PG)
        uc.emu_start(0x1100, 0xFFFFFFFF)
        context.load()
        if struct.unpack_from("<i", context.bytes, layout.previous)[0] != 14:
            raise LayoutError
        if struct.unpack_from("<Q", context.bytes, base + CR2)[0] != 0x400000:
            raise LayoutError
        return layout
    except UcError as error:
        raise LayoutError(str(error)) from error
    finally:
        context.close()
