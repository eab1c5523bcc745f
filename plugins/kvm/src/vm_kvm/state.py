"""A vCPU's state as KVM keeps it: saved when new, put back at a reset.

Theory of operation. What a processor is after RESET (Intel SDM vol. 3, table 10-1) is what KVM gives a new vCPU. So all
of a new vCPU's state is read once, and a reset writes it back, with the registers of the machine's ``CpuState`` on
top. That includes the MSRs through which a guest tells the kernel to write into its memory (kvm-clock, steal time,
page-fault notes), which must not outlive the guest kernel that set them up.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import Final, NamedTuple

from vm_core.machine.accel import CpuState, Segment

from . import abi
from .syscall import ioctl

_IA32_TSC: Final = 0x10


class _Part(NamedTuple):
    name: str
    get: int
    set: int
    size: int


#: In the order in which they are put back: special registers first, for they say whether there is a local APIC; pending
#: events and the multiprocessing state last, for the others may disturb them.
_BEFORE_MSRS: Final = (
    _Part("sregs", abi.GET_SREGS, abi.SET_SREGS, ctypes.sizeof(abi.Sregs)),
    _Part("fpu", abi.GET_FPU, abi.SET_FPU, abi.FPU_SIZE),
    _Part("xcrs", abi.GET_XCRS, abi.SET_XCRS, abi.XCRS_SIZE),
    _Part("debugregs", abi.GET_DEBUGREGS, abi.SET_DEBUGREGS, abi.DEBUGREGS_SIZE),
)
_AFTER_MSRS: Final = (
    _Part("lapic", abi.GET_LAPIC, abi.SET_LAPIC, abi.LAPIC_SIZE),
    _Part("regs", abi.GET_REGS, abi.SET_REGS, ctypes.sizeof(abi.Regs)),
    _Part("events", abi.GET_VCPU_EVENTS, abi.SET_VCPU_EVENTS, abi.VCPU_EVENTS_SIZE),
    _Part("mp_state", abi.GET_MP_STATE, abi.SET_MP_STATE, abi.MP_STATE_SIZE),
)


class SavedState:
    """All state of vCPU *vcpu* at one moment; *msrs* are the numbers of the MSRs that make part of it."""

    def __init__(self, vcpu: int, msrs: Sequence[int]) -> None:
        self._parts: dict[str, bytes] = {}
        for part in (*_BEFORE_MSRS, *_AFTER_MSRS):
            buffer = ctypes.create_string_buffer(part.size)
            try:
                ioctl(vcpu, part.get, buffer)
            except OSError as e:
                if part.name != "xcrs" or e.errno != errno.EINVAL:  # a processor without XSAVE has none
                    raise
                continue
            self._parts[part.name] = buffer.raw
        # The time-stamp counter goes on: guests take a jump backwards on one vCPU for a broken counter.
        self._msrs = read_msrs(vcpu, [index for index in msrs if index != _IA32_TSC])

    def restore(self, vcpu: int) -> None:
        """Put it all back. The vCPU is not running, and no I/O of it is unfinished."""
        self._put(vcpu, _BEFORE_MSRS)
        write_msrs(vcpu, self._msrs)
        self._put(vcpu, _AFTER_MSRS)

    def _put(self, vcpu: int, parts: Sequence[_Part]) -> None:
        for part in parts:
            if part.name in self._parts:
                ioctl(vcpu, part.set, ctypes.create_string_buffer(self._parts[part.name], part.size))


def read_msrs(vcpu: int, indices: Sequence[int]) -> list[tuple[int, int]]:
    """(number, value) of those MSRs among *indices* that this vCPU has."""
    found: list[tuple[int, int]] = []
    rest = list(indices)
    while rest:
        buffer = _msr_buffer([(index, 0) for index in rest])
        done = ioctl(vcpu, abi.GET_MSRS, buffer)
        entries = _msr_entries(buffer, done)
        found += [(entry.index, entry.data) for entry in entries]
        del rest[: done + 1]  # KVM stops at the first it cannot read
    return found


def write_msrs(vcpu: int, values: Sequence[tuple[int, int]]) -> None:
    """Set MSRs; those that refuse (read-only ones) are left alone."""
    rest = list(values)
    while rest:
        done = ioctl(vcpu, abi.SET_MSRS, _msr_buffer(rest))
        del rest[: done + 1]


def _msr_buffer(values: Sequence[tuple[int, int]]) -> ctypes.Array[ctypes.c_char]:
    data = bytes(abi.MsrsHeader(nmsrs=len(values)))
    data += b"".join(bytes(abi.MsrEntry(index=index, data=value)) for index, value in values)
    return ctypes.create_string_buffer(data, len(data))


def _msr_entries(buffer: ctypes.Array[ctypes.c_char], count: int) -> list[abi.MsrEntry]:
    return list((abi.MsrEntry * count).from_buffer(buffer, ctypes.sizeof(abi.MsrsHeader)))


#: Names of the general registers in a CpuState.
_GENERAL: Final = {f"e{name}": f"r{name}" for name in ("ax", "bx", "cx", "dx", "si", "di", "sp", "bp")}


def load_cpu_state(vcpu: int, state: CpuState) -> None:
    """Load the registers of *state*; those that it does not name keep their values."""
    sregs = abi.Sregs()
    ioctl(vcpu, abi.GET_SREGS, sregs)
    sregs.cr0 = state.cr0
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, segment_register(getattr(state, name)))
    sregs.gdt.base, sregs.gdt.limit = state.gdt
    sregs.idt.base, sregs.idt.limit = state.idt
    ioctl(vcpu, abi.SET_SREGS, sregs)
    regs = abi.Regs()
    ioctl(vcpu, abi.GET_REGS, regs)
    regs.rip = state.eip
    regs.rflags = state.eflags
    for name, value in state.regs.items():
        name = name.lower()
        setattr(regs, _GENERAL.get(name, name), value)
    ioctl(vcpu, abi.SET_REGS, regs)


def segment_register(segment: Segment) -> abi.SegmentRegister:
    """The kernel's form of *segment*."""
    return abi.SegmentRegister(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        type=segment.type,
        present=segment.present,
        dpl=segment.dpl,
        db=segment.db,
        s=segment.s,
        l=segment.l,
        g=segment.g,
        unusable=0 if segment.present else 1,
    )


def registers(vcpu: int) -> dict[str, int]:
    """Registers for people."""
    regs = abi.Regs()
    ioctl(vcpu, abi.GET_REGS, regs)
    sregs = abi.Sregs()
    ioctl(vcpu, abi.GET_SREGS, sregs)
    shown: dict[str, int] = {name: getattr(regs, name) for name, *_ in abi.Regs._fields_}
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        shown[name] = getattr(sregs, name).selector
    shown["cs_base"] = sregs.cs.base
    for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
        shown[name] = getattr(sregs, name)
    return shown
