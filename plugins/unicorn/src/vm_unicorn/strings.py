"""REP INS and REP OUTS as one transfer.

The library calls back for every item of a string instruction. A disk read by PIO is 256 items a sector, so where the
port's handler takes blocks, the first item's callback looks at the instruction, moves all items at once, and sets the
registers so that the library's own last step finishes the instruction: it stores (or has loaded) the first item, moves
the index register by one item and counts down to zero.
"""

from __future__ import annotations

import ctypes
import struct

from unicorn import x86_const

from vm_core.machine.ports import PortSpace

from . import library
from .paging import LinearMemory, NotMapped
from .state import (
    BASE,
    CR0,
    CR3,
    CR4,
    CS,
    DS,
    ECX,
    EDI,
    EIP,
    ES,
    ESI,
    FS,
    GS,
    HF_CPL,
    HF_CS32,
    HFLAGS,
    SEGMENTS,
    SS,
    Context,
    Layout,
)

_DIRECTION = 172
_OVERRIDES = {0x26: ES, 0x2E: CS, 0x36: SS, 0x3E: DS, 0x64: FS, 0x65: GS}
_u32 = struct.Struct("<I")


class StringMoves:
    """Takes over string instructions of one engine. *context* is its own scratch state."""

    def __init__(self, engine: int, context: Context, layout: Layout, linear: LinearMemory) -> None:
        self._engine = engine
        self.context = context
        self._base = layout.base
        self._linear = linear
        self._value = ctypes.c_uint64()
        self._value_at = ctypes.addressof(self._value)

    def _get(self, offset: int) -> int:
        return int(_u32.unpack_from(self.context.bytes, self._base + offset)[0])

    def _set(self, register: int, value: int) -> None:
        self._value.value = value
        library.reg_write(self._engine, register, self._value_at)

    def _look(self, opcodes: tuple[int, int]) -> tuple[int, int, int] | None:
        """(items left, address mask, segment) of the REP instruction at EIP if it may be taken over."""
        self.context.load()
        hflags = self._get(HFLAGS)
        if hflags & HF_CPL or self._get(_DIRECTION) != 1:
            return None
        linear = self._linear
        linear.cr0, linear.cr3, linear.cr4 = self._get(CR0), self._get(CR3), self._get(CR4)
        try:
            code = linear.read(self._get(SEGMENTS + 24 * CS + BASE) + self._get(EIP), 5)
        except NotMapped:
            return None
        repeated, wide, segment = False, bool(hflags & HF_CS32), DS
        for byte in code:
            if byte in (0xF2, 0xF3):
                repeated = True
            elif byte == 0x67:
                wide = not wide
            elif byte in _OVERRIDES:
                segment = _OVERRIDES[byte]
            elif byte != 0x66:
                break
        if not repeated or byte not in opcodes:
            return None
        mask = 0xFFFFFFFF if wide else 0xFFFF
        return self._get(8 * ECX) & mask, mask, segment

    def _advance(self, count: int, mask: int, index: int, register: int, step: int) -> None:
        """Leave one item to the library."""
        ecx = self._get(8 * ECX)
        self._set(x86_const.UC_X86_REG_ECX, ecx & ~mask | 1)
        old = self._get(8 * index)
        self._set(register, old & ~mask | (old + step * (count - 1)) & mask)

    def read(self, ports: PortSpace, port: int, size: int) -> int | None:
        """Do a REP INS if there is one; returns the first item, or None if the access is to be made singly."""
        found = self._look((0x6C, 0x6D))
        if found is None:
            return None
        count, mask, _ = found
        offset = self._get(8 * EDI) & mask
        if count < 2 or offset + count * size > mask + 1:
            return None
        try:
            runs = self._linear.runs(self._get(SEGMENTS + 24 * ES + BASE) + offset, count * size)
            for address, _ in runs:
                self._linear.place(address)
        except NotMapped:
            return None
        data = ports.read_block(port, size, count)
        at = 0
        for address, length in runs:
            library.mem_write(self._engine, address, data[at : at + length], length)
            at += length
        self._advance(count, mask, EDI, x86_const.UC_X86_REG_EDI, size)
        return int.from_bytes(data[:size], "little")

    def write(self, ports: PortSpace, port: int, size: int, value: int) -> bool:
        """Do a REP OUTS if there is one; *value* is its first item."""
        found = self._look((0x6E, 0x6F))
        if found is None:
            return False
        count, mask, segment = found
        offset = self._get(8 * ESI) & mask
        if count < 2 or offset + count * size > mask + 1:
            return False
        try:
            data = self._linear.read(self._get(SEGMENTS + 24 * segment + BASE) + offset, count * size)
        except NotMapped:
            return False
        ports.write_block(port, size, data)
        self._advance(count, mask, ESI, x86_const.UC_X86_REG_ESI, size)
        return True
