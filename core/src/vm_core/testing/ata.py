"""Drives without a machine: storage in memory, a channel that is told when storage is done, and a host driver.

:class:`AtaBench` is a channel with its bus master, guest memory and up to two drives. :class:`AtaDriver` is what a
guest's driver is. It speaks through :class:`Ports`, so it runs on a bench, on a machine's ports, or on QEMU's::

    bench = AtaBench()
    bench.add_disk(1 << 20)
    driver = AtaDriver(bench)
    driver.read_sectors(0, 4)
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from ..block.node import Buffer
from ..block.request import Op, Request
from ..devices.ata import AtaDisk, AtapiCdRom, BusMaster, Channel, Drive, Geometry, Identity
from ..devices.ata.registers import BSY, DRQ, ERR
from ..machine.memory import GuestMemory, Region, RegionKind
from .backend import MemoryBackend

COMMAND_PORT = 0x1F0
CONTROL_PORT = 0x3F6
BUS_MASTER_PORT = 0xC000

DISK = Identity(serial="S1", model="TEST DISK", firmware="1.0")
CDROM = Identity(serial="S2", model="TEST CD-ROM", firmware="1.0")


class Ports(Protocol):
    """Port accesses. ``insw`` and ``outsw`` move words as bytes; ``poll`` lets whatever is asynchronous happen."""

    def inb(self, port: int) -> int: ...

    def outb(self, port: int, value: int) -> None: ...

    def outl(self, port: int, value: int) -> None: ...

    def insw(self, port: int, count: int) -> bytes: ...

    def outsw(self, port: int, data: bytes) -> None: ...

    def poll(self) -> None: ...


class Tray(MemoryBackend):
    """Memory with a tray: a CD-ROM drive's backend. *size* 0 is an empty drive."""

    def __init__(self, size: int = 0) -> None:
        super().__init__(size, readonly=True)
        self.tray_open = False
        self.locked = False
        self.on_medium_change: list[Callable[[bool], None]] = []

    def move_tray(self, *, is_open: bool) -> None:
        self.tray_open = is_open

    def insert(self, data: bytes) -> None:
        """Put a medium in, tell the device."""
        self.data[:] = data
        self.tray_open = False
        for listener in self.on_medium_change:
            listener(True)


class Memory:
    """Guest memory as a bus master sees it."""

    def __init__(self, size: int) -> None:
        self.ram = GuestMemory(size)
        self.ram.add(Region("ram", 0, size, RegionKind.RAM))

    def dma_read(self, address: int, length: int) -> bytes:
        return self.ram.read(address, length)

    def dma_views(self, address: int, length: int) -> list[Buffer]:
        return self.ram.views(address, length)


