"""How fast KVM really runs guest code here.

A /dev/kvm that opens need not mean a processor that runs the guest: nested and para-virtual hosts may emulate every
instruction. So a few thousand instructions of real mode are timed, once in a process. Hardware needs some
microseconds for them, an emulator milliseconds; nothing lies in between.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import struct
import time
from typing import Final

import attrs

from . import abi
from .syscall import ioctl
from .system import KvmUnavailableError, System

#: Iterations of the timed loop, of two instructions each.
LOOPS: Final = 2500
#: Million instructions a second from which on KVM counts as hardware. Hardware does hundreds even with the cost of
#: entering and leaving the guest included; emulation does about two.
HARDWARE_MIPS: Final = 40.0
#: Tries that may be spoilt by another process on the host's processor.
TRIES: Final = 3

# mov cx, LOOPS   b9 iw
# dec cx          49
# jnz -3          75 fd
# hlt             f4
_LOOP: Final = b"\xb9" + struct.pack("<H", LOOPS) + b"\x49\x75\xfd\xf4"
_ORIGIN: Final = 0x100


@attrs.frozen
class Speed:
    """The probe's result."""

    mips: float

    @property
    def hardware(self) -> bool:
        """Guest code runs on the processor itself."""
        return self.mips >= HARDWARE_MIPS


@functools.cache
def measure() -> Speed:
    """Time the loop in a throw-away VM. Raises KvmUnavailableError."""
    system = System()
    try:
        return Speed(_measure(system))
    except OSError as e:
        raise KvmUnavailableError(f"KVM does not run a guest here: {e.strerror}") from None
    finally:
        system.close()


def _measure(system: System) -> float:
    vm = system.create_vm()
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        memory[_ORIGIN : _ORIGIN + len(_LOOP)] = _LOOP
        ioctl(vm, abi.SET_TSS_ADDR, 0xFEFFD000)
        anchor = ctypes.c_char.from_buffer(memory)
        place = ctypes.addressof(anchor)
        del anchor
        ioctl(
            vm,
            abi.SET_USER_MEMORY_REGION,
            abi.UserMemoryRegion(memory_size=len(memory), userspace_addr=place),
        )
        vcpu = ioctl(vm, abi.CREATE_VCPU, 0)
        try:
            run = mmap.mmap(vcpu, system.run_size())
            try:
                best = 0.0
                for _ in range(TRIES + 1):  # the first one warms up
                    best = max(best, 2 * LOOPS / _once(vcpu, run) / 1e6)
                    if best >= HARDWARE_MIPS:
                        break
                return best
            finally:
                run.close()
        finally:
            os.close(vcpu)
    finally:
        os.close(vm)
        memory.close()


def _once(vcpu: int, run: mmap.mmap) -> float:
    """Seconds for one pass of the loop."""
    sregs = abi.Sregs()
    ioctl(vcpu, abi.GET_SREGS, sregs)
    sregs.cs.base = sregs.cs.selector = 0
    ioctl(vcpu, abi.SET_SREGS, sregs)
    ioctl(vcpu, abi.SET_REGS, abi.Regs(rip=_ORIGIN, rflags=2))
    start = time.perf_counter()
    ioctl(vcpu, abi.RUN)
    elapsed = time.perf_counter() - start
    reason = int.from_bytes(run[abi.RUN_EXIT_REASON : abi.RUN_EXIT_REASON + 4], "little")
    if reason != abi.EXIT_HLT:
        raise KvmUnavailableError(f"KVM does not run a guest here: a loop ended with exit {reason} instead of HLT")
    return max(elapsed, 1e-9)
