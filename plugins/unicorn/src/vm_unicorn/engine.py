"""The Unicorn library as this plugin calls it: ctypes prototypes for what is hot, the ``Uc`` class for what is not.

The wheel's Python wrapper costs several microseconds for a register and for a callback. A machine does both for every
port access, so registers go through one batch call on preallocated buffers, and callbacks are bare ctypes functions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import unicorn
from unicorn import x86_const as x86

from vm_core.errors import VmError

# The order of the general registers in the processor's own numbering, which is that of the engine's state too.
GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")

REG: dict[str, int] = {
    name: getattr(x86, f"UC_X86_REG_{name.upper()}")
    for name in (
        *GENERAL,
        *("eip", "eflags", "cs", "ds", "es", "fs", "gs", "ss", "cr0", "cr2", "cr3", "cr4"),
        *("gdtr", "idtr", "ldtr", "tr"),
    )
}

PROT_READ, PROT_WRITE, PROT_EXEC = unicorn.UC_PROT_READ, unicorn.UC_PROT_WRITE, unicorn.UC_PROT_EXEC

#: Bytes for translated code. A Linux guest that boots to its shell needs about 60 MiB.
CODE_BUFFER = 128 << 20

#: Callbacks: (engine, port, size, user) -> value; (engine, port, size, value, user).
IN_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
OUT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
#: (engine, user) -> skip the instruction.
INSN_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
#: (engine, vector, user).
INTR_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
#: (engine, user) -> handled.
INVALID_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)
#: (engine, offset, size, user) -> value; (engine, offset, size, value, user). The user word is the region's address.
MMIO_READ_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64)
MMIO_WRITE_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_uint64
)


class EngineError(VmError):
    """The library refused a call."""


class Mmr(ctypes.Structure):
    """A descriptor-table register as the library passes it (``uc_x86_mmr``)."""

    _fields_ = (
        ("selector", ctypes.c_uint16),
        ("base", ctypes.c_uint64),
        ("limit", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


def library_path() -> str:
    """The file of the engine's shared library."""
    from unicorn.unicorn_py3.unicorn import uclib

    return str(uclib._name)


class RegisterBatch:
    """Registers that are read and written together with one call each."""

    def __init__(self, engine: Engine, names: tuple[str, ...]) -> None:
        count = len(names)
        self._engine = engine
        self._count = ctypes.c_int(count)
        self._ids = (ctypes.c_int * count)(*(REG[n] for n in names))
        self._values = (ctypes.c_uint64 * count)()
        places = [ctypes.addressof(self._values) + 8 * i for i in range(count)]
        self._pointers = (ctypes.c_void_p * count)(*places)

    def read(self) -> list[int]:
        """The registers' values, in the order of the names."""
        # The library stores 32 bits (selectors 16) and leaves the rest of each slot as it was: zero.
        self._engine.lib.uc_reg_read_batch(self._engine.handle, self._ids, self._pointers, self._count)
        return list(self._values)

    def write(self, *values: int) -> None:
        """Set all of them, in the order of the names."""
        self._values[:] = list(values)
        self._engine.lib.uc_reg_write_batch(self._engine.handle, self._ids, self._pointers, self._count)


