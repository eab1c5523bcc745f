"""Stopping and interrupting the engine at block boundaries, by a few bytes of machine code of our own.

Theory of operation. The engine translates guest code into blocks (a run of instructions up to a jump) and can call a
hook at the start of each. Stopping it from another thread (``uc_emu_stop``) may leave in the middle of a
read-modify-write instruction, and a Python hook for every block would be a hundred times too slow; so the hook is
machine code that looks at one word of a :class:`Control` page and returns. :meth:`VCpu.kick` only sets that word: the
vCPU leaves, on its own thread and between two instructions, at the next block.

The same page carries an interrupt in two steps. ``window`` asks to leave as soon as the guest accepts interrupts
(EFLAGS.IF set and no STI/MOV SS shadow): the code watches EFLAGS in the engine's state, so a long stretch with
interrupts off costs nothing. ``vector`` is an acknowledged interrupt: the code delivers it there, through the engine's
own interrupt entry, and goes on in the main loop at the handler.

Exceptions: the engine delivers none by itself but holds the complete code to do it. Where the library exports that
function (the Linux wheels do) the exception hooks are machine code as well, which calls it; a page fault then costs no
Python at all. Everything found this way is looked for by behaviour at start-up (:func:`find_internals`), never by
offsets that a build could change; where anything differs, the portable ways are used instead.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys

import attrs

from .engine import Engine
from .state import MAGIC_GENERAL, StateLayout, set_magic_registers

# Control page: byte offsets of its words.
ATTENTION = 0  # u32: anything below needs a look
STOP = 4  # u32: 1: leave at once; n: leave after n - 1 blocks
WINDOW = 8  # u32: leave as soon as interrupts are accepted
VECTOR = 12  # i32: deliver this interrupt as soon as interrupts are accepted; -1 for none
EFLAGS_PLACE = 16  # address of EFLAGS in the engine's state
HFLAGS_PLACE = 24  # address of its hidden flags (bit 3: the shadow of STI and MOV SS)
ENV = 32  # address of the CPU's architectural state
CPU = 40  # address of the CPU object
DO_STOP = 48  # functions of the engine: uc_emu_stop(engine)
DO_INTERRUPT = 56  # do_interrupt_x86_hardirq(env, vector, is_hardware)
DO_LOOP_EXIT = 64  # cpu_loop_exit(cpu), which does not return
DO_EXCEPTION = 72  # x86_cpu_do_interrupt(cpu)
LEFT = 80  # u32: set when the code left because of one of the words above
# For the wrapper in fills.py: x86_cpu_tlb_fill(…) and tlb_reset_dirty(cpu, host address, length) of the engine, the
# bitmap of the pages that code was translated from, and how many pages it covers.
DO_FILL = 88
DO_RESET_DIRTY = 96
CODE_PAGES = 104
PAGES = 112

# x86-64, System V calling convention. The engine calls
#   block(rdi engine, rsi address, edx size, rcx control)
_X86_64_BLOCK = bytes.fromhex(
    "833900"  #          cmp dword [rcx + ATTENTION],0x0
    "7501"  #          jne look
    "c3"  #          ret
    "8b4104"  #    look: mov eax,dword [rcx + STOP]
    "85c0"  #          test eax,eax
    "7408"  #          je window
    "ffc8"  #          dec eax
    "7455"  #          je leave
    "894104"  #          mov dword [rcx + STOP],eax
    "c3"  #          ret
    "488b5110"  #  window: mov rdx,[rcx + EFLAGS_PLACE]
    "f6420102"  #          test byte [rdx+0x1],0x2  ; IF
    "7440"  #          je out
    "488b5118"  #          mov rdx,[rcx + HFLAGS_PLACE]
    "f60208"  #          test byte [rdx],0x8  ; the shadow of STI and MOV SS
    "7537"  #          jne out
    "8b710c"  #          mov esi,dword [rcx + VECTOR]
    "85f6"  #          test esi,esi
    "7831"  #          js wait
    "c7410cffffffff"  #          mov dword [rcx + VECTOR],0xffffffff
    "31c0"  #          xor eax,eax
    "8701"  #          xchg dword [rcx + ATTENTION],eax  ; locked: a kick is seen below, or sets it again
    "8b4104"  #          mov eax,dword [rcx + STOP]
    "0b4108"  #          or eax,dword [rcx + WINDOW]
    "7406"  #          je deliver
    "c70101000000"  #          mov dword [rcx + ATTENTION],0x1
    "53"  # deliver: push rbx  ; aligns the stack as well
    "4889cb"  #          mov rbx,rcx
    "488b7920"  #          mov rdi,[rcx + ENV]
    "ba01000000"  #          mov edx,0x1
    "ff5138"  #          call [rcx + DO_INTERRUPT]
    "488b7b28"  #          mov rdi,[rbx + CPU]
    "ff5340"  #          call [rbx + DO_LOOP_EXIT]
    "c3"  #     out: ret
    "83790800"  #    wait: cmp dword [rcx + WINDOW],0x0
    "74f9"  #          je out
    "c7415001000000"  #   leave: mov dword [rcx + LEFT],0x1
    "ff6130"  #          jmp [rcx + DO_STOP]
)
#   exception(rdi engine, esi vector, rdx control)
_X86_64_EXCEPTION = bytes.fromhex(
    "488b7a 28"  #          mov  rdi, [rdx + CPU]
    "ff62 48"  #            jmp  [rdx + DO_EXCEPTION]
)
#   invalid_instruction(rdi engine, rsi control) -> al
_X86_64_INVALID = bytes.fromhex(
    "4883ec 08"  #          sub  rsp, 8
    "488b7e 28"  #          mov  rdi, [rsi + CPU]
    "ff56 48"  #            call [rsi + DO_EXCEPTION]
    "b8 01000000"  #        mov  eax, 1
    "4883c4 08"  #          add  rsp, 8
    "c3"  #                 ret
)

# AArch64, AAPCS64: the same three with x0… in place of rdi, rsi, edx, rcx.
# A64 instructions are stored little-endian. Offsets are those of the words above.
_AARCH64_BLOCK = bytes.fromhex(
    "690040b9"  #          ldr w9, [x3]
    "49000035"  #          cbnz w9, look
    "c0035fd6"  #          ret
    "690440b9"  #    look: ldr w9, [x3, #4]
    "a9000034"  #          cbz w9, window
    "29050071"  #          subs w9, w9, #0x1
    "40040054"  #          b.eq leave
    "690400b9"  #          str w9, [x3, #4]
    "c0035fd6"  #          ret
    "6a0840f9"  #  window: ldr x10, [x3, #16]
    "4a0140b9"  #          ldr w10, [x10]
    "4a034836"  #          tbz w10, #9, out
    "6a0c40f9"  #          ldr x10, [x3, #24]
    "4a0140b9"  #          ldr w10, [x10]
    "ea021837"  #          tbnz w10, #3, out
    "610c40b9"  #          ldr w1, [x3, #12]
    "c102f837"  #          tbnz w1, #31, wait
    "09008012"  #          mov w9, #0xffffffff
    "690c00b9"  #          str w9, [x3, #12]
    "7f0000b9"  #          str wzr, [x3]
    "bf3b03d5"  #          dmb ish
    "690440b9"  #          ldr w9, [x3, #4]
    "6a0840b9"  #          ldr w10, [x3, #8]
    "29010a2a"  #          orr w9, w9, w10
    "69000034"  #          cbz w9, deliver
    "29008052"  #          mov w9, #0x1
    "690000b9"  #          str w9, [x3]
    "fd7bbea9"  # deliver: stp x29, x30, [sp, #-32]!
    "f30b00f9"  #          str x19, [sp, #16]
    "f30303aa"  #          mov x19, x3
    "601040f9"  #          ldr x0, [x3, #32]
    "22008052"  #          mov w2, #0x1
    "701c40f9"  #          ldr x16, [x3, #56]
    "00023fd6"  #          blr x16
    "601640f9"  #          ldr x0, [x19, #40]
    "702240f9"  #          ldr x16, [x19, #64]
    "00023fd6"  #          blr x16
    "c0035fd6"  #     out: ret
    "690840b9"  #    wait: ldr w9, [x3, #8]
    "c9ffff34"  #          cbz w9, out
    "29008052"  #   leave: mov w9, #0x1
    "695000b9"  #          str w9, [x3, #80]
    "701840f9"  #          ldr x16, [x3, #48]
    "00021fd6"  #          br x16
)
_AARCH64_EXCEPTION = bytes.fromhex(
    "401440f9"  #            ldr x0, [x2, #40]
    "502440f9"  #            ldr x16, [x2, #72]
    "00021fd6"  #            br x16
)
_AARCH64_INVALID = bytes.fromhex(
    "fd7bbfa9"  #            stp x29, x30, [sp, #-16]!
    "201440f9"  #            ldr x0, [x1, #40]
    "302440f9"  #            ldr x16, [x1, #72]
    "00023fd6"  #            blr x16
    "20008052"  #            mov w0, #0x1
    "fd7bc1a8"  #            ldp x29, x30, [sp], #16
    "c0035fd6"  #            ret
)


@attrs.frozen
class MachineCode:
    """The entry points for one kind of host."""

    block: bytes
    exception: bytes
    invalid: bytes


_HOSTS = {
    "x86_64": MachineCode(_X86_64_BLOCK, _X86_64_EXCEPTION, _X86_64_INVALID),
    "amd64": MachineCode(_X86_64_BLOCK, _X86_64_EXCEPTION, _X86_64_INVALID),
    "aarch64": MachineCode(_AARCH64_BLOCK, _AARCH64_EXCEPTION, _AARCH64_INVALID),
}


def machine_code() -> MachineCode | None:
    """The entry points for this host; None where there are none (its calling convention or rules differ)."""
    if sys.platform == "win32" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    return _HOSTS.get(platform.machine().lower())


def _clear_instruction_cache(start: int, end: int) -> None:
    """Make code that was written as data visible to instruction fetch; x86 does it by itself. Raises OSError."""
    try:
        clear = ctypes.CDLL("libgcc_s.so.1").__clear_cache
    except AttributeError as error:
        raise OSError("this host's libgcc has no __clear_cache") from error
    clear.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    clear(start, end)


@attrs.frozen
class Internals:
    """Addresses inside the engine, in a build that exports what is needed."""

    #: The CPU's architectural state (what StateLayout's offsets count from), and the CPU object.
    env: int
    cpu: int
    do_interrupt: int
    loop_exit: int
    do_exception: int


class Control:
    """The control page and the machine code that looks at it."""

    def __init__(self, engine: Engine, code: MachineCode) -> None:
        """Raises OSError where the host forbids executable memory."""
        self._code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._used = 0
        self.is_x86 = code.block is _X86_64_BLOCK
        self.block, self.exception, self.invalid = map(self.add_code, (code.block, code.exception, code.invalid))
        self.attention = ctypes.c_uint32.from_address(self.address + ATTENTION)
        self.stop = ctypes.c_uint32.from_address(self.address + STOP)
        self.window = ctypes.c_uint32.from_address(self.address + WINDOW)
        self.vector = ctypes.c_int32.from_address(self.address + VECTOR)
        self.left = ctypes.c_uint32.from_address(self.address + LEFT)
        self.vector.value = -1
        self.set_pointer(DO_STOP, engine.address_of("uc_emu_stop"))

    def add_code(self, code: bytes) -> int:
        """Put *code* into the executable page; its address. Raises OSError if it cannot be made visible."""
        at = self._used
        self._code[at : at + len(code)] = code
        self._used = (at + len(code) + 15) & ~15
        if not self.is_x86:
            _clear_instruction_cache(self._base + at, self._base + self._used)
        return self._base + at

    def set_pointer(self, offset: int, value: int) -> None:
        """Store an address in the page."""
        struct.pack_into("<Q", self._page, offset, value)

    def connect(self, internals: Internals, layout: StateLayout) -> None:
        """Let the machine code look into the engine and call it."""
        for offset, value in (
            (EFLAGS_PLACE, internals.env + layout.eflags),
            (HFLAGS_PLACE, internals.env + layout.hflags),
            (ENV, internals.env),
            (CPU, internals.cpu),
            (DO_INTERRUPT, internals.do_interrupt),
            (DO_LOOP_EXIT, internals.loop_exit),
            (DO_EXCEPTION, internals.do_exception),
        ):
            self.set_pointer(offset, value)

    def clear(self) -> None:
        """Take back every request; what they were about must be looked at after this."""
        self.attention.value = 0
        self.stop.value = 0
        self.window.value = 0
        self.left.value = 0


def find_internals(engine: Engine) -> Internals | None:
    """Look for the CPU object and the functions; None in a build that does not export them."""
    get_cpu = engine.function("qemu_get_cpu_x86_64", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    addresses = [
        engine.address_of(f"{name}_x86_64")
        for name in ("do_interrupt_x86_hardirq", "cpu_loop_exit", "x86_cpu_do_interrupt")
    ]
    if get_cpu is None or not all(addresses):
        return None
    # The engine makes its CPU at the first use: a register must be written before the CPU is asked for.
    set_magic_registers(engine)
    cpu = get_cpu(engine.handle, -1) or get_cpu(engine.handle, 0)
    if not cpu:
        return None
    seen = b""
    # In small steps: the state is surely inside the object, and what lies behind the object may not be readable.
    for step in range(0, 0xC000, 1024):
        seen = seen[-len(MAGIC_GENERAL) :] + ctypes.string_at(cpu + step, 1024)
        at = seen.find(MAGIC_GENERAL)
        if at >= 0:
            return Internals(cpu + step + 1024 - len(seen) + at, cpu, *addresses)
    return None
