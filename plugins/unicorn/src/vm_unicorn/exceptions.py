"""Delivery of exceptions and interrupts: what the processor does between an event and its handler's first instruction.

Source: Intel SDM vol. 3, chapter 6 (protected mode) and 20.1.4 (real mode). The library stops at every exception and
every INT instruction and leaves the rest to its user.
"""

from __future__ import annotations

import struct

from .paging import LinearMemory, NotMapped
from .state import (
    AC,
    BASE,
    CR0,
    CR0_PE,
    CR3,
    CR4,
    CS,
    DS,
    EFLAGS,
    EIP,
    ES,
    ESP,
    FLAGS,
    FS,
    GDT,
    GS,
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_SHADOW,
    HF_SS32,
    HFLAGS,
    IDT,
    IF,
    LDT,
    LIMIT,
    NT,
    RF,
    SEGMENTS,
    SELECTOR,
    SS,
    TF,
    TR,
    VM,
    Context,
    Layout,
)

DE, DB, UD, DF, TS, NP, SS_FAULT, GP, PF, AC_FAULT = 0, 1, 6, 8, 10, 11, 12, 13, 14, 17
#: Exceptions that push an error code.
WITH_CODE = frozenset((DF, TS, NP, SS_FAULT, GP, PF, AC_FAULT))
#: Two of these in a row are a double fault (table 6-5).
CONTRIBUTORY = frozenset((DE, TS, NP, SS_FAULT, GP))

_u32 = struct.Struct("<I")
_u64 = struct.Struct("<Q")
_cache = struct.Struct("<IIQII")  # one segment register: selector, padding, base, limit, flags


class TripleFault(Exception):  # noqa: N818 - the processor shuts down; the machine resets
    """An exception while delivering a double fault."""


class _FaultError(Exception):
    """Another exception on the way."""

    def __init__(self, vector: int, code: int) -> None:
        super().__init__(vector, code)
        self.vector = vector
        self.code = code