class AtaBench:
    """See the module's text. Storage answers in :meth:`poll`, or at once with *immediate*."""

    def __init__(self, *, ram: int = 4 << 20, immediate: bool = False) -> None:
        self.memory = Memory(ram)
        self.busmaster = BusMaster(self.memory)
        self.channel = Channel(self, self.busmaster)
        self.immediate = immediate
        self.backends: dict[int, MemoryBackend] = {}
        self.irq = False
        #: How often the interrupt line went up.
        self.interrupts = 0
        self.time = 0
        self._copies: list[Callable[[], None]] = []

    def add_disk(
        self, size: int, *, unit: int = 0, geometry: Geometry | None = None, identity: Identity = DISK
    ) -> AtaDisk:
        """An ATA disk of *size* bytes."""
        backend = MemoryBackend(size)
        disk = AtaDisk(self.channel, backend, identity, unit=unit, geometry=geometry)
        self._attach(unit, disk, backend)
        return disk

    def add_cdrom(self, size: int = 0, *, unit: int = 0) -> AtapiCdRom:
        """An ATAPI CD-ROM drive with a medium of *size* bytes."""
        backend = Tray(size)
        drive = AtapiCdRom(self.channel, backend, Identity(serial="S2", model="TEST CD-ROM", firmware="1.0"), unit=unit)
        backend.on_medium_change.append(drive.medium_changed)
        self._attach(unit, drive, backend)
        return drive

    def _attach(self, unit: int, drive: Drive, backend: MemoryBackend) -> None:
        backend.immediate = self.immediate
        self.backends[unit] = backend
        self.channel.attach(unit, drive)

    # The channel's host.

    def submit(self, drive: Drive, requests: list[Request]) -> None:
        for request in requests:
            request.done = drive.complete
        self.backends[drive.unit].submit(requests)

    def set_write_cache(self, drive: Drive, enabled: bool) -> None:
        self.backends[drive.unit].set_write_cache(enabled, drive.complete)

    def copy(self, drive: Drive, views: Sequence[Buffer], guest: Sequence[tuple[int, int]], data: Buffer) -> None:
        def copy() -> None:
            source = bytes(data)
            at = 0
            for view in views:
                view[:] = source[at : at + len(view)]
                at += len(view)
            drive.complete(Request(Op.READ))

        self._copies.append(copy)
        if self.immediate:
            self._run_copies()

    def _run_copies(self) -> bool:
        copies, self._copies = self._copies, []
        for copy in copies:
            copy()
        return bool(copies)

    def set_irq(self, level: bool) -> None:
        self.irq = level
        self.interrupts += level

    def now(self) -> int:
        return self.time

    # Ports.

    def poll(self) -> None:
        """Let storage answer until it has nothing left to do."""
        while sum(backend.run() for backend in self.backends.values()) or self._run_copies():
            pass

    def read(self, port: int, size: int) -> int:
        """An input of *size* bytes."""
        if port >= BUS_MASTER_PORT:
            return sum(self.busmaster.read(port - BUS_MASTER_PORT + i) << 8 * i for i in range(size))
        if port == CONTROL_PORT:
            return self.channel.control.read(0, size)
        return self.channel.read(port - COMMAND_PORT, size)

    def write(self, port: int, size: int, value: int) -> None:
        """An output of *size* bytes."""
        if port >= BUS_MASTER_PORT:
            for i in range(size):
                self.busmaster.write(port - BUS_MASTER_PORT + i, value >> 8 * i & 0xFF)
        elif port == CONTROL_PORT:
            self.channel.control.write(0, size, value)
        else:
            self.channel.write(port - COMMAND_PORT, size, value)

    def inb(self, port: int) -> int:
        return self.read(port, 1)

    def inw(self, port: int) -> int:
        return self.read(port, 2)

    def inl(self, port: int) -> int:
        return self.read(port, 4)

    def outb(self, port: int, value: int) -> None:
        self.write(port, 1, value)

    def outw(self, port: int, value: int) -> None:
        self.write(port, 2, value)

    def outl(self, port: int, value: int) -> None:
        self.write(port, 4, value)

    def insw(self, port: int, count: int) -> bytes:
        return self.channel.read_block(port - COMMAND_PORT, 2, count)

    def outsw(self, port: int, data: bytes) -> None:
        self.channel.write_block(port - COMMAND_PORT, 2, data)


class AtaError(Exception):
    """A command ended with ERR: status and error registers, and the LBA that the device left (48 bits)."""

    def __init__(self, status: int, error: int, lba: int) -> None:
        super().__init__(f"status {status:#04x}, error {error:#04x}, LBA {lba}")
        self.status = status
        self.error = error
        self.lba = lba


class CheckConditionError(Exception):
    """A packet ended with CHECK CONDITION: sense key, additional sense code and qualifier."""

    def __init__(self, key: int, asc: int, ascq: int) -> None:
        super().__init__(f"sense {key:x}/{asc:02x}/{ascq:02x}")
        self.sense = (key, asc, ascq)


#: Registers from offset 1 on: features, count, LBA low, mid, high, device.
REGISTERS = 6


