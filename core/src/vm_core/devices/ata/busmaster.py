"""The bus master of a parallel IDE channel: registers, and the walk of the descriptor table in guest memory.

Source: "Programming Interface for Bus Master IDE Controller" revision 1.0; Intel 82371SB (PIIX3) datasheet.

How a transfer ends (the interface's 3.1, table of status bits):

=========  =========  ==========================================================================
interrupt  active     meaning
=========  =========  ==========================================================================
0          1          under way
1          0          done, and the descriptors were used up
1          1          done, with descriptors left over
0          0          the descriptors were shorter than the transfer, or (error bit) not memory
=========  =========  ==========================================================================
"""

from __future__ import annotations

import struct
from typing import Protocol

from ...block.node import Buffer
from ...machine.memory import PAGE, DmaError
from .drive import Drive, Phase

# Command register.
START = 0x01
#: The direction, 1: to memory. The drive's command decides; the bit is kept for the host.
TO_MEMORY = 0x08

# Status register.
ACTIVE = 0x01
ERROR = 0x02
INTERRUPT = 0x04
#: "Drive 0 / drive 1 is DMA capable": notes of firmware to the driver.
CAPABLE = 0x60

#: Descriptors: address, byte count (0: 64 KiB), end of table in the top bit.
_DESCRIPTOR = struct.Struct("<II")
END_OF_TABLE = 0x80000000
#: A table does not cross a 64 KiB boundary, so it never has more than this many bytes.
MAX_TABLE = 0x10000


class DmaMemory(Protocol):
    """Guest memory as a PCI function sees it; raises :class:`~vm_core.machine.memory.DmaError`."""

    def dma_read(self, address: int, length: int) -> bytes: ...

    def dma_views(self, address: int, length: int) -> list[Buffer]: ...


class BusMaster:
    """One of the two bus masters of a controller: 8 bytes of registers."""

    def __init__(self, memory: DmaMemory) -> None:
        self.memory = memory
        self.reset()

    def reset(self) -> None:
        """Power-on state."""
        self.command = 0
        self.status = 0
        self.table = 0
        self._waiting: Drive | None = None
        self._transferring = False
        self._restart = False
        self._at = 0
        self._table_left = 0
        self._address = 0
        self._left = 0
        self._last = True

    # Registers.

    def read(self, offset: int) -> int:
        """A byte; reserved ones read as ones."""
        if offset == 0:
            return self.command
        if offset == 2:
            return self.status
        if offset >= 4:
            return self.table >> 8 * (offset - 4) & 0xFF
        return 0xFF

    def write(self, offset: int, value: int) -> None:
        """A byte."""
        if offset == 0:
            self._write_command(value & (START | TO_MEMORY))
        elif offset == 2:
            cleared = value & (ERROR | INTERRUPT)
            self.status = (self.status & ~CAPABLE & ~cleared) | (value & CAPABLE)
        elif offset >= 4:
            shift = 8 * (offset - 4)
            self.table = (self.table & ~(0xFF << shift) | value << shift) & 0xFFFFFFFC

    def _write_command(self, value: int) -> None:
        before, self.command = self.command, value
        if value & START and not before & START:
            if self._transferring:
                self._restart = True
            else:
                self._begin()
        elif before & START and not value & START and not self._transferring:
            # A transfer under way goes on with the memory it was given, and the bit falls when it is over.
            self.status &= ~ACTIVE

    # What the channel tells.

    def dma_ready(self, drive: Drive) -> None:
        """*drive* wants memory."""
        self._waiting = drive
        self._try()

    def dma_done(self) -> None:
        """The drive no longer uses the memory it was given."""
        self._transferring = False
        restart, self._restart = self._restart, False
        if not self.command & START or (self._last and not self._left):
            self.status &= ~ACTIVE
        if restart and self.command & START:
            self._begin()

    def interrupted(self) -> None:
        """The channel's interrupt line has gone up."""
        self.status |= INTERRUPT

    # The transfer.

    def _try(self) -> None:
        drive = self._waiting
        if drive is None or not self.status & ACTIVE or self._transferring:
            return
        self._waiting = None
        if drive.phase != Phase.DMA:  # it was reset meanwhile
            return
        try:
            views, guest = self._gather(drive.dma_length)
        except DmaError:
            self.status = self.status & ~ACTIVE | ERROR
            drive.dma_error()
            return
        if sum(length for _, length in guest) < drive.dma_length:
            self.status &= ~ACTIVE
            drive.dma_underrun()
            return
        self._transferring = True
        drive.dma_start(views, guest)

    def _begin(self) -> None:
        """From the first descriptor on."""
        self.status |= ACTIVE
        self._at = self.table
        self._table_left = MAX_TABLE - (self.table & MAX_TABLE - 1)
        self._left = 0
        self._last = False
        self._try()

    def _gather(self, wanted: int) -> tuple[list[Buffer], list[tuple[int, int]]]:
        """Memory of the next *wanted* bytes of the table, adjoining descriptors joined; less if the table ends."""
        runs: list[tuple[int, int]] = []
        entries: memoryview = memoryview(b"")
        while wanted:
            if not self._left:
                if self._last or not self._table_left:
                    break
                if not entries:
                    # As many entries as the page of the table holds.
                    length = min(PAGE - (self._at & PAGE - 1), self._table_left) & ~7 or 8
                    entries = memoryview(self.memory.dma_read(self._at, length))
                address, count = _DESCRIPTOR.unpack_from(entries)
                entries = entries[8:]
                self._at += 8
                self._table_left = max(self._table_left - 8, 0)
                self._address = address & 0xFFFFFFFE
                self._left = count & 0xFFFE or 0x10000
                self._last = bool(count & END_OF_TABLE)
            take = min(wanted, self._left)
            if runs and runs[-1][0] + runs[-1][1] == self._address:
                runs[-1] = (runs[-1][0], runs[-1][1] + take)
            else:
                runs.append((self._address, take))
            self._address += take
            self._left -= take
            wanted -= take
        views: list[Buffer] = []
        for address, length in runs:
            views += self.memory.dma_views(address, length)
        return views, runs
