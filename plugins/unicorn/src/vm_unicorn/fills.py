"""Fast stores: which pages of the translation cache's software TLB need a look at every store.

Theory of operation. The engine must notice a store into code that it has translated. It marks every writable page in
its TLB as "not dirty", which sends each store to such a page through a slow path of some 70 ns, and takes the mark away
only where the page cannot be executed; but 32-bit paging without extensions has no such pages, so an i386 kernel would
store at 15 million words a second. What really needs the slow path are the pages that code was translated from.

So the engine's TLB-fill function is called through a wrapper of ours, in machine code, which keeps a bitmap of the
physical pages that instructions were fetched from. A fill for data of a page that is not in it yields an entry that
cannot be executed and has no mark: stores are at full speed. A fill for an instruction fetch puts the page into the
bitmap and, if it was not there, has the engine mark all entries of that page again. A page that is both stays slow, and
right. Whoever drops all translations empties the bitmap and the TLB with them.

The wrapper is put in by changing one pointer of the CPU's class record, and only after the TLB has been found to look
as it must (:func:`install`): where anything differs, stores are slow and that is all.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import struct

import unicorn

from .engine import Engine
from .native import CODE_PAGES, DO_FILL, DO_RESET_DIRTY, PAGES, Control, Internals
from .state import SEGMENT_NAMES

# Flags in the low bits of a TLB entry's write address: stores take the slow path to look for translated code.
_NOT_DIRTY = 0x400
#: Where a mode's TLB is described: its size as a mask of bytes, and its address. Modes are 16 bytes apart.
_MASK_BEFORE_ENV, _TABLE_BEFORE_ENV, _MODES = 0x40, 0x38, 3
#: An entry: addresses for reading, writing and fetching, the physical page, and what to add to get the host's address.
_ENTRY = struct.Struct("<QQQQQ24x")

# fill(rdi cpu, rsi address, edx size, ecx access, r8d mode, r9d probe, [rsp + 8] return address) -> al
_BEFORE_CONTROL = bytes.fromhex(
    "55"  #        push rbp
    "4889e5"  #        mov rbp,rsp
    "53"  #        push rbx
    "4154"  #        push r12
    "4155"  #        push r13
    "4156"  #        push r14
)
_MOV_R14 = bytes.fromhex("49be")  # movabs r14, control
_AFTER_CONTROL = bytes.fromhex(
    "4889f3"  #        mov rbx,rsi
    "4189cc"  #        mov r12d,ecx
    "4589c5"  #        mov r13d,r8d
    "4883ec08"  #        sub rsp,0x8
    "ff7510"  #        push [rbp+0x10]
    "41ff5658"  #        call [r14 + DO_FILL]
    "4883c410"  #        add rsp,0x10
    "84c0"  #        test al,al
    "745a"  #        je out
    "49c1e504"  #        shl r13,0x4
    "4d036e20"  #        add r13,[r14 + ENV]
    "4989d9"  #        mov r9,rbx
    "49c1e90c"  #        shr r9,0xc
    "4d8b55c0"  #        mov r10,[r13-0x40]
    "49c1ea06"  #        shr r10,0x6
    "4d21ca"  #        and r10,r9
    "49c1e206"  #        shl r10,0x6
    "4d0355c8"  #        add r10,[r13-0x38]
    "4d8b5a18"  #        mov r11,[r10+0x18]
    "49c1eb0c"  #        shr r11,0xc
    "4d3b5e70"  #        cmp r11,[r14 + PAGES]
    "732a"  #        jae out
    "498b5668"  #        mov rdx,[r14 + CODE_PAGES]
    "4183fc02"  #        cmp r12d,0x2
    "7429"  #        je fetch
    "4c0fa31a"  #        bt [rdx],r11
    "721a"  #        jc out
    "49c74210ffffffff"  #        mov [r10+0x10],0xffffffffffffffff
    "41f74208400a0000"  #        test dword [r10+0x8],0xa40
    "7508"  #        jne out
    "49816208fffbffff"  #        and [r10+0x8],0xfffffffffffffbff
    "415e"  #   out: pop r14
    "415d"  #        pop r13
    "415c"  #        pop r12
    "5b"  #        pop rbx
    "5d"  #        pop rbp
    "c3"  #        ret
    "4c0fab1a"  # fetch: bts [rdx],r11
    "72f1"  #        jc out
    "4889c3"  #        mov rbx,rax
    "498b7e28"  #        mov rdi,[r14 + CPU]
    "4c89ce"  #        mov rsi,r9
    "48c1e60c"  #        shl rsi,0xc
    "49037220"  #        add rsi,[r10+0x20]
    "ba00100000"  #        mov edx,0x1000
    "41ff5660"  #        call [r14 + DO_RESET_DIRTY]
    "4889d8"  #        mov rax,rbx
    "ebd1"  #        jmp out
)


def _readable(maps: str = "/proc/self/maps") -> list[tuple[int, int]]:
    """Ranges of this process's writable memory."""
    found = []
    with open(maps, encoding="ascii", errors="replace") as file:
        for line in file:
            span, rights = line.split(maxsplit=2)[:2]
            if rights.startswith("rw"):
                low, high = span.split("-")
                found.append((int(low, 16), int(high, 16)))
    return found


