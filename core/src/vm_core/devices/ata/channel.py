"""A parallel ATA channel: one or two drives behind the command block, the control register and one interrupt line.

Both drives hear every register write; the selected one answers. What the host reads where there is no drive:

- with no drive at all the bus floats: every register reads 0xFF;
- for an absent drive beside a present one, status and alternate status read 0x00, and the other registers hold what
  was written (ATA/ATAPI-7 volume 2, 9.16: device 0 answers for device 1).

The channel gives REP INS and REP OUTS of the data register a path of their own (:meth:`Channel.read_block`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...block.node import Buffer
from ...block.request import Request
from .busmaster import BusMaster
from .commands import EXECUTE_DIAGNOSTIC
from .drive import Drive, Phase, Ranges
from .registers import BSY, DATA, DEV, DEVICE, DEVICE_OBSOLETE, ERROR, HOB, NIEN, SRST, STATUS, TaskFile

_FLOATING = 0xFF


class ChannelHost(Protocol):
    """What a channel needs of the machine around it; see :class:`~.drive.Link` for the first three."""

    def submit(self, drive: Drive, requests: list[Request]) -> None: ...

    def set_write_cache(self, drive: Drive, enabled: bool) -> None: ...

    def copy(self, drive: Drive, views: Sequence[Buffer], guest: Ranges, data: Buffer) -> None: ...

    def set_irq(self, level: bool) -> None:
        """The interrupt line of the channel changes to *level*."""
        ...

    def now(self) -> int: ...


class Channel:
    """The command block is an I/O handler of 8 bytes; :attr:`control` is that of the control register's one."""

    def __init__(self, host: ChannelHost, busmaster: BusMaster | None = None) -> None:
        self.host = host
        self.busmaster = busmaster
        self.drives: list[Drive | None] = [None, None]
        self.control = ControlBlock(self)
        self._nobody = TaskFile()
        self._selected = 0
        self._control = 0
        self._line = False

    def attach(self, unit: int, drive: Drive) -> None:
        """Plug *drive* in as device *unit*."""
        self.drives[unit] = drive

    def detach(self, unit: int) -> None:
        """Unplug device *unit*."""
        self.drives[unit] = None
        self._update_line()

    def power_on(self) -> None:
        """Power-on or hardware reset."""
        self._selected = 0
        self._control = 0
        self._nobody = TaskFile()
        if self.busmaster is not None:
            self.busmaster.reset()
        for drive in self.drives:
            if drive is not None:
                drive.power_on()
        self._update_line()

    # Registers.

    def read(self, offset: int, size: int) -> int:
        """A read of the command block."""
        if size > 1:
            if offset == DATA:
                drive = self.drives[self._selected]
                return (1 << 8 * size) - 1 if drive is None else drive.pio_read_item(size)
            # Byte registers read as a word: one after the other.
            return sum(self.read(offset + i, 1) << 8 * i for i in range(size))
        drive = self.drives[self._selected]
        if drive is None:
            if offset == DATA or offset > STATUS or not any(self.drives):
                return _FLOATING
            if offset == STATUS:
                return 0x00
            return self._register(self._nobody, offset)
        if offset == STATUS:
            return drive.acknowledge()
        if offset == ERROR:
            return drive.error
        if offset == DATA or offset > STATUS:
            return _FLOATING  # the data register has 16 bits
        return self._register(drive.taskfile, offset)

    def _register(self, taskfile: TaskFile, offset: int) -> int:
        if offset == ERROR:
            return 0x00
        if offset == DEVICE:
            return taskfile.current[DEVICE] | DEVICE_OBSOLETE
        return (taskfile.previous if self._control & HOB else taskfile.current)[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        """A write to the command block."""
        if offset == DATA:
            if size > 1:
                self.write_block(DATA, size, value.to_bytes(size, "little"))
            return
        if size > 1:
            for i in range(size):
                self.write(offset + i, 1, value >> 8 * i & 0xFF)
            return
        if offset > STATUS:
            return
        self._control &= ~HOB
        if offset == STATUS:
            self._command(value)
            return
        selected = self.drives[self._selected]
        if selected is not None and selected.status & BSY:
            return
        for drive in self.drives:
            if drive is not None:
                drive.taskfile.write(offset, value)
        self._nobody.write(offset, value)
        if offset == DEVICE:
            self._selected = 1 if value & DEV else 0
            self._update_line()

    def _command(self, opcode: int) -> None:
        if opcode == EXECUTE_DIAGNOSTIC:
            self._diagnose()
            return
        drive = self.drives[self._selected]
        if drive is not None:
            drive.command(opcode)

    def _diagnose(self) -> None:
        """EXECUTE DEVICE DIAGNOSTIC is carried out by both drives, whichever is selected; device 0 interrupts."""
        present = [drive for drive in self.drives if drive is not None]
        if not present or any(drive.phase != Phase.IDLE for drive in present):
            return
        self._selected = 0
        self._nobody.set_signature(bytes(4))
        for drive in reversed(present):
            drive.command(EXECUTE_DIAGNOSTIC)
        if len(present) == 2:
            present[1].acknowledge()

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """REP INS: *count* items of *size* bytes."""
        if offset != DATA or size == 1:
            return b"".join(self.read(offset, size).to_bytes(size, "little") for _ in range(count))
        drive = self.drives[self._selected]
        if drive is None:
            return b"\xff" * (size * count)
        return drive.pio_read(size * count)

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """REP OUTS."""
        if offset != DATA or size == 1:
            for i in range(0, len(data), size):
                self.write(offset, size, int.from_bytes(data[i : i + size], "little"))
            return
        drive = self.drives[self._selected]
        if drive is not None:
            drive.pio_write(data)

    def read_alternate_status(self) -> int:
        """Status, and nothing else happens."""
        drive = self.drives[self._selected]
        if drive is not None:
            return drive.status
        return 0x00 if any(self.drives) else _FLOATING

    def write_control(self, value: int) -> None:
        """Device control: nIEN, SRST, HOB."""
        before, self._control = self._control, value
        present = [drive for drive in self.drives if drive is not None]
        if value & SRST and not before & SRST:
            for drive in present:
                drive.reset_begin()
        elif before & SRST and not value & SRST:
            self._selected = 0
            self._nobody.set_signature(bytes(4))
            for drive in present:
                drive.reset_end()
        self._update_line()

    # The drives' link.

    def submit(self, drive: Drive, requests: list[Request]) -> None:
        self.host.submit(drive, requests)

    def set_write_cache(self, drive: Drive, enabled: bool) -> None:
        self.host.set_write_cache(drive, enabled)

    def copy(self, drive: Drive, views: Sequence[Buffer], guest: Ranges, data: Buffer) -> None:
        self.host.copy(drive, views, guest, data)

    def now(self) -> int:
        return self.host.now()

    def interrupt(self, drive: Drive) -> None:
        self._update_line()

    def _update_line(self) -> None:
        """The selected drive drives INTRQ, unless nIEN makes it float."""
        drive = self.drives[self._selected]
        level = drive is not None and drive.interrupt_pending and not self._control & NIEN
        if level != self._line:
            self._line = level
            if level and self.busmaster is not None:
                self.busmaster.interrupted()
            self.host.set_irq(level)

    def dma_ready(self, drive: Drive) -> None:
        if self.busmaster is not None:
            self.busmaster.dma_ready(drive)

    def dma_done(self, drive: Drive) -> None:
        if self.busmaster is not None:
            self.busmaster.dma_done()


class ControlBlock:
    """Alternate status and device control: an I/O handler of one byte."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def read(self, offset: int, size: int) -> int:
        """Alternate status; the ports behind it are nobody's."""
        return (1 << 8 * size) - 0x100 | self.channel.read_alternate_status()

    def write(self, offset: int, size: int, value: int) -> None:
        """Device control is the low byte."""
        self.channel.write_control(value & 0xFF)
