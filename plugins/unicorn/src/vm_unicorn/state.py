"""The CPU's state as plain memory: hidden flags, segment bases and the engine's notes about the last exception."""

from __future__ import annotations

import ctypes
import struct

from .engine import GENERAL, Context, Engine
from .native import Internals, StateLayout

HF_CPL = 3
HF_INHIBIT_IRQ = 1 << 3
HF_CS32 = 1 << 4


class CpuMemory:
    """Reads the engine's CPU state: in place where its address is known, else out of a context saved for each look."""

    def __init__(self, engine: Engine, layout: StateLayout, internals: Internals | None) -> None:
        self._layout = layout
        self._live = internals is not None
        self._context = Context(engine)
        self._address = internals.env if internals is not None else self._context.address + layout.context
        self._general = struct.Struct("<8Q")

    def _refresh(self) -> int:
        if not self._live:
            self._context.save()
        return self._address

    def general(self) -> dict[str, int]:
        """EAX to EDI."""
        values = self._general.unpack(ctypes.string_at(self._refresh(), 64))
        return {name: value & 0xFFFFFFFF for name, value in zip(GENERAL, values, strict=True)}

    def eip(self) -> int:
        """The instruction pointer."""
        return ctypes.c_uint32.from_address(self._refresh() + self._layout.eip).value

    def hidden_flags(self) -> int:
        """CPL in bits 0–1, the shadow of STI and MOV SS in bit 3, a 32-bit code segment in bit 4."""
        return ctypes.c_uint32.from_address(self._refresh() + self._layout.hflags).value

    def accepts_interrupts(self) -> bool:
        """EFLAGS.IF is set, and the last instruction was not STI or MOV SS."""
        at = self._refresh()
        flags = ctypes.c_uint32.from_address(at + self._layout.eflags).value
        return bool(flags & 0x200) and not (
            ctypes.c_uint32.from_address(at + self._layout.hflags).value & HF_INHIBIT_IRQ
        )

    def segment(self, name: str) -> tuple[int, int]:
        """A segment register's selector and base."""
        at = self._refresh() + self._layout.segments[name]
        selector, base = struct.unpack("<I4xQ", ctypes.string_at(at, 16))
        return selector & 0xFFFF, base & 0xFFFFFFFF

    def set_selector(self, name: str, selector: int) -> bool:
        """Change the visible part of a segment register only; False where the state is not in reach."""
        if not self._live:
            return False
        ctypes.c_uint32.from_address(self._address + self._layout.segments[name]).value = selector
        return True

    def nested_exception(self) -> int:
        """The exception that the engine believes is being delivered, -1 for none."""
        return ctypes.c_int32.from_address(self._refresh() + self._layout.old_exception).value

    def take_error_code(self) -> int:
        """The last exception's error code; the engine is told that the exception was delivered."""
        at = self._refresh()
        code = ctypes.c_uint32.from_address(at + self._layout.error_code).value
        ctypes.c_int32.from_address(at + self._layout.old_exception).value = -1
        if not self._live:
            self._context.restore()
        return code

    def close(self) -> None:
        """Free the context."""
        self._context.close()