class Delivery:
    """Delivers events into the state held by a context. The caller loads the context first and stores it after."""

    def __init__(self, context: Context, layout: Layout, linear: LinearMemory) -> None:
        self._context = context
        self._bytes = context.bytes
        self._base = layout.base
        self._linear = linear

    def _get(self, offset: int) -> int:
        return int(_u32.unpack_from(self._bytes, self._base + offset)[0])

    def _put(self, offset: int, value: int) -> None:
        _u64.pack_into(self._bytes, self._base + offset, value & 0xFFFFFFFF)

    def deliver(self, vector: int, code: int | None, eflags: int, *, software: bool = False) -> None:
        """Enter the handler of *vector*; *eflags* is the full register. Raises TripleFault."""
        linear = self._linear
        linear.cr0, linear.cr3, linear.cr4 = self._get(CR0), self._get(CR3), self._get(CR4)
        while True:
            try:
                if linear.cr0 & CR0_PE:
                    self._protected(vector, code, eflags, software)
                else:
                    self._real(vector, eflags)
                return
            except (NotMapped, _FaultError) as fault:
                second, second_code = (fault.vector, fault.code) if isinstance(fault, _FaultError) else (PF, 0)
                if vector == DF:
                    raise TripleFault from fault
                first_bad = vector in CONTRIBUTORY or vector == PF
                if first_bad and not software and (second in CONTRIBUTORY or second == PF):
                    vector, code, software = DF, 0, False
                else:
                    vector, code, software = second, second_code, False

    def _real(self, vector: int, eflags: int) -> None:
        """Through the interrupt vector table: push FLAGS, CS, IP."""
        linear = self._linear
        base, limit = self._get(IDT + BASE), self._get(IDT + LIMIT)
        if vector * 4 + 3 > limit:
            raise _FaultError(GP, 0)
        ip, selector = struct.unpack("<HH", linear.read(base + vector * 4, 4))
        cs = SEGMENTS + 24 * CS
        sp = (self._get(8 * ESP) - 6) & 0xFFFF
        frame = struct.pack("<HHH", self._get(EIP) & 0xFFFF, self._get(cs) & 0xFFFF, eflags & 0xFFFF)
        linear.write(self._get(SEGMENTS + 24 * SS + BASE) + sp, frame)
        self._put(8 * ESP, (self._get(8 * ESP) & 0xFFFF0000) | sp)
        self._put(EIP, ip)
        self._put(EFLAGS, self._get(EFLAGS) & ~(IF | TF | AC | RF))
        _u32.pack_into(self._bytes, self._base + cs, selector)
        self._put(cs + BASE, selector << 4)
        self._flags(self._get(HFLAGS) & ~HF_SHADOW)

    def _flags(self, hflags: int) -> None:
        _u32.pack_into(self._bytes, self._base + HFLAGS, hflags)

    def _descriptor(self, selector: int, fault: int) -> tuple[int, int]:
        """The two words of a descriptor; *fault* is raised with the selector if there is none."""
        table = LDT if selector & 4 else GDT
        at = selector & 0xFFF8
        if not selector & 0xFFFC or at + 7 > self._get(table + LIMIT):
            raise _FaultError(fault, selector & 0xFFFC)
        low, high = struct.unpack("<II", self._linear.read(self._get(table + BASE) + at, 8))
        return low, high

    def _protected(self, vector: int, code: int | None, eflags: int, software: bool) -> None:
        """Through the interrupt descriptor table: switch the stack if the privilege changes, push the frame."""
        linear = self._linear
        external = 0 if software else 1
        if vector * 8 + 7 > self._get(IDT + LIMIT):
            raise _FaultError(GP, vector * 8 + 2 + external)
        low, high = struct.unpack("<II", linear.read(self._get(IDT + BASE) + vector * 8, 8))
        kind = high >> 8 & 0x1F
        hflags = self._get(HFLAGS)
        cpl = 3 if eflags & VM else hflags & HF_CPL
        if kind not in (0x06, 0x07, 0x0E, 0x0F):  # 5: task gates, which no 32-bit kernel uses but for #DF
            raise _FaultError(GP, vector * 8 + 2 + external)
        if software and (high >> 13 & 3) < cpl:
            raise _FaultError(GP, vector * 8 + 2)
        if not high & 0x8000:
            raise _FaultError(NP, vector * 8 + 2 + external)
        wide = kind & 8
        target = (high & 0xFFFF0000 | low & 0xFFFF) if wide else low & 0xFFFF
        selector = low >> 16
        code_low, code_high = self._descriptor(selector, GP)
        dpl = code_high >> 13 & 3
        if code_high & 0x1800 != 0x1800 or dpl > cpl:
            raise _FaultError(GP, selector & 0xFFFC)
        if not code_high & 0x8000:
            raise _FaultError(NP, selector & 0xFFFC)
        conforming = code_high & 0x400
        esp = self._get(8 * ESP)
        stack = SEGMENTS + 24 * SS
        frame = []
        if not conforming and dpl < cpl:
            if eflags & VM and dpl:
                raise _FaultError(GP, selector & 0xFFFC)
            new_ss, new_esp = self._inner_stack(dpl)
            ss_low, ss_high = self._descriptor(new_ss, TS)
            if (ss_high >> 13 & 3) != dpl or ss_high & 0x1A00 != 0x1200:
                raise _FaultError(TS, new_ss & 0xFFFC)
            if eflags & VM:
                frame = [self._get(SEGMENTS + 24 * s) for s in (GS, FS, DS, ES)]
            frame += [self._get(stack), esp]
            stack_base, stack_wide, esp = _base(ss_low, ss_high), ss_high & 1 << 22, new_esp
        elif conforming or dpl == cpl:
            if eflags & VM:
                raise _FaultError(GP, selector & 0xFFFC)
            new_ss = None
            stack_base, stack_wide = self._get(stack + BASE), hflags & HF_SS32
            dpl = cpl
        else:
            raise _FaultError(GP, selector & 0xFFFC)
        frame += [eflags, self._get(SEGMENTS + 24 * CS), self._get(EIP)]
        if code is not None:
            frame.append(code)
        frame.reverse()
        size = len(frame) * (4 if wide else 2)
        mask = 0xFFFFFFFF if stack_wide else 0xFFFF
        top = (esp - size) & mask
        packed = struct.pack(f"<{len(frame)}{'I' if wide else 'H'}", *(w if wide else w & 0xFFFF for w in frame))
        linear.write((stack_base + top) & 0xFFFFFFFF, packed)
        # Nothing can fail from here on.
        self._put(8 * ESP, esp & ~mask | top)
        if new_ss is not None:
            if eflags & VM:
                for s in (ES, DS, FS, GS):
                    _cache.pack_into(self._bytes, self._base + SEGMENTS + 24 * s, 0, 0, 0, 0, 0)
            new_ss = new_ss & ~3 | dpl
            _cache.pack_into(self._bytes, self._base + stack, new_ss, 0, stack_base, _limit(ss_low, ss_high), ss_high)
        _cache.pack_into(
            self._bytes, self._base + SEGMENTS + 24 * CS,
            selector & ~3 | dpl, 0, _base(code_low, code_high), _limit(code_low, code_high), code_high,
        )  # fmt: skip
        self._put(EIP, target)
        gone = TF | VM | RF | NT | (0 if kind & 1 else IF)
        self._put(EFLAGS, self._get(EFLAGS) & ~gone)
        hflags = hflags & ~(HF_CPL | HF_SHADOW | HF_CS32 | HF_SS32 | HF_ADDSEG) | dpl
        if code_high & 1 << 22:
            hflags |= HF_CS32
        if stack_wide:
            hflags |= HF_SS32
        if not hflags & HF_CS32 or any(self._get(SEGMENTS + 24 * s + BASE) for s in (DS, ES, SS)):
            hflags |= HF_ADDSEG
        self._flags(hflags)

    def _inner_stack(self, dpl: int) -> tuple[int, int]:
        """SS and ESP for privilege level *dpl* from the task state segment."""
        flags = self._get(TR + FLAGS)
        base, limit = self._get(TR + BASE), self._get(TR + LIMIT)
        if flags & 0x800:
            at = 4 + 8 * dpl
            if at + 7 > limit:
                raise _FaultError(TS, self._get(TR + SELECTOR) & 0xFFFC)
            esp, ss = struct.unpack("<II", self._linear.read(base + at, 8))
        else:
            at = 2 + 4 * dpl
            if at + 3 > limit:
                raise _FaultError(TS, self._get(TR + SELECTOR) & 0xFFFC)
            esp, ss = struct.unpack("<HH", self._linear.read(base + at, 4))
        return ss & 0xFFFF, esp


def _base(low: int, high: int) -> int:
    return low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000


def _limit(low: int, high: int) -> int:
    limit = low & 0xFFFF | high & 0xF0000
    return limit << 12 | 0xFFF if high & 1 << 23 else limit
