"""Transfer modes: what SET FEATURES 0x03 selects and IDENTIFY words 62, 63 and 88 report (ACS-2 7.45.6)."""

from __future__ import annotations

#: Highest modes offered.
PIO, MULTIWORD, ULTRA = 4, 2, 5


class TransferModes:
    """The selected mode. Multiword and Ultra DMA exclude each other; PIO is not reported."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Ultra DMA mode 5, as firmware would have chosen."""
        self.multiword: int | None = None
        self.ultra: int | None = ULTRA

    def select(self, value: int) -> bool:
        """Take the value that the count register holds; False for a mode that does not exist here."""
        kind, mode = value >> 3, value & 7
        if kind == 0:  # PIO default mode, with or without IORDY
            return mode <= 1
        if kind == 1:  # PIO flow control
            return mode <= PIO
        if kind == 4 and mode <= MULTIWORD:
            self.multiword, self.ultra = mode, None
            return True
        if kind == 8 and mode <= ULTRA:
            self.multiword, self.ultra = None, mode
            return True
        return False

    @property
    def multiword_word(self) -> int:
        """Word 63."""
        return (2 << MULTIWORD) - 1 | (0 if self.multiword is None else 0x100 << self.multiword)

    @property
    def ultra_word(self) -> int:
        """Word 88."""
        return (2 << ULTRA) - 1 | (0 if self.ultra is None else 0x100 << self.ultra)
