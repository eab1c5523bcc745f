"""Stopping a running guest exactly, at the beginning of a basic block, whenever another thread asks for it.

Theory of operation. ``uc_emu_stop`` from another thread may stop in the middle of an instruction, which is then run
twice. Stopping after a count of instructions is exact, but hooks every instruction and costs four fifths of the speed.
So a hook is put on every basic block instead, whose body is a few bytes of machine code of our own: it looks at a word
of memory, returns if that is 0, and otherwise calls ``uc_emu_stop`` itself, on the engine's own thread, where it is
exact. A second little function takes exceptions the same way. Elsewhere than on x86-64 with the System V calling
convention :class:`CountingStopper` does it by counting.

The words they share with Python (:class:`Control`)::

    +0   u32  attention   not 0: stop at the next block
    +4   u32  window      not 0: stop at the next block at which an interrupt can be delivered
    +8   u64  context     a saved state that the hook may overwrite to look at the flags
    +16  u32  vector      the exception or software interrupt that was raised
    +20  u32  raised      set with vector
    +24  u32  stopped     set when the block hook stopped the guest
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from typing import Any

from unicorn import unicorn_const as uc_const

from . import library
from .state import EFLAGS, HFLAGS, Layout


class Control(ctypes.Structure):
    """The words shared between Python and the hooks."""

    _fields_ = (
        ("attention", ctypes.c_uint32),
        ("window", ctypes.c_uint32),
        ("context", ctypes.c_uint64),
        ("vector", ctypes.c_uint32),
        ("raised", ctypes.c_uint32),
        ("stopped", ctypes.c_uint32),
    )


def native_is_possible() -> bool:
    """Whether this host runs the machine code below and lets a process make executable pages."""
    if sys.platform not in ("linux", "darwin") or platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        _executable_page().close()
    except OSError:
        return False
    return True


def _executable_page() -> mmap.mmap:
    return mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


class NativeStopper:
    """Hooks made of machine code. *slice* is 0: the guest runs until something stops it."""

    slice = 0

    def __init__(self, engine: int, control: Control, layout: Layout) -> None:
        stop = library.address_of(library.lib.uc_emu_stop).to_bytes(8, "little")
        save = library.address_of(library.lib.uc_context_save).to_bytes(8, "little")
        flag_if = (layout.base + EFLAGS + 1).to_bytes(4, "little")
        shadow = (layout.base + HFLAGS).to_bytes(4, "little")
        # void block(uc *rdi, u64 address rsi, u32 size edx, Control *rcx)
        block = b"".join((
            b"\x48\x8b\x01",                  #  0  mov  rax, [rcx]           attention and window
            b"\x48\x85\xc0",                  #  3  test rax, rax
            b"\x75\x01",                      #  6  jnz  9
            b"\xc3",                          #  8  ret
            b"\x85\xc0",                      #  9  test eax, eax
            b"\x75\x38",                      # 11  jnz  69                   attention
            b"\x53",                          # 13  push rbx
            b"\x48\x89\xcb",                  # 14  mov  rbx, rcx
            b"\x57",                          # 17  push rdi
            b"\x48\x83\xec\x08",              # 18  sub  rsp, 8               keeps the stack aligned
            b"\x48\x8b\x73\x08",              # 22  mov  rsi, [rbx + 8]       context
            b"\x48\xb8" + save,               # 26  mov  rax, uc_context_save
            b"\xff\xd0",                      # 36  call rax
            b"\x48\x83\xc4\x08",              # 38  add  rsp, 8
            b"\x5f",                          # 42  pop  rdi
            b"\x48\x89\xd9",                  # 43  mov  rcx, rbx
            b"\x5b",                          # 46  pop  rbx
            b"\x48\x8b\x51\x08",              # 47  mov  rdx, [rcx + 8]
            b"\xf6\x82" + flag_if + b"\x02",  # 51  test byte [rdx + …], 2    EFLAGS.IF
            b"\x74\x1c",                      # 58  jz   88
            b"\xf6\x82" + shadow + b"\x08",   # 60  test byte [rdx + …], 8    in the shadow of STI or MOV SS
            b"\x75\x13",                      # 67  jnz  88
            b"\xc7\x41\x18\x01\x00\x00\x00",  # 69  mov  dword [rcx + 24], 1  stopped
            b"\x48\xb8" + stop,               # 76  mov  rax, uc_emu_stop
            b"\xff\xe0",                      # 86  jmp  rax
            b"\xc3",                          # 88  ret
        ))  # fmt: skip
        # void raised(uc *rdi, u32 vector esi, Control *rdx)
        raised = b"".join((
            b"\x89\x72\x10",                  #  0  mov  [rdx + 16], esi      vector
            b"\xc7\x42\x14\x01\x00\x00\x00",  #  3  mov  dword [rdx + 20], 1  raised
            b"\x48\xb8" + stop,               # 10  mov  rax, uc_emu_stop
            b"\xff\xe0",                      # 20  jmp  rax
        ))  # fmt: skip
        self._page = _executable_page()
        self._page[: len(block)] = block
        self._page[128 : 128 + len(raised)] = raised
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        words = ctypes.addressof(control)
        library.hook(engine, int(uc_const.UC_HOOK_BLOCK), base, words)
        library.hook(engine, int(uc_const.UC_HOOK_INTR), base + 128, words)


class CountingStopper:
    """Stops after *slice* instructions; what another thread asked for is seen then."""

    slice = 20_000

    def __init__(self, engine: int, control: Control) -> None:
        self._stop = library.lib.uc_emu_stop
        self._control = control
        self._intr = library.INTR_CALLBACK(self._raised)
        library.hook(engine, int(uc_const.UC_HOOK_INTR), library.address_of(self._intr))

    def _raised(self, engine: int, vector: int, data: Any) -> None:
        self._control.vector = vector
        self._control.raised = 1
        self._stop(ctypes.c_void_p(engine))


def make_stopper(choice: str, engine: int, control: Control, layout: Layout) -> NativeStopper | CountingStopper:
    """The stopper that *choice* (``auto``, ``native``, ``count``) names. Raises ValueError where it cannot be had."""
    if choice == "count":
        return CountingStopper(engine, control)
    if native_is_possible():
        return NativeStopper(engine, control, layout)
    if choice == "native":
        raise ValueError("stop=native needs an x86-64 host (Linux or macOS) that allows executable pages")
    return CountingStopper(engine, control)