class AtaDriver:
    """A polling driver for device *unit* of the channel at *command*, *control* and *busmaster*."""

    def __init__(
        self,
        ports: Ports,
        *,
        unit: int = 0,
        command: int = COMMAND_PORT,
        control: int = CONTROL_PORT,
        busmaster: int = BUS_MASTER_PORT,
    ) -> None:
        self.ports = ports
        self.base = command
        self.control = control
        self.busmaster = busmaster
        self.device = 0xE0 | unit << 4

    # Registers.

    def select(self) -> None:
        """Make the drive the selected one."""
        self.ports.outb(self.base + 6, self.device)

    def wait(self, mask: int = BSY) -> int:
        """Wait until the bits of *mask* are clear and return the alternate status."""
        for _ in range(100_000):
            status = self.ports.inb(self.control)
            if not status & mask:
                return status
            self.ports.poll()
        raise TimeoutError(f"status stays {status:#04x}")

    def registers(self) -> dict[str, int]:
        """What can be read, by name, without ending the interrupt."""
        names = ("error", "count", "lba_low", "lba_mid", "lba_high", "device")
        values = {name: self.ports.inb(self.base + 1 + i) for i, name in enumerate(names)}
        values["status"] = self.ports.inb(self.control)
        return values

    def lba(self) -> int:
        """The address that the device left: 48 bits."""
        low = sum(self.ports.inb(self.base + 3 + i) << 8 * i for i in range(3))
        self.ports.outb(self.control, 0x80)
        high = sum(self.ports.inb(self.base + 3 + i) << 8 * i for i in range(3))
        self.ports.outb(self.control, 0x00)
        return low | high << 24

    def issue(self, opcode: int, *, features: int = 0, count: int = 0, lba: int = 0, ext: bool = False) -> None:
        """Write the registers and the command. With *ext*, count and lba are written twice, high bytes first."""
        out, base = self.ports.outb, self.base
        self.select()
        if ext:
            out(base + 1, features >> 8)
            out(base + 2, count >> 8 & 0xFF)
            for i in range(3):
                out(base + 3 + i, lba >> 24 + 8 * i & 0xFF)
        else:
            out(base + 6, self.device | lba >> 24 & 0x0F)
        out(base + 1, features & 0xFF)
        out(base + 2, count & 0xFF)
        for i in range(3):
            out(base + 3 + i, lba >> 8 * i & 0xFF)
        out(base + 7, opcode)

    def finish(self) -> int:
        """Wait for the end of the command and return the status. Raises AtaError."""
        self.wait()
        status = self.ports.inb(self.base + 7)
        if status & ERR:
            raise AtaError(status, self.ports.inb(self.base + 1), self.lba())
        return status

    def reset(self) -> None:
        """A software reset of both devices."""
        self.ports.outb(self.control, 0x04)
        self.ports.outb(self.control, 0x00)
        self.wait()

    # Commands.

    def non_data(self, opcode: int, **registers: int) -> int:
        """A command without data."""
        self.issue(opcode, **registers)  # type: ignore[arg-type]
        return self.finish()

    def _read_blocks(self, length: int, block: int) -> bytes:
        data = b""
        while len(data) < length:
            if not self.finish() & DRQ:
                raise AssertionError(f"no data after {len(data)} of {length} bytes")
            data += self.ports.insw(self.base, min(block, length - len(data)) // 2)
        return data

    def _write_blocks(self, data: bytes, block: int) -> None:
        for at in range(0, len(data), block):
            if not self.finish() & DRQ:
                raise AssertionError(f"no data wanted after {at} of {len(data)} bytes")
            self.ports.outsw(self.base, data[at : at + block])

    def pio_in(self, opcode: int, length: int = 512, *, block: int = 512, **registers: int) -> bytes:
        """A command with *length* bytes for the host."""
        self.issue(opcode, **registers)  # type: ignore[arg-type]
        data = self._read_blocks(length, block)
        status = self.finish()
        assert not status & DRQ, "the device has more data than expected"
        return data

    def pio_out(self, opcode: int, data: bytes, *, block: int = 512, **registers: int) -> None:
        """A command with *data* for the device."""
        self.issue(opcode, **registers)  # type: ignore[arg-type]
        self._write_blocks(data, block)
        self.finish()

    def identify(self) -> tuple[int, ...]:
        """The 256 words of IDENTIFY DEVICE."""
        return struct.unpack("<256H", self.pio_in(0xEC))

    def read_sectors(self, lba: int, count: int, *, ext: bool = False, sector: int = 512) -> bytes:
        """READ SECTORS (EXT)."""
        return self.pio_in(0x24 if ext else 0x20, count * sector, block=sector, count=count, lba=lba, ext=ext)

    def write_sectors(self, lba: int, data: bytes, *, ext: bool = False, sector: int = 512) -> None:
        """WRITE SECTORS (EXT)."""
        self.pio_out(0x34 if ext else 0x30, data, block=sector, count=len(data) // sector, lba=lba, ext=ext)

    # DMA.

    def dma(self, opcode: int, table: int, *, to_memory: bool, **registers: int) -> int:
        """A DMA command with the descriptor table at *table*; returns the bus master's status when all is quiet."""
        out, base = self.ports.outb, self.busmaster
        out(base, 0)
        out(base + 2, 0x06)
        self.ports.outl(base + 4, table)
        out(base, 0x08 if to_memory else 0)
        self.issue(opcode, **registers)  # type: ignore[arg-type]
        out(base, (0x08 if to_memory else 0) | 1)
        self.wait(BSY | DRQ)
        status = self.ports.inb(base + 2)
        out(base, 0)
        self.finish()
        return status

    # Packets.

    def packet(
        self,
        cdb: bytes,
        *,
        out: bytes = b"",
        limit: int = 0xFFFE,
        dma: bool = False,
        table: int = 0,
        sense: bool = True,
    ) -> bytes:
        """A packet command by PIO, or DMA with the descriptor table at *table*; returns the PIO data.

        Raises CheckConditionError with what REQUEST SENSE says, or AtaError without *sense*.
        """
        try:
            return self._packet(cdb.ljust(12, b"\0"), out, limit, dma, table)
        except AtaError as error:
            if not sense or not error.error >> 4:
                raise
        data = self._packet(bytes((0x03, 0, 0, 0, 18)).ljust(12, b"\0"), b"", 0xFFFE, False, 0)
        raise CheckConditionError(data[2] & 0x0F, data[12], data[13])

    def _packet(self, cdb: bytes, out: bytes, limit: int, dma: bool, table: int) -> bytes:
        ports = self.ports
        if dma:
            ports.outb(self.busmaster, 0)
            ports.outb(self.busmaster + 2, 0x06)
            ports.outl(self.busmaster + 4, table)
            ports.outb(self.busmaster, 0 if out else 8)
        self.issue(0xA0, features=int(dma), lba=limit << 8)
        if not self.finish() & DRQ:
            raise AssertionError("the device wants no packet")
        ports.outsw(self.base, cdb)
        if dma:
            ports.outb(self.busmaster, 1 if out else 9)
        data, sent = b"", 0
        while True:
            if dma:
                self.wait(BSY | DRQ)
                self.finish()
                ports.outb(self.busmaster, 0)
                return b""
            if not self.finish() & DRQ:
                return data
            count = ports.inb(self.base + 4) | ports.inb(self.base + 5) << 8
            if ports.inb(self.base + 2) & 2:
                data += ports.insw(self.base, (count + 1) // 2)[:count]
            else:
                piece = out[sent : sent + count]
                ports.outsw(self.base, piece + b"\0" * (len(piece) & 1))
                sent += count


def descriptors(runs: Sequence[tuple[int, int]]) -> bytes:
    """A descriptor table for (address, length) *runs*; a length of 64 KiB is written as 0."""
    table = b""
    for i, (address, length) in enumerate(runs):
        last = 0x80000000 if i == len(runs) - 1 else 0
        table += struct.pack("<II", address, length & 0xFFFF | last)
    return table
