"""Two 8237A DMA controllers with the page registers of the PC/AT.

Theory of operation. Channels 0–3 move bytes (first controller), 5–7 words (second one, whose channel 0 carries the
first). The registers are complete; a device moves data with :meth:`IsaDma.transfer`, which does at once what DREQ and
DACK cycles do one by one, and reports terminal count. A channel that is masked, or a controller that is disabled,
transfers nothing.

Sources: Intel 8237A data sheet (231466-005); 82371SB (PIIX3) data sheet 2.5.1 for the page registers.
"""

from __future__ import annotations

import attrs

from ..memory import DmaError, GuestMemory

#: Page register ports by channel, from 0x80: channel 4 has one that addresses nothing.
_PAGES = {7: 0, 3: 1, 1: 2, 2: 3, 0xB: 5, 9: 6, 0xA: 7, 0xF: 4}


@attrs.define
class Channel:
    """A channel: *base* registers are reloaded at terminal count in autoinitialize mode."""

    base_address: int = 0
    base_count: int = 0
    address: int = 0
    count: int = 0
    page: int = 0
    mode: int = 0
    masked: bool = True


class Controller:
    """One 8237A. *shift* is 1 for the second one, whose registers lie two ports apart."""

    def __init__(self, shift: int) -> None:
        self.shift = shift
        self.channels = [Channel() for _ in range(4)]
        self.reset()

    def reset(self) -> None:
        """Master clear: command, status, request and flip-flop cleared, all channels masked."""
        self.command = 0
        self.status = 0
        self.temporary = 0
        self._high = False
        for channel in self.channels:
            channel.masked = True

    def _flip(self) -> bool:
        high, self._high = self._high, not self._high
        return high

    def read(self, offset: int, size: int) -> int:
        register = offset >> self.shift
        if register < 8:
            channel = self.channels[register >> 1]
            value = channel.count if register & 1 else channel.address
            return value >> 8 & 0xFF if self._flip() else value & 0xFF
        if register == 8:
            status, self.status = self.status, self.status & 0xF0
            return status
        if register == 13:
            return self.temporary
        if register == 15:
            return 0xF0 | sum(1 << n for n, channel in enumerate(self.channels) if channel.masked)
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        register = offset >> self.shift
        value &= 0xFF
        if register < 8:
            channel = self.channels[register >> 1]
            high = self._flip()
            if register & 1:
                channel.base_count = _half(channel.base_count, value, high)
                channel.count = channel.base_count
            else:
                channel.base_address = _half(channel.base_address, value, high)
                channel.address = channel.base_address
        elif register == 8:
            self.command = value
        elif register == 9:
            # Software requests, which no PC software makes: shown in the status register's upper half.
            bit = 0x10 << (value & 3)
            self.status = self.status | bit if value & 4 else self.status & ~bit
        elif register == 10:
            self.channels[value & 3].masked = bool(value & 4)
        elif register == 11:
            self.channels[value & 3].mode = value & 0xFC
        elif register == 12:
            self._high = False
        elif register == 13:
            self.reset()
        elif register == 14:
            for channel in self.channels:
                channel.masked = False
        else:
            for n, channel in enumerate(self.channels):
                channel.masked = bool(value & 1 << n)


def _half(word: int, byte: int, high: bool) -> int:
    return word & 0x00FF | byte << 8 if high else word & 0xFF00 | byte


class PageRegisters:
    """Ports 0x81–0x8f: address bits 16–23 of the channels. The ones that belong to no channel are plain storage."""

    def __init__(self, dma: IsaDma) -> None:
        self._dma = dma
        self._free = bytearray(16)

    def read(self, offset: int, size: int) -> int:
        number = _PAGES.get(offset + 1)
        return self._free[offset + 1] if number is None else self._dma.channel(number).page

    def write(self, offset: int, size: int, value: int) -> None:
        number = _PAGES.get(offset + 1)
        if number is None:
            self._free[offset + 1] = value & 0xFF
        else:
            self._dma.channel(number).page = value & 0xFF


class IsaDma:
    """The pair of controllers."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.first = Controller(0)
        self.second = Controller(1)
        self.pages = PageRegisters(self)

    def reset(self) -> None:
        """Both controllers cleared."""
        self.first.reset()
        self.second.reset()

    def channel(self, number: int) -> Channel:
        """Channel 0–7."""
        return (self.first, self.second)[number >> 2].channels[number & 3]

    def transfer(self, number: int, data: memoryview, *, to_memory: bool) -> tuple[int, bool]:
        """A device's *data* against what channel *number* was programmed for.

        Fills *data* from memory, or memory from *data*. Returns bytes moved and whether terminal count was reached;
        nothing moves while the channel is masked, its controller is disabled, or it was programmed the other way.
        """
        controller = (self.first, self.second)[number >> 2]
        channel = self.channel(number)
        width = 2 if number >= 4 else 1
        # Mode bits 3-2: 1 writes memory, 2 reads it, 0 verifies (counts without moving).
        direction = channel.mode >> 2 & 3
        if channel.masked or controller.command & 4 or direction == (2 if to_memory else 1):
            return 0, False
        left = (channel.count + 1) * width
        moved = min(left, len(data) // width * width)
        down = bool(channel.mode & 0x20)
        for at in range(0, moved, width):
            if direction:
                self._move(channel, width, data[at : at + width], to_memory)
            channel.address = channel.address + (-1 if down else 1) & 0xFFFF
        channel.count = channel.count - moved // width & 0xFFFF
        done = moved == left
        if done:
            controller.status |= 1 << (number & 3)
            if channel.mode & 0x10:
                channel.address, channel.count = channel.base_address, channel.base_count
            else:
                channel.masked = True
        return moved, done

    def _move(self, channel: Channel, width: int, data: memoryview, to_memory: bool) -> None:
        # Words are addressed in words: page bit 0 is not used.
        page = channel.page & ~(width - 1)
        address = page << 16 | channel.address * width
        try:
            view = self._memory.view(address, width)
        except DmaError:
            if not to_memory:
                data[:] = b"\xff" * width
            return
        if to_memory:
            view[:] = data
        else:
            data[:] = view
