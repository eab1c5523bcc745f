"""The few calls of the Unicorn library that are made millions of times, bound without the wheel's Python wrapper.

The wrapper (``unicorn.Uc``) makes the engine and sets it up; what runs the guest goes through these functions, because
the wrapper's bookkeeping costs more than the calls themselves. ctypes drops the interpreter's lock around each call.
"""

from __future__ import annotations

import ctypes
from typing import Any

from unicorn import unicorn_const as uc_const
from unicorn import x86_const
from unicorn.unicorn_py3 import unicorn as _wrapper

lib: Any = _wrapper.uclib

EFLAGS = int(x86_const.UC_X86_REG_EFLAGS)
ERR_OK = int(uc_const.UC_ERR_OK)
ERR_INSN_INVALID = int(uc_const.UC_ERR_INSN_INVALID)

_PROTO = ctypes.CFUNCTYPE

emu_start = _PROTO(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)(
    ("uc_emu_start", lib)
)
context_save = _PROTO(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(("uc_context_save", lib))
context_restore = _PROTO(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(("uc_context_restore", lib))
reg_read = _PROTO(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(("uc_reg_read", lib))
reg_write = _PROTO(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(("uc_reg_write", lib))
mem_write = _PROTO(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)(
    ("uc_mem_write", lib)
)

#: uint32_t (uc, port, size, user_data) and void (uc, port, size, value, user_data)
IN_CALLBACK = _PROTO(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
OUT_CALLBACK = _PROTO(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
#: void (uc, interrupt number, user_data) and void (uc, address, size, user_data)
INTR_CALLBACK = _PROTO(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
CODE_CALLBACK = _PROTO(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)


def address_of(function: Any) -> int:
    """Where a C function or a callback object is."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def hook(engine: int, kind: int, callback: int, data: int = 0, instruction: int | None = None) -> None:
    """Add a hook on every address; *callback* is a C function's address."""
    handle = ctypes.c_size_t()
    extra = [] if instruction is None else [ctypes.c_int(instruction)]
    code = lib.uc_hook_add(
        ctypes.c_void_p(engine), ctypes.byref(handle), ctypes.c_int(kind), ctypes.c_void_p(callback),
        ctypes.c_void_p(data), ctypes.c_uint64(1), ctypes.c_uint64(0), *extra,
    )  # fmt: skip
    if code != ERR_OK:
        raise RuntimeError(f"unicorn: hook {kind} was refused with error {code}")


def describe(code: int) -> str:
    """The library's words for an error code."""
    lib.uc_strerror.restype = ctypes.c_char_p
    text: bytes = lib.uc_strerror(ctypes.c_int(code))
    return text.decode()