def _find_slot(internals: Internals, function: int) -> int:
    """The place of the pointer to *function* in the CPU's class record; 0 if it is not found.

    The CPU object holds the record's address; which of its words that is, is found by looking behind each of them.
    """
    ranges = _readable()
    starts = [low for low, _ in ranges]
    pattern = struct.pack("<Q", function)
    for (word,) in struct.iter_unpack("<Q", ctypes.string_at(internals.cpu, (internals.env - internals.cpu) & ~7)):
        i = bisect.bisect_right(starts, word) - 1
        if word % 8 or i < 0 or word >= ranges[i][1]:
            continue
        # The record is a table of functions; the object itself, to which words may point as well, is not searched.
        length = min(0x200, ranges[i][1] - word)
        at = ctypes.string_at(word, length).find(pattern)
        if at >= 0 and at % 8 == 0:
            return int(word + at)
    return 0


def _looks_right(engine: Engine, internals: Internals) -> bool:
    """A store from a page into itself leaves the TLB entry that the wrapper will count on."""
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[:4] = bytes.fromhex("a30058 f4")  # mov [5800h], ax; hlt
    host = ctypes.addressof(ctypes.c_char.from_buffer(page))
    engine.check(engine.lib.uc_mem_map_ptr(engine.handle, 0x5000, 4096, unicorn.UC_PROT_ALL, host), "map a page")
    try:
        engine.set("cr0", 0x10)
        for name in SEGMENT_NAMES:
            engine.set(name, 0)
        engine.check(engine.start(0x5000), "run a store")
        for mode in range(_MODES):
            mask, table = (
                ctypes.c_uint64.from_address(internals.env + 16 * mode - before).value
                for before in (_MASK_BEFORE_ENV, _TABLE_BEFORE_ENV)
            )
            index = 5 & mask >> 6
            if mask & 0x3F or mask >> 32:
                return False
            entry = _ENTRY.unpack(ctypes.string_at(table + _ENTRY.size * index, _ENTRY.size))
            if entry == (0x5000, 0x5000 | _NOT_DIRTY, 0x5000, 0x5000, host - 0x5000):
                return True
        return False
    finally:
        engine.check(engine.lib.uc_mem_unmap(engine.handle, 0x5000, 4096), "unmap a page")


class FastStores:
    """The wrapper and its bitmap, for physical memory up to *top*."""

    def __init__(self, control: Control, slot: int, original: int, reset_dirty: int, top: int) -> None:
        pages = -(-top // 4096)
        self._size = pages // 8 + 8
        self._bitmap = mmap.mmap(-1, self._size)
        bitmap = self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._bitmap))
        for offset, value in (
            (DO_FILL, original),
            (DO_RESET_DIRTY, reset_dirty),
            (CODE_PAGES, bitmap),
            (PAGES, pages),
        ):
            control.set_pointer(offset, value)
        place = control.add_code(_BEFORE_CONTROL + _MOV_R14 + struct.pack("<Q", control.address) + _AFTER_CONTROL)
        ctypes.c_uint64.from_address(slot).value = place

    def forget(self) -> None:
        """All translations are gone; the caller empties the TLB too."""
        ctypes.memset(self._address, 0, self._size)

    def keep_slow(self, start: int, size: int) -> None:
        """Physical pages whose stores the engine must see in any case: its check of ROM is in the slow path as well."""
        for page in range(start >> 12, (start + size) >> 12):
            if page >> 3 < self._size:
                self._bitmap[page >> 3] |= 1 << (page & 7)


def install(engine: Engine, control: Control, internals: Internals, top: int) -> FastStores | None:
    """Put the wrapper in, if everything is as it must be. The engine has no memory mapped; registers are changed."""
    original = engine.address_of("x86_cpu_tlb_fill_x86_64")
    reset_dirty = engine.address_of("tlb_reset_dirty_x86_64")
    if not control.is_x86 or not original or not reset_dirty:
        return None
    slot = 0
    with contextlib.suppress(OSError):  # no /proc
        slot = _find_slot(internals, original)
    if not slot or not _looks_right(engine, internals):
        return None
    return FastStores(control, slot, original, reset_dirty, top)
