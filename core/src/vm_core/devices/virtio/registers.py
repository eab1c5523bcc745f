"""Register tables: name, offset, width, access and reset value of each register, and the decoder that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Register(NamedTuple):
    """A little-endian register of *size* bytes at *offset*. *access* is ``r`` or ``rw``."""

    name: str
    offset: int
    size: int
    access: str
    reset: int
    text: str


class RegisterTable:
    """Decodes accesses to the registers of a table.

    A register ``x`` is read by ``owner.get_x()`` and written by ``owner.set_x(value)``. Reads may have any width and
    place and are put together from the registers they touch. A write changes the register that starts at its offset,
    and those behind it as far as it reaches in full; bytes in the middle of a register cannot be written.
    """

    def __init__(self, registers: Sequence[Register]) -> None:
        self.registers = tuple(registers)
        self._at = {r.offset: r for r in registers}

    def read(self, owner: Any, offset: int, size: int) -> int:
        """The value of *size* bytes at *offset*; bytes that belong to no register are zero."""
        exact = self._at.get(offset)
        if exact is not None and exact.size == size:
            return int(getattr(owner, f"get_{exact.name}")())
        value = 0
        for register in self.registers:
            shift = 8 * (register.offset - offset)
            if register.offset < offset + size and offset < register.offset + register.size:
                part = int(getattr(owner, f"get_{register.name}")())
                value |= part << shift if shift >= 0 else part >> -shift
        return value & (1 << 8 * size) - 1

    def write(self, owner: Any, offset: int, size: int, value: int) -> None:
        """Write *size* bytes at *offset*; read-only registers stay as they are."""
        end = offset + size
        at = offset
        while at < end:
            register = self._at.get(at)
            if register is None or (at > offset and at + register.size > end):
                return
            if register.access == "rw":
                part = value >> 8 * (at - offset) & (1 << 8 * register.size) - 1
                getattr(owner, f"set_{register.name}")(part)
            at += register.size
