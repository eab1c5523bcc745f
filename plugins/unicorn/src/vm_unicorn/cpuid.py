"""What CPUID tells the guest: the engine's model, less what this machine does not have."""

from __future__ import annotations

from collections.abc import Callable

import unicorn
from unicorn import x86_const as x86

from .engine import INSN_CALLBACK, Engine, RegisterBatch

#: Leaf 1, EDX: machine-check exceptions and banks, which nothing here raises; SYSENTER, which the engine only hands
#: to a hook (guests fall back to INT, which costs no Python).
_EDX_MCE, _EDX_APIC, _EDX_SEP, _EDX_MCA = 1 << 7, 1 << 9, 1 << 11, 1 << 14
#: Leaf 1, ECX: MONITOR/MWAIT, with which an idle guest would spin.
_ECX_MONITOR = 1 << 3


class Cpuid:
    """Answers leaf 1 in place of the engine."""

    def __init__(self, engine: Engine, has_apic: Callable[[], bool], leaf1: tuple[int, int, int, int]) -> None:
        """*leaf1* is what the engine would answer; *has_apic*: a local APIC is mapped."""
        leaf = RegisterBatch(engine, ("eax",))
        answer = RegisterBatch(engine, ("eax", "ebx", "ecx", "edx"))

        def cpuid(_engine: int, _user: int) -> int:
            if leaf.read()[0] & 0xFFFFFFFF != 1:
                return 0
            eax, ebx, ecx, edx = leaf1
            edx &= ~(_EDX_MCE | _EDX_MCA | _EDX_SEP | _EDX_APIC)
            if has_apic():
                edx |= _EDX_APIC
            answer.write(eax, ebx, ecx & ~_ECX_MONITOR, edx)
            return 1

        self._callback = INSN_CALLBACK(cpuid)
        engine.hook(unicorn.UC_HOOK_INSN, self._callback, 0, x86.UC_X86_INS_CPUID)
