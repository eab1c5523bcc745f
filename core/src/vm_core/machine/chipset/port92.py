"""System control port A (0x92): A20 and a fast reset.

Source: IBM PS/2 Model 50/60 Technical Reference, "System Control Port A".
"""

from __future__ import annotations

from collections.abc import Callable


class Port92:
    """Bit 0: a rise resets the processor; bit 1: A20 (kept as state, see i8042)."""

    def __init__(self, reset_processor: Callable[[str], object]) -> None:
        self._reset_processor = reset_processor
        self.reset()

    def reset(self) -> None:
        """A20 on, as the board starts with it on."""
        self._value = 2

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        was, self._value = self._value, value & 2 | value & 1
        if value & 1 and not was & 1:
            self._reset_processor("port 92h")
