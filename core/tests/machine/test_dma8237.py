"""The ISA DMA controllers: registers as programs use them, and transfers for devices."""

from __future__ import annotations

import pytest

from vm_core.machine.chipset.dma8237 import IsaDma
from vm_core.machine.memory import GuestMemory, Region, RegionKind


class Board:
    def __init__(self) -> None:
        self.memory = GuestMemory(1 << 20)
        self.memory.add(Region("ram", 0, 1 << 20, RegionKind.RAM))
        self.dma = IsaDma(self.memory)

    def program(self, channel: int, address: int, count: int, mode: int) -> None:
        """As a driver does: flip-flop cleared, mode, address, page, count, unmasked. *count* in the channel's units."""
        controller = self.dma.second if channel >= 4 else self.dma.first
        shift, low = controller.shift, channel & 3
        controller.write(12 << shift, 1, 0)
        controller.write(11 << shift, 1, mode | low)
        offset = address >> shift if channel >= 4 else address
        for value in (offset & 0xFF, offset >> 8 & 0xFF):
            controller.write(2 * low << shift, 1, value)
        for value in (count - 1 & 0xFF, count - 1 >> 8):
            controller.write(2 * low + 1 << shift, 1, value)
        page = {0: 0x87, 1: 0x83, 2: 0x81, 3: 0x82, 5: 0x8B, 6: 0x89, 7: 0x8A}[channel]
        self.dma.pages.write(page - 0x81, 1, address >> 16)
        controller.write(10 << shift, 1, low)


def test_a_transfer_to_memory_ends_with_terminal_count() -> None:
    """The diskette's channel 2: data goes where page, address and count say, then the channel is masked."""
    board = Board()
    board.program(2, 0x12340, 512, 0x44)
    data = memoryview(bytearray(range(256)) * 2)
    assert board.dma.transfer(2, data[:300], to_memory=True) == (300, False)
    assert board.dma.transfer(2, data[300:], to_memory=True) == (212, True)
    assert board.memory.read(0x12340, 512) == data
    assert board.dma.first.read(8, 1) & 0x0F == 4
    assert board.dma.first.read(8, 1) & 0x0F == 0
    assert board.dma.transfer(2, data, to_memory=True) == (0, False)


def test_a_16_bit_channel_counts_words() -> None:
    """Channels 5 to 7 move two bytes a count, at twice the address."""
    board = Board()
    board.memory.write(0x24680, b"0123456789")
    board.program(5, 0x24680, 5, 0x48)
    data = memoryview(bytearray(10))
    assert board.dma.transfer(5, data, to_memory=False) == (10, True)
    assert data == b"0123456789"


def test_autoinitialize_begins_again() -> None:
    """With mode bit 4 the channel reloads and stays unmasked."""
    board = Board()
    board.program(1, 0x1000, 4, 0x54)
    for text in (b"abcd", b"efgh"):
        assert board.dma.transfer(1, memoryview(bytearray(text)), to_memory=True) == (4, True)
    assert board.memory.read(0x1000, 4) == b"efgh"


@pytest.mark.parametrize(("mode", "to_memory"), [(0x44, False), (0x48, True)])
def test_the_wrong_direction_moves_nothing(mode: int, to_memory: bool) -> None:
    """A channel programmed to write memory cannot be read through, and the other way round."""
    board = Board()
    board.program(2, 0x1000, 16, mode)
    assert board.dma.transfer(2, memoryview(bytearray(16)), to_memory=to_memory) == (0, False)


def test_registers_are_read_through_the_flip_flop() -> None:
    """Address and count come back low byte first, and move with the transfer; master clear masks everything."""
    board = Board()
    board.program(3, 0x5678, 0x100, 0x44)
    board.dma.transfer(3, memoryview(bytearray(16)), to_memory=True)
    controller = board.dma.first
    controller.write(12, 1, 0)
    assert controller.read(6, 1) | controller.read(6, 1) << 8 == 0x5688
    assert controller.read(7, 1) | controller.read(7, 1) << 8 == 0xEF
    assert controller.read(15, 1) == 0xF7
    controller.write(13, 1, 0)
    assert controller.read(15, 1) == 0xFF


def test_page_registers_of_no_channel_are_storage() -> None:
    """Firmware keeps notes there."""
    board = Board()
    board.dma.pages.write(0x84 - 0x81, 1, 0x5A)
    assert board.dma.pages.read(0x84 - 0x81, 1) == 0x5A