class Engine:
    """One instance of the CPU emulator, in 32-bit mode for its whole life.

    ``UC_MODE_16`` truncates EIP once the guest enters protected mode; ``UC_MODE_32`` runs real mode as well once CR0.PE
    is clear.
    """

    def __init__(self) -> None:
        self.lib = lib = ctypes.CDLL(library_path())
        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        lib.uc_emu_start.argtypes = (pointer, u64, u64, u64, ctypes.c_size_t)
        lib.uc_emu_stop.argtypes = (pointer,)
        for name in ("uc_reg_read", "uc_reg_write"):
            getattr(lib, name).argtypes = (pointer, ctypes.c_int, pointer)
        for name in ("uc_reg_read_batch", "uc_reg_write_batch"):
            getattr(lib, name).argtypes = (pointer, pointer, pointer, ctypes.c_int)
        # Variadic: prototypes for the named arguments let ctypes pass the rest as the platform's C does.
        lib.uc_hook_add.argtypes = (pointer, pointer, ctypes.c_int, pointer, pointer, u64, u64)
        lib.uc_mem_map_ptr.argtypes = (pointer, u64, u64, ctypes.c_uint32, pointer)
        lib.uc_mmio_map.argtypes = (pointer, u64, u64, pointer, u64, pointer, u64)
        lib.uc_mem_unmap.argtypes = (pointer, u64, u64)
        lib.uc_context_alloc.argtypes = (pointer, pointer)
        lib.uc_context_save.argtypes = lib.uc_context_restore.argtypes = (pointer, pointer)
        lib.uc_context_size.argtypes = (pointer,)
        lib.uc_context_size.restype = ctypes.c_size_t
        lib.uc_context_free.argtypes = (pointer,)
        lib.uc_strerror.argtypes = (ctypes.c_int,)
        lib.uc_strerror.restype = ctypes.c_char_p

        # The wheel has no types.
        make: Any = unicorn.Uc  # type: ignore[attr-defined]
        self.uc = make(unicorn.UC_ARCH_X86, unicorn.UC_MODE_32)
        # No long mode (this is a 32-bit machine), SSE3: what Debian's i386 kernels want.
        self.uc.ctl_set_cpu_model(x86.UC_CPU_X86_COREDUO)
        # By default a gigabyte, which a guest fills in time. A full buffer is emptied, and used code translated again.
        self.uc.ctl_set_tcg_buffer_size(CODE_BUFFER)
        # Without this each return probes the address 'until', a hidden page fault once paging is on.
        self.uc.ctl_exits_enabled(True)
        self.handle: int = self.uc._uch.value
        self._keep: list[Any] = []
        self._word = ctypes.c_uint64()

    def check(self, error: int, what: str) -> None:
        """Raise :class:`EngineError` for a failed library call."""
        if error:
            raise EngineError(f"unicorn: {what}: {self.strerror(error)}")

    def strerror(self, error: int) -> str:
        """The library's words for *error*."""
        return str(self.lib.uc_strerror(error).decode())

    def get(self, name: str) -> int:
        """One register's value."""
        self._word.value = 0
        self.lib.uc_reg_read(self.handle, REG[name], ctypes.addressof(self._word))
        return self._word.value

    def set(self, name: str, value: int) -> None:
        """Load one register; a selector is loaded as the processor would, from the descriptor tables."""
        self._word.value = value
        self.check(self.lib.uc_reg_write(self.handle, REG[name], ctypes.addressof(self._word)), f"set {name}")

    def get_table(self, name: str) -> Mmr:
        """GDTR, IDTR, LDTR or TR."""
        mmr = Mmr()
        self.lib.uc_reg_read(self.handle, REG[name], ctypes.addressof(mmr))
        return mmr

    def set_table(self, name: str, base: int, limit: int, selector: int = 0, flags: int = 0) -> None:
        """Load GDTR, IDTR, LDTR or TR."""
        mmr = Mmr(selector, base, limit, flags)
        self.lib.uc_reg_write(self.handle, REG[name], ctypes.addressof(mmr))

    def hook(self, kind: int, callback: Any, user: int = 0, *extra: int) -> None:
        """Add a hook; *callback* is a ctypes function or the address of machine code."""
        self._keep.append(callback)
        address = callback if isinstance(callback, int) else ctypes.cast(callback, ctypes.c_void_p)
        place = ctypes.c_size_t()
        self.check(
            self.lib.uc_hook_add(
                self.handle, ctypes.byref(place), kind, address, user, 1, 0, *(ctypes.c_int(e) for e in extra)
            ),
            "add a hook",
        )

    def start(self, eip: int, count: int = 0) -> int:
        """Run from *eip* until something stops the engine; the error number, 0 for none."""
        return int(self.lib.uc_emu_start(self.handle, eip, 0, 0, count))

    def stop(self) -> None:
        """Leave after the current instruction. Only from a hook, on the thread that runs the engine."""
        self.lib.uc_emu_stop(self.handle)

    def function(self, name: str, restype: Any, *argtypes: Any) -> Callable[..., Any] | None:
        """An internal function of the library, where this build exports it."""
        found = getattr(self.lib, name, None)
        if found is not None:
            found.restype = restype
            found.argtypes = argtypes
        return found

    def address_of(self, name: str) -> int:
        """The address of a function of the library; 0 if this build does not export it."""
        found = getattr(self.lib, name, None)
        return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0

    def close(self) -> None:
        """Free the engine; nothing may run in it."""
        self._keep.clear()
        del self.uc


class Context:
    """The engine's whole CPU state as bytes, to keep, look into and put back."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        pointer = ctypes.c_void_p()
        engine.check(engine.lib.uc_context_alloc(engine.handle, ctypes.byref(pointer)), "allocate a context")
        self.address = pointer.value or 0
        self.size = int(engine.lib.uc_context_size(engine.handle))

    def save(self) -> None:
        """Take the state out of the engine."""
        self._engine.lib.uc_context_save(self._engine.handle, self.address)

    def restore(self) -> None:
        """Put the state back."""
        self._engine.lib.uc_context_restore(self._engine.handle, self.address)

    def bytes(self) -> bytes:
        """The saved state."""
        return ctypes.string_at(self.address, self.size)

    def word(self, offset: int) -> int:
        """The 32-bit word at *offset*."""
        return ctypes.c_uint32.from_address(self.address + offset).value

    def set_word(self, offset: int, value: int) -> None:
        """Change the 32-bit word at *offset*."""
        ctypes.c_uint32.from_address(self.address + offset).value = value

    def close(self) -> None:
        """Free it."""
        self._engine.lib.uc_context_free(self.address)
