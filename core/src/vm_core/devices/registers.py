"""Registers as tables: name, offset, width, access and reset value, which drive decoding, documentation and tests.

A table is a tuple of :class:`Register`. For configuration spaces and other plain bytes :func:`load` sets reset values
and :func:`writable_mask` gives the bits a guest may write. For registers with behaviour :func:`decode` turns the table
into two lists indexed by offset, of the owner's methods ``read_<name>()`` and ``write_<name>(value)``, so that an
access costs one index and one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import attrs

Access = Literal["rw", "ro", "wo"]
Reader = Callable[[], int]
Writer = Callable[[int], object]


@attrs.frozen
class Register:
    """One register of *width* bytes. *writable*: the bits that a write changes, all of them by default."""

    name: str
    offset: int
    width: int = 1
    access: Access = "rw"
    reset: int = 0
    help: str = ""
    writable: int | None = None

    @property
    def mask(self) -> int:
        """Bits that a guest's write changes."""
        full = (1 << 8 * self.width) - 1
        return 0 if self.access == "ro" else full if self.writable is None else self.writable


def load(table: Iterable[Register], into: bytearray) -> None:
    """Set every register of *table* to its reset value."""
    for register in table:
        into[register.offset : register.offset + register.width] = register.reset.to_bytes(register.width, "little")


def writable_mask(table: Iterable[Register], into: bytearray) -> None:
    """Set the bits of *into* that the guest may write."""
    for register in table:
        into[register.offset : register.offset + register.width] = register.mask.to_bytes(register.width, "little")


def decode(owner: object, table: Sequence[Register], size: int) -> tuple[list[Reader], list[Writer]]:
    """Methods of *owner* by offset. What the table does not name reads as 0xff and forgets writes."""
    readers: list[Reader] = [_ones] * size
    writers: list[Writer] = [_forget] * size
    for register in table:
        if register.access != "wo":
            readers[register.offset] = getattr(owner, f"read_{register.name}")
        if register.access != "ro":
            writers[register.offset] = getattr(owner, f"write_{register.name}")
    return readers, writers


def describe(table: Iterable[Register]) -> str:
    """The table as text, one register a line."""
    return "\n".join(
        f"{r.offset:#04x}  {r.width}  {r.access}  {r.reset:#0{2 + 2 * r.width}x}  {r.name:<12} {r.help}" for r in table
    )


def _ones() -> int:
    return 0xFF


def _forget(value: int) -> None:
    pass
