"""The alignment and the greatest lengths that the node pretends to have, and requests cut to fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vm_core.errors import ImageError

INT_MAX = (1 << 31) - 1


class Limits:
    """The options ``align``, ``max-transfer`` and so on, in bytes; 0: no limit."""

    def __init__(self, options: dict[str, Any], below: int) -> None:
        """Pop the options and check them; *below* is the alignment of the node below. Raises ImageError."""
        self.align: int = options.pop("align", 0)
        if self.align and (self.align >= INT_MAX or self.align & (self.align - 1)):
            raise _constraint("align", self.align)
        unit = max(self.align, below)
        self.max_transfer = self._take(options, "max-transfer", unit)
        self.opt_zero = self._take(options, "opt-write-zero", unit)
        self.max_zero = self._take(options, "max-write-zero", max(unit, self.opt_zero))
        self.opt_discard = self._take(options, "opt-discard", unit)
        self.max_discard = self._take(options, "max-discard", max(unit, self.opt_discard))

    def _take(self, options: dict[str, Any], name: str, unit: int) -> int:
        value: int = options.pop(name, 0)
        if value and (value >= INT_MAX or value % unit):
            raise _constraint(name, value)
        return value

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return bool(
            self.align or self.max_transfer or self.opt_zero or self.max_zero or self.opt_discard or self.max_discard
        )


def _constraint(name: str, value: int) -> ImageError:
    return ImageError("", f"Cannot meet constraints with {name} {value}")


def pieces(offset: int, length: int, longest: int) -> Iterator[tuple[int, int]]:
    """A transfer in pieces of at most *longest* bytes (0: any)."""
    end = offset + length
    while offset < end:
        step = min(longest or length, end - offset)
        yield offset, step
        offset += step


def fragments(offset: int, length: int, align: int, preferred: int, longest: int) -> Iterator[tuple[int, int]]:
    """A range to be zeroed or discarded: to the next boundary of *align*, then of *preferred*, then as long as may be.

    The last piece is cut the same way from the end.
    """
    unit = max(align, preferred, 1)
    longest = longest // unit * unit if longest >= unit else longest
    end = offset + length
    head = -offset % unit
    tail = end % unit
    if head:
        first = min(head, length)
        inner = -offset % max(align, 1)
        if inner and inner < first:
            yield from pieces(offset, inner, longest)
            yield from pieces(offset + inner, first - inner, longest)
        else:
            yield from pieces(offset, first, longest)
        offset += first
    if offset < end - tail:
        yield from pieces(offset, end - tail - offset, longest)
        offset = end - tail
    if offset < end:
        whole = (end - offset) // max(align, 1) * max(align, 1)
        if whole:
            yield from pieces(offset, whole, longest)
        if offset + whole < end:
            yield offset + whole, end - offset - whole
