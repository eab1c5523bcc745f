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
import unicorn

from .engine import GENERAL, Context, Engine

# Control page: byte offsets of its words.
ATTENTION = 0  # u32: anything below needs a look
STOP = 4  # u32: leave at once
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

# x86-64, System V calling convention. The three entry points are called by the engine:
#   block(rdi engine, rsi address, edx size, rcx control)
#   exception(rdi engine, esi vector, rdx control)
#   invalid(rdi engine, rsi control) -> al
_X86_64_BLOCK = bytes.fromhex(
    "8339 00"  #            cmp  dword [rcx + ATTENTION], 0
    "7501"  #               jne  look
    "c3"  #                 ret
    "8379 04 00"  #   look: cmp  dword [rcx + STOP], 0
    "7543"  #               jne  leave
    "488b51 10"  #          mov  rdx, [rcx + EFLAGS_PLACE]
    "f642 01 02"  #         test byte [rdx + 1], 2          ; IF
    "743a"  #               jz   out
    "488b51 18"  #          mov  rdx, [rcx + HFLAGS_PLACE]
    "f602 08"  #            test byte [rdx], 8              ; the shadow of STI and MOV SS
    "7531"  #               jnz  out
    "8b71 0c"  #            mov  esi, [rcx + VECTOR]
    "85f6"  #               test esi, esi
    "782b"  #               js   wait
    "c741 0c ffffffff"  #   mov  dword [rcx + VECTOR], -1
    "31c0"  #               xor  eax, eax
    "8701"  #               xchg [rcx + ATTENTION], eax     ; locked: a kick either comes before, or sets it again
    "8b41 04"  #            mov  eax, [rcx + STOP]
    "0b41 08"  #            or   eax, [rcx + WINDOW]
    "0901"  #               or   [rcx + ATTENTION], eax
    "53"  #                 push rbx                        ; also aligns the stack
    "4889cb"  #             mov  rbx, rcx
    "488b79 20"  #          mov  rdi, [rcx + ENV]
    "ba 01000000"  #        mov  edx, 1
    "ff51 38"  #            call [rcx + DO_INTERRUPT]
    "488b7b 28"  #          mov  rdi, [rbx + CPU]
    "ff53 40"  #            call [rbx + DO_LOOP_EXIT]
    "c3"  #            out: ret
    "8379 08 00"  #   wait: cmp  dword [rcx + WINDOW], 0
    "74f9"  #               je   out
    "ff61 30"  #     leave: jmp  [rcx + DO_STOP]
)
_X86_64_EXCEPTION = bytes.fromhex(
    "488b7a 28"  #          mov  rdi, [rdx + CPU]
    "ff62 48"  #            jmp  [rdx + DO_EXCEPTION]
)
_X86_64_INVALID = bytes.fromhex(
    "4883ec 08"  #          sub  rsp, 8
    "488b7e 28"  #          mov  rdi, [rsi + CPU]
    "ff56 48"  #            call [rsi + DO_EXCEPTION]
    "b8 01000000"  #        mov  eax, 1
    "4883c4 08"  #          add  rsp, 8
    "c3"  #                 ret
)
