"""Delivery of exceptions and interrupts: what the processor does between an event and its handler's first instruction.

Source: Intel SDM vol. 3, chapter 6 (protected mode) and 20.1.4 (real mode). The engine stops at every exception and
every INT instruction and leaves the rest to its user. Where the engine's own code for it can be called (see
:mod:`.native`) this module is not used.
"""

from __future__ import annotations

import struct

from .paging import LinearMemory, NotMapped
from .state import AC, IF, NT, RF, TF, VM, CpuRecord

DE, BP, OF, UD, DF, TS, NP, SS_FAULT, GP, PF, AC_FAULT = 0, 3, 4, 6, 8, 10, 11, 12, 13, 14, 17
#: Exceptions that push an error code.
WITH_CODE = frozenset((DF, TS, NP, SS_FAULT, GP, PF, AC_FAULT))
#: Two of these in a row are a double fault (table 6-5).
CONTRIBUTORY = frozenset((DE, TS, NP, SS_FAULT, GP))


class TripleFault(Exception):  # noqa: N818 - the processor shuts down; the machine resets
    """An exception while delivering a double fault."""


class _FaultError(Exception):
    """Another exception on the way."""

    def __init__(self, vector: int, code: int) -> None:
        super().__init__(vector, code)
        self.vector = vector
        self.code = code


class Delivery:
    """Delivers events into a CPU's record. The caller loads the record first and stores it after."""

    def __init__(self, cpu: CpuRecord, linear: LinearMemory) -> None:
        self._cpu = cpu
        self._linear = linear

    def deliver(self, vector: int, code: int | None, *, software: bool = False) -> None:
        """Enter the handler of *vector* with error code *code*; *software*: an INT instruction. Raises TripleFault."""
        cpu, linear = self._cpu, self._linear
        linear.cr0, linear.cr3, linear.cr4 = cpu.control(0), cpu.control(3), cpu.control(4)
        while True:
            try:
                if linear.cr0 & 1:
                    self._protected(vector, code, software)
                else:
                    self._real(vector)
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

    def _real(self, vector: int) -> None:
        """Through the interrupt vector table: push FLAGS, CS, IP."""
        cpu, linear, layout = self._cpu, self._linear, self._cpu.layout
        if vector * 4 + 3 > cpu.limit("idtr"):
            raise _FaultError(GP, 0)
        ip, selector = struct.unpack("<HH", linear.read(cpu.base("idtr") + vector * 4, 4))
        esp = cpu.get(layout.esp)
        sp = (esp - 6) & 0xFFFF
        frame = struct.pack("<HHH", cpu.eip & 0xFFFF, cpu.selector("cs"), cpu.eflags & 0xFFFF)
        linear.write(cpu.base("ss") + sp, frame)
        cpu.put(layout.esp, (esp & 0xFFFF0000) | sp)
        cpu.put(layout.eip, ip)
        cpu.clear_eflags(IF | TF | AC | RF)
        cpu.set_segment("cs", selector, selector << 4, cpu.limit("cs"), cpu.flags("cs"))
        cpu.set_hidden_sizes(0)

    def _descriptor(self, selector: int, fault: int) -> tuple[int, int]:
        """The two words of a descriptor; *fault* is raised with the selector if there is none."""
        table = "ldtr" if selector & 4 else "gdtr"
        at = selector & 0xFFF8
        if not selector & 0xFFFC or at + 7 > self._cpu.limit(table):
            raise _FaultError(fault, selector & 0xFFFC)
        low, high = struct.unpack("<II", self._linear.read(self._cpu.base(table) + at, 8))
        return low, high

    def _protected(self, vector: int, code: int | None, software: bool) -> None:
        """Through the interrupt descriptor table: switch the stack if the privilege changes, push the frame."""
        cpu, linear, layout = self._cpu, self._linear, self._cpu.layout
        eflags = cpu.eflags
        external = 0 if software else 1
        if vector * 8 + 7 > cpu.limit("idtr"):
            raise _FaultError(GP, vector * 8 + 2 + external)
        low, high = struct.unpack("<II", linear.read(cpu.base("idtr") + vector * 8, 8))
        kind = high >> 8 & 0x1F
        cpl = 3 if eflags & VM else cpu.hidden & 3
        if kind not in (0x06, 0x07, 0x0E, 0x0F):  # 5, a task gate, is used for double faults at most
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
        esp = cpu.get(layout.esp)
        frame = []
        new_stack = None
        if not code_high & 0x400 and dpl < cpl:
            if eflags & VM and dpl:
                raise _FaultError(GP, selector & 0xFFFC)
            new_ss, new_esp = self._inner_stack(dpl)
            ss_low, ss_high = self._descriptor(new_ss, TS)
            if (ss_high >> 13 & 3) != dpl or ss_high & 0x9A00 != 0x9200:
                raise _FaultError(TS, new_ss & 0xFFFC)
            if eflags & VM:
                frame = [cpu.selector(s) for s in ("gs", "fs", "ds", "es")]
            frame += [cpu.selector("ss"), esp]
            stack_base, stack_flags, esp = _base(ss_low, ss_high), ss_high, new_esp
            new_stack = (new_ss & ~3 | dpl, stack_base, _limit(ss_low, ss_high), ss_high)
        else:
            if eflags & VM:
                raise _FaultError(GP, selector & 0xFFFC)
            stack_base, stack_flags = cpu.base("ss"), cpu.flags("ss")
            dpl = cpl
        frame += [eflags, cpu.selector("cs"), cpu.eip]
        if code is not None:
            frame.append(code)
        frame.reverse()
        size = len(frame) * (4 if wide else 2)
        mask = 0xFFFFFFFF if stack_flags & 1 << 22 else 0xFFFF
        top = (esp - size) & mask
        packed = struct.pack(f"<{len(frame)}{'I' if wide else 'H'}", *(w if wide else w & 0xFFFF for w in frame))
        linear.write((stack_base + top) & 0xFFFFFFFF, packed)
        # Nothing can fail from here on.
        cpu.put(layout.esp, esp & ~mask | top)
        if eflags & VM:
            for name in ("es", "ds", "fs", "gs"):
                cpu.set_segment(name, 0, 0, 0, 0)
        if new_stack is not None:
            cpu.set_segment("ss", *new_stack)
        cpu.set_segment("cs", selector & ~3 | dpl, _base(code_low, code_high), _limit(code_low, code_high), code_high)
        cpu.put(layout.eip, target)
        cpu.clear_eflags(TF | VM | RF | NT | (0 if kind & 1 else IF))
        cpu.set_hidden_sizes(dpl)

    def _inner_stack(self, dpl: int) -> tuple[int, int]:
        """SS and ESP for privilege level *dpl* from the task state segment."""
        cpu = self._cpu
        base, limit = cpu.base("tr"), cpu.limit("tr")
        at, form, size = (4 + 8 * dpl, "<II", 8) if cpu.flags("tr") & 0x800 else (2 + 4 * dpl, "<HH", 4)
        if at + size - 1 > limit:
            raise _FaultError(TS, cpu.selector("tr") & 0xFFFC)
        esp, ss = struct.unpack(form, self._linear.read(base + at, size))
        return ss & 0xFFFF, esp


def _base(low: int, high: int) -> int:
    return low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000


def _limit(low: int, high: int) -> int:
    limit = low & 0xFFFF | high & 0xF0000
    return limit << 12 | 0xFFF if high & 1 << 23 else limit
